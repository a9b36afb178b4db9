import copy
import math

import pytest
import torch
from tiny_models import tiny_lawcat, tiny_llama, tiny_mamba, tiny_mistral
from tokenizers import processors

from lawcat.errors import ConfigurationError, DataError
from lawcat.evaluation.perplexity import perplexity_by_position
from lawcat.tasks import TextSource, builtin_source

TEXT = builtin_source().text[:3000]


def plain_nll(model, ids):
    """Every token but the first, from one forward over the whole window."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return -logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]


@pytest.mark.filterwarnings("ignore:MambaForCausalLM does not go on")
@pytest.mark.parametrize("make", [tiny_llama, tiny_lawcat, tiny_mistral, tiny_mamba])
def test_equals_a_plain_computation(tokenizer, make):
    model = make()
    ids = tokenizer(TEXT).input_ids
    length = 150
    windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    nll = torch.stack([plain_nll(model, window) for window in windows])
    result = perplexity_by_position(model, tokenizer, TEXT, length=length, chunk_tokens=40, batch_windows=3)
    assert (result.num_windows, result.num_tokens) == (len(windows), nll.numel())
    assert len(windows) > 4
    assert result.nll == pytest.approx(nll.mean().item(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-4)
    assert [(bucket.start, bucket.end) for bucket in result.buckets] == [(0, 64), (64, 128), (128, 150)]
    for bucket in result.buckets:
        part = nll[:, max(bucket.start, 1) - 1 : bucket.end - 1]
        assert bucket.num_tokens == part.numel()
        assert bucket.nll == pytest.approx(part.mean().item(), rel=1e-5)


def test_windows_start_with_what_the_tokenizer_puts_in_front(tokenizer, model):
    with_start = copy.deepcopy(tokenizer)
    with_start.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", with_start.eos_token_id)]
    )
    ids = with_start(TEXT, add_special_tokens=False).input_ids
    start = with_start.eos_token_id
    nll = torch.stack([plain_nll(model, [start, *ids[:99]]), plain_nll(model, [start, *ids[99:198]])])
    result = perplexity_by_position(model, with_start, TEXT, length=100, max_windows=2)
    assert result.num_windows == 2
    assert result.nll == pytest.approx(nll.mean().item(), rel=1e-5)


def test_settings_do_not_change_the_result(tokenizer, model):
    model.train()
    results = [
        perplexity_by_position(model, tokenizer, TEXT, length=130, chunk_tokens=chunk, batch_windows=batch)
        for chunk, batch in ((1, 100), (129, 1), (1000, 2), (7, 3))
    ]
    assert model.training
    for result in results[1:]:
        assert result.nll == pytest.approx(results[0].nll, rel=1e-6)


def test_first_windows_of_a_long_text(tokenizer, model):
    reports = []
    few = perplexity_by_position(
        model, tokenizer, TEXT, length=64, max_windows=3, progress=lambda *done: reports.append(done)
    )
    assert (few.num_windows, few.num_tokens) == (3, 3 * 63)
    assert reports == [(1, 3), (2, 3), (3, 3)]
    # A text that packs many characters into a token is read on until the windows are full.
    dense = "pass key " * 4000
    assert perplexity_by_position(model, tokenizer, dense, length=64, max_windows=3).num_windows == 3


def test_json(tokenizer, model):
    source = TextSource("prose", TEXT)
    result = perplexity_by_position(model, tokenizer, source, length=100, max_windows=1).to_json()
    assert result["source"] == {"name": "prose", "sha256": source.sha256}
    assert (result["length"], result["windows"], result["tokens"]) == (100, 1, 99)
    assert [entry["tokens"] for entry in result["positions"]] == [63, 36]
    broken = tiny_llama()
    broken.lm_head.weight.data.fill_(float("nan"))
    result = perplexity_by_position(broken, tokenizer, source, length=100, max_windows=1).to_json()
    assert result["perplexity"] is None


def test_bad_input(tokenizer, model):
    with pytest.raises(DataError, match=r"'text' has \d+ tokens, less than one window of 5000"):
        perplexity_by_position(model, tokenizer, TEXT, length=5000)
    with pytest.raises(DataError, match="has 0 tokens"):
        perplexity_by_position(model, tokenizer, "", length=50)
    for name, value in (("length", 1), ("max_windows", 0), ("batch_windows", 0), ("chunk_tokens", 0)):
        with pytest.raises(ConfigurationError, match=f"{name} is {value}; it must be at least"):
            perplexity_by_position(model, tokenizer, TEXT, **{name: value})
