"""Decoding by a graph: what is replayed, and what is not; on a CPU by an object that runs the work again."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from comparison import assert_near
from kernel_device import DEVICE, HAS_GPU, on_gpu
from lawcat import LawcatForCausalLM
from lawcat.evaluation import answering
from lawcat.evaluation.answering import answer_prompts
from lawcat.inference import decode_graph, generation
from lawcat.inference.decode_graph import CudaGraph, decoding_by_graph
from lawcat.inference.generation import stream_text
from lawcat.ops import use_backend
from small_models import make_model
from tiny_teachers import NUM_WORDS, tiny_tokenizer

# As small as it goes: the interpreter takes milliseconds for every operation.
SMALL = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "state_heads": "kv",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "vocab_size": NUM_WORDS,
}


class Repetition:
    """A graph that runs the function again; counts."""

    captured = replayed = 0

    def __init__(self, device: torch.device) -> None:
        assert device.type == DEVICE

    def warm_up(self, function: Callable[[], Tensor]) -> None:
        function()

    def capture(self, function: Callable[[], Tensor]) -> None:
        type(self).captured += 1
        self.function = function

    def replay(self) -> Tensor:
        type(self).replayed += 1
        return self.function()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    Repetition.captured = Repetition.replayed = 0
    decode_graph._decoders.clear()
    yield
    decode_graph._decoders.clear()


@pytest.fixture(
    params=[{}, {"linear_rope": True, "use_qk_norm": True, "attention_bias": True}],
    ids=["paper", "rope, norms and biases"],
)
def model(request: pytest.FixtureRequest) -> LawcatForCausalLM:
    return make_model(**(SMALL | request.param)).to(DEVICE)


@pytest.fixture
def paper() -> LawcatForCausalLM:
    return make_model(**SMALL).to(DEVICE)


repeated = functools.partial(decoding_by_graph, make_graph=Repetition)


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(3, NUM_WORDS, shape).to(DEVICE)


@torch.no_grad()
def read(model: LawcatForCausalLM, *shape: int):
    with use_backend("torch"):
        return model(random_tokens(*shape), use_cache=True).past_key_values


@torch.no_grad()
def steps(model: LawcatForCausalLM, cache, tokens: Tensor, backend: str = "triton") -> Tensor:
    with use_backend(backend):
        return torch.cat([model(t, past_key_values=cache).logits for t in tokens.split(1, dim=1)], dim=1)


def test_steps_are_replays(model: LawcatForCausalLM) -> None:
    cache, tokens = read(model, 3, 5), random_tokens(3, 4)
    expected_cache = cache.fork()
    expected = steps(model, expected_cache, tokens, "torch")
    with repeated(model):
        actual = steps(model, cache, tokens)
    assert (Repetition.captured, Repetition.replayed) == (1, 4)
    assert_near(actual, expected, 1e-5, "logits")
    assert cache.get_seq_length() == 9
    for name, tensor in expected_cache.tensors().items():
        assert_near(cache.tensors()[name], tensor, 1e-5, name)
    assert "forward" not in vars(model)


def test_two_caches_by_turns_and_a_fork(paper: LawcatForCausalLM) -> None:
    first, second, tokens = read(paper, 2, 5), read(paper, 2, 7), random_tokens(2, 4)
    expected = [steps(paper, cache.fork(), tokens, "torch") for cache in (first, second)]
    with repeated(paper):
        for place in range(2):
            token = tokens[:, place : place + 1]
            for cache, wanted in zip((first, second), expected, strict=True):
                assert_near(steps(paper, cache, token), wanted[:, place : place + 1], 1e-5)
        fork = second.fork()
        for cache, wanted in ((fork, expected[1]), (second, expected[1]), (first, expected[0])):
            assert_near(steps(paper, cache, tokens[:, 2:]), wanted[:, 2:], 1e-5)
    assert Repetition.captured == 1
    held = [tensor.data_ptr() for cache in (first, second, fork) for tensor in cache.tensors().values()]
    assert len(set(held)) == len(held)


def test_a_graph_is_kept_for_batches_alike(paper: LawcatForCausalLM) -> None:
    tokens = random_tokens(2, 1)
    for _ in range(2):
        cache = read(paper, 2, 5)
        expected = steps(paper, cache.fork(), tokens, "torch")
        with repeated(paper):
            assert_near(steps(paper, cache, tokens), expected, 1e-5)
        after = {name: tensor.clone() for name, tensor in cache.tensors().items()}
        with repeated(paper):
            steps(paper, read(paper, 2, 3), tokens)
        # What was decoded before is left as it was.
        assert all(torch.equal(cache.tensors()[name], tensor) for name, tensor in after.items())
    assert Repetition.captured == 1
    with repeated(paper):
        steps(paper, read(paper, 1, 5), tokens[:1])
    assert Repetition.captured == 2


def test_replaced_weights_are_captured_anew(paper: LawcatForCausalLM) -> None:
    tokens = random_tokens(1, 1)
    with repeated(paper):
        steps(paper, read(paper, 1, 5), tokens)
    head = paper.get_input_embeddings()
    head.weight.data = head.weight.data * 2.0
    cache = read(paper, 1, 5)
    expected = steps(paper, cache.fork(), tokens, "torch")
    with repeated(paper):
        assert_near(steps(paper, cache, tokens), expected, 1e-5)
    assert Repetition.captured == 2


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_p": 0.9}, {"num_beams": 2}], ids=str)
def test_generate(paper: LawcatForCausalLM, options: dict[str, object]) -> None:
    tokens = random_tokens(2, 5)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False} | options
    torch.manual_seed(1)
    with use_backend("torch"):
        expected = paper.generate(tokens, **options)
    torch.manual_seed(1)
    with use_backend("triton"), repeated(paper):
        actual = paper.generate(tokens, **options)
    assert torch.equal(actual, expected)
    assert Repetition.replayed == 3


@torch.no_grad()
def test_a_step_with_padding_is_no_replay(paper: LawcatForCausalLM) -> None:
    tokens = random_tokens(2, 3)
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]], device=DEVICE)
    with use_backend("torch"):
        expected = paper(tokens, attention_mask=mask).logits
    cache = paper.new_cache()
    with use_backend("triton"), repeated(paper):
        for stop in (1, 2, 3):
            logits = paper(tokens[:, stop - 1 : stop], attention_mask=mask[:, :stop], past_key_values=cache)
    assert_near(logits.logits, expected[:, 2:], 1e-5)
    assert Repetition.replayed == 1


@torch.no_grad()
def test_calls_that_a_replay_does_not_answer(paper: LawcatForCausalLM) -> None:
    token = random_tokens(1, 1)
    with use_backend("triton"), repeated(paper):
        cache = read(paper, 1, 4)
        assert paper(token, past_key_values=cache, output_hidden_states=True).hidden_states is not None
        assert isinstance(paper(token, past_key_values=cache, return_dict=False), tuple)
        assert paper(token, labels=token).loss is not None
        embeds = paper.get_input_embeddings()(token)
        paper(inputs_embeds=embeds, past_key_values=cache)
        assert paper(token, past_key_values=cache, use_cache=False).past_key_values is None
        with torch.enable_grad():
            paper(token, past_key_values=cache).logits.sum().backward()
    assert Repetition.replayed == 0
    assert cache.get_seq_length() == 9


def test_a_state_that_is_replaced_cannot_be_captured(paper: LawcatForCausalLM) -> None:
    """As PyTorch's form does: everything goes on as without a graph, and nothing is said."""
    cache, tokens = read(paper, 2, 5), random_tokens(2, 3)
    expected = steps(paper, cache.fork(), tokens, "torch")
    with repeated(paper) as graphs, torch.no_grad(), use_backend("torch"):
        assert not graphs.takes(cache)
        assert torch.equal(steps(paper, cache, tokens, "torch"), expected)
    assert Repetition.replayed == Repetition.captured == 0


