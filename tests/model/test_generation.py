"""``generate`` in all its ways gives what recomputing everything for each token gives."""

from __future__ import annotations

import pytest
import torch
from model_variants import VARIANTS, left_pad, model_of, random_tokens
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from comparison import assert_near
from lawcat import LawcatCache, LawcatForCausalLM

# The paper's, and those whose cache, mask or positions differ.
NAMES = [
    "paper",
    "state a kv head",
    "no convolution",
    "rope",
    "hybrid",
    "hybrid, softmax first",
    "all softmax",
    "lolcats",
    "sinks in a window",
    "sliding, with sinks",
    "three kinds",
]
NEW_TOKENS = 9


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> LawcatForCausalLM:
    return model_of(VARIANTS[request.param])


@torch.no_grad()
def greedy_by_hand(model: LawcatForCausalLM, tokens: Tensor, new_tokens: int = NEW_TOKENS) -> Tensor:
    for _ in range(new_tokens):
        chosen = model(tokens, use_cache=False).logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
    return tokens


def generate(model: LawcatForCausalLM, tokens: Tensor | None = None, **options: object) -> Tensor:
    if tokens is not None:
        options = {"attention_mask": torch.ones_like(tokens)} | options
    return model.generate(tokens, **({"max_new_tokens": NEW_TOKENS, "do_sample": False} | options))


def test_greedy(model: LawcatForCausalLM) -> None:
    tokens = random_tokens(2, 12)
    expected = greedy_by_hand(model, tokens)
    assert torch.equal(generate(model, tokens), expected)
    assert torch.equal(generate(model, tokens, use_cache=False), expected)


def test_a_prompt_of_one_token(model: LawcatForCausalLM) -> None:
    tokens = random_tokens(3, 1)
    assert torch.equal(generate(model, tokens), greedy_by_hand(model, tokens))


def test_left_padded_batch(model: LawcatForCausalLM) -> None:
    rows = [random_tokens(1, length) for length in (12, 5, 1)]
    padded = torch.zeros(3, 12, dtype=torch.long)
    mask = torch.zeros(3, 12, dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, 12 - row.shape[1] :] = row
        mask[index, 12 - row.shape[1] :] = 1
    actual = generate(model, padded, attention_mask=mask)
    for index, row in enumerate(rows):
        assert torch.equal(actual[index, 12:], greedy_by_hand(model, row)[0, row.shape[1] :])


@pytest.mark.parametrize("seed", [0, 1])
def test_sampling_with_a_seed(model: LawcatForCausalLM, seed: int) -> None:
    tokens = random_tokens(2, 12)
    options = {"do_sample": True, "top_k": 20, "temperature": 0.8, "num_return_sequences": 2}
    torch.manual_seed(seed)
    actual = generate(model, tokens, **options)
    torch.manual_seed(seed)
    expected = generate(model, tokens, use_cache=False, **options)
    assert actual.shape == (4, 12 + NEW_TOKENS)
    assert torch.equal(actual, expected)


def test_beam_search(model: LawcatForCausalLM) -> None:
    padded, mask, _ = left_pad(random_tokens(2, 12), [0, 4])
    options = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2}
    actual = generate(model, padded, **options)
    assert torch.equal(actual, generate(model, padded, use_cache=False, **options))
    assert actual.shape == (4, 16 + NEW_TOKENS)


def test_beam_sampling(model: LawcatForCausalLM) -> None:
    tokens = random_tokens(2, 12)
    torch.manual_seed(0)
    actual = generate(model, tokens, num_beams=3, do_sample=True)
    torch.manual_seed(0)
    assert torch.equal(actual, generate(model, tokens, num_beams=3, do_sample=True, use_cache=False))


@pytest.mark.parametrize("chunk", [1, 3, 5, 12, 50])
def test_chunked_prefill(model: LawcatForCausalLM, chunk: int) -> None:
    padded, mask, _ = left_pad(random_tokens(2, 12), [0, 4])
    expected = generate(model, padded, attention_mask=mask)
    actual = generate(model, padded, attention_mask=mask, prefill_chunk_size=chunk)
    assert torch.equal(actual, expected)


def test_inputs_embeds(model: LawcatForCausalLM) -> None:
    tokens = random_tokens(2, 12)
    embeds = model.get_input_embeddings()(tokens).detach()
    expected = generate(model, tokens)
    # Without tokens only the new ones come back.
    actual = generate(model, inputs_embeds=embeds, attention_mask=torch.ones_like(tokens))
    assert torch.equal(actual, expected[:, 12:])
    assert torch.equal(generate(model, tokens, inputs_embeds=embeds), expected)


def test_several_turns_with_the_returned_cache(model: LawcatForCausalLM) -> None:
    """The cache goes back in with the whole conversation; only what is new is read."""
    conversation, cache = random_tokens(2, 7), None
    for turn in range(3):
        output = generate(model, conversation, past_key_values=cache, return_dict_in_generate=True)
        assert torch.equal(output.sequences, greedy_by_hand(model, conversation)), f"turn {turn}"
        cache = output.past_key_values
        assert isinstance(cache, LawcatCache)
        # The last token was chosen and not read yet.
        assert cache.get_seq_length() == output.sequences.shape[1] - 1
        conversation = torch.cat([output.sequences, random_tokens(2, 4 + turn)], dim=1)