def test_a_capture_that_fails(paper: LawcatForCausalLM) -> None:
    class Broken(Repetition):
        def capture(self, function: Callable[[], Tensor]) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    cache, tokens = read(paper, 2, 5), random_tokens(2, 2)
    expected = steps(paper, cache.fork(), tokens, "torch")
    with (
        decoding_by_graph(paper, make_graph=Broken),
        pytest.warns(UserWarning, match="without a CUDA graph: operation not permitted") as caught,
    ):
        assert_near(steps(paper, cache, tokens), expected, 1e-5)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]},
        {"sliding_window": 4},
    ],
    ids=str,
)
def test_models_that_are_left_alone(fields: dict[str, object]) -> None:
    other = make_model(**(SMALL | fields)).to(DEVICE)
    with repeated(other) as graphs:
        assert "forward" not in vars(other)
        assert not graphs.takes(read(other, 1, 3))


def test_hooks_and_lora_are_not_gone_past(paper: LawcatForCausalLM) -> None:
    hooked, with_lora = copy.deepcopy(paper), copy.deepcopy(paper)
    seen = []
    hooked.model.norm.register_forward_hook(lambda *arguments: seen.append(1))
    with_lora.model.lora_A = torch.nn.Linear(2, 2).to(DEVICE)
    for model in (hooked, with_lora):
        with repeated(model):
            assert "forward" not in vars(model)
    with repeated(paper), repeated(paper):  # the inner one finds the outer one
        steps(paper, read(paper, 1, 3), random_tokens(1, 1))
    assert Repetition.replayed == 1
    with torch.autocast(DEVICE, torch.bfloat16), repeated(paper):
        assert "forward" not in vars(paper)