def test_several_turns_of_a_left_padded_batch(model: LawcatForCausalLM) -> None:
    conversation, cache = random_tokens(2, 9), None
    mask = torch.ones_like(conversation)
    conversation[1, :5] = mask[1, :5] = 0
    for _ in range(2):
        options = {"attention_mask": mask, "return_dict_in_generate": True}
        output = generate(model, conversation, past_key_values=cache, **options)
        expected = generate(model, conversation, attention_mask=mask, use_cache=False)
        assert torch.equal(output.sequences, expected)
        cache = output.past_key_values
        conversation = torch.cat([output.sequences, random_tokens(2, 4)], dim=1)
        mask = torch.cat(
            [mask, torch.ones(2, conversation.shape[1] - mask.shape[1], dtype=torch.long)], dim=1
        )


def test_a_prompt_that_is_read_once_and_continued_in_several_ways(model: LawcatForCausalLM) -> None:
    prompt = random_tokens(1, 10)
    cache = model.new_cache()
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    for seed in range(3):
        torch.manual_seed(seed)
        conversation = torch.cat([prompt, random_tokens(1, 3)], dim=1)
        actual = generate(model, conversation, past_key_values=cache.fork())
        assert torch.equal(actual, greedy_by_hand(model, conversation))
    assert cache.get_seq_length() == 10


def test_streaming(model: LawcatForCausalLM) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.pieces: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.pieces.append(value.view(-1))

        def end(self) -> None:
            self.is_ended = True

    streamer = Streamer()
    tokens = random_tokens(1, 6)
    output = generate(model, tokens, streamer=streamer)
    assert torch.equal(torch.cat(streamer.pieces), output[0])
    assert streamer.is_ended


def test_scores_and_hidden_states(model: LawcatForCausalLM) -> None:
    tokens = random_tokens(1, 6)
    output = generate(
        model, tokens, return_dict_in_generate=True, output_logits=True, output_hidden_states=True
    )
    with torch.no_grad():
        logits = model(output.sequences).logits
    for step, actual in enumerate(output.logits):
        assert_near(actual, logits[:, 5 + step], 1e-6)
    assert len(output.hidden_states) == NEW_TOKENS


def test_the_end_of_text_ends_a_row(model: LawcatForCausalLM) -> None:
    tokens = random_tokens(2, 6)
    expected = greedy_by_hand(model, tokens)
    end = int(expected[0, 6 + 3])
    output = generate(model, tokens, eos_token_id=end, pad_token_id=0)
    for row in range(2):
        new = expected[row, 6:]
        stop = int((new == end).nonzero()[0]) + 1 if (new == end).any() else NEW_TOKENS
        assert torch.equal(output[row, 6 : 6 + stop], new[:stop])
        assert not output[row, 6 + stop :].any()


@pytest.mark.parametrize("name", ["paper", "hybrid"])
@pytest.mark.parametrize("make", [lambda config: DynamicCache(), lambda config: DynamicCache(config=config)])
def test_a_dynamic_cache_is_refused_in_our_words(name: str, make) -> None:
    model = model_of(VARIANTS[name])
    tokens = random_tokens(1, 4)
    message = r"past_key_values is a DynamicCache, .* Pass model\.new_cache\(\)"
    with pytest.raises(ValueError, match=message):
        model(tokens, past_key_values=make(model.config))
    with pytest.raises(ValueError, match=message):
        generate(model, tokens, past_key_values=make(model.config))


def test_a_static_cache_is_refused_in_our_words() -> None:
    model = model_of(VARIANTS["all softmax"])
    with pytest.raises(ValueError, match="past_key_values is a StaticCache"):
        model(random_tokens(1, 4), past_key_values=StaticCache(config=model.config, max_cache_len=20))


def test_a_cache_implementation_has_no_effect() -> None:
    model = model_of(VARIANTS["hybrid"])
    tokens = random_tokens(1, 4)
    for implementation in ("dynamic", "static", "offloaded"):
        actual = generate(model, tokens, cache_implementation=implementation)
        assert torch.equal(actual, greedy_by_hand(model, tokens))


def test_assisted_generation_is_refused() -> None:
    model = model_of(VARIANTS["paper"])
    tokens = random_tokens(1, 4)
    with pytest.raises(ValueError, match="not supported with stateful models, such as LawcatForCausalLM"):
        generate(model, tokens, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="stateful models"):
        generate(model, tokens, assistant_model=model)


def test_assisting_another_model_is_refused() -> None:
    assistant = model_of(VARIANTS["paper"], torch.float32)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            eos_token_id=None,
        )
    )
    tokens = random_tokens(1, 4)
    with pytest.raises(ValueError, match="cannot be taken back to an earlier token"):
        llama.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            assistant_model=assistant,
            max_new_tokens=20,
            do_sample=False,
        )


def test_in_bfloat16() -> None:
    """Rounding may choose another token than without cache, so only the first one is compared."""
    model = model_of(VARIANTS["paper"], torch.bfloat16)
    tokens = random_tokens(2, 12)
    output = generate(model, tokens, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        assert torch.equal(output.logits[0], model(tokens).logits[:, -1].float())
    assert output.past_key_values.layers[0].recurrent.dtype == torch.float32