@pytest.mark.skipif(HAS_GPU, reason="there it replays")
def test_on_a_cpu_nothing_is_captured(paper: LawcatForCausalLM) -> None:
    with decoding_by_graph(paper) as graphs:
        assert "forward" not in vars(paper)
        assert not graphs.takes(read(paper, 1, 3))


def test_a_model_does_not_stay_for_its_graph(paper: LawcatForCausalLM) -> None:
    class Forgetful(Repetition):
        """As a real graph, which keeps what was launched and not the function."""

        def capture(self, function: Callable[[], Tensor]) -> None:
            pass

        def replay(self) -> Tensor:
            return torch.zeros(1, 1, NUM_WORDS, device=DEVICE)

    model = copy.deepcopy(paper)
    with decoding_by_graph(model, make_graph=Forgetful):
        steps(model, read(model, 1, 3), random_tokens(1, 1))
    assert len(decode_graph._decoders) == 1
    del model
    assert len(decode_graph._decoders) == 0


def test_answers(paper: LawcatForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left-padded rows, one of which is answered early and stays in the batch."""
    tokenizer = tiny_tokenizer()
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    options = {"max_new_tokens": 5, "is_answered": lambda row, text: row == 1}
    with use_backend("torch"):
        expected = answer_prompts(paper, tokenizer, prompts, **options)
    monkeypatch.setattr(answering, "decoding_by_graph", repeated)
    with use_backend("triton"):
        assert answer_prompts(paper, tokenizer, prompts, **options) == expected
    assert [answer.num_tokens for answer in expected] == [4, 1, 5]  # one ends by itself
    assert (Repetition.captured, Repetition.replayed) == (1, 4)


def test_streamed_text(paper: LawcatForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that `use_backend` reaches the thread which generates."""
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.decode([5, 6, 7])
    options = {"max_new_tokens": 5, "temperature": 0.7, "seed": 3}
    with use_backend("torch"):
        expected = "".join(stream_text(paper, tokenizer, prompt, **options))
    monkeypatch.setattr(generation, "decoding_by_graph", repeated)
    with use_backend("triton"):
        assert "".join(stream_text(paper, tokenizer, prompt, **options)) == expected
    assert expected
    assert Repetition.replayed == 4


@pytest.mark.gpu
@on_gpu
@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_cuda_graphs(batch: int) -> None:
    """300 replays follow what is decoded without, of two prompts after each other."""
    fields = {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}
    model = make_model(**fields, noise=0.02).to(DEVICE)
    for prompt_tokens in (70, 1):
        cache = model(random_tokens(batch, prompt_tokens), use_cache=True).past_key_values
        tokens = random_tokens(batch, 300)
        expected_cache = cache.fork()
        expected = steps(model, expected_cache, tokens)
        with decoding_by_graph(model) as graphs:
            assert graphs.takes(cache)
            actual = steps(model, cache, tokens)
        assert_near(actual, expected, 1e-4, "logits")
        for name, tensor in expected_cache.tensors().items():
            assert_near(cache.tensors()[name], tensor, 1e-4, name)
    (_, decoder) = decode_graph._decoders[model]
    assert isinstance(decoder._graph, CudaGraph)


@pytest.mark.gpu
@on_gpu
def test_generation_by_cuda_graphs(model: LawcatForCausalLM) -> None:
    tokenizer = tiny_tokenizer()
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    text = tokenizer.decode([5, 6, 7])
    with use_backend("torch"):
        expected = answer_prompts(model, tokenizer, prompts, max_new_tokens=20)
        streamed = "".join(stream_text(model, tokenizer, text, max_new_tokens=20))
    assert answer_prompts(model, tokenizer, prompts, max_new_tokens=20) == expected
    assert model in decode_graph._decoders
    assert "".join(stream_text(model, tokenizer, text, max_new_tokens=20)) == streamed
