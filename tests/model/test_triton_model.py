"""The model on the kernels, in Triton's interpreter where there is no GPU, against itself on PyTorch."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
from model_variants import FULL, LINEAR, left_pad, random_tokens
from torch import Tensor

from comparison import assert_near
from kernel_device import DEVICE
from lawcat import LawcatCache, LawcatForCausalLM
from lawcat.convert.initialize import is_new_parameter
from lawcat.distill.attention_transfer import attention_transfer_losses
from lawcat.errors import BackendError
from lawcat.ops import use_backend
from lawcat.ops.triton import decode_step as decode_module
from lawcat.ops.triton import function as function_module
from lawcat.ops.triton.mixer import MixerInputs, MixerOptions
from small_models import in_bfloat16, make_model

# As small as it goes: the interpreter takes milliseconds for every operation.
SMALL = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16, "num_hidden_layers": 1}
VARIANTS: dict[str, dict[str, object]] = {
    "paper": {},
    "two layers": {"num_hidden_layers": 2},
    "state a kv head": {"state_heads": "kv"},
    "no convolution": {"use_conv": False},
    "two taps": {"conv_kernel_size": 2},
    "no normaliser": {"use_normalizer": False},
    "gate a head": {"gate": "head", "num_key_value_heads": 2},
    "no gate": {"gate": "none"},
    "rope": {"linear_rope": True},
    "narrow map": {"feature_dim": 4},
    "hybrid": {"layer_types": [FULL, LINEAR], "num_hidden_layers": 2},
}


@functools.cache
def model_of(name: str = "paper") -> LawcatForCausalLM:
    return make_model(**(SMALL | VARIANTS[name])).to(DEVICE)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each launch of the decoding kernel."""
    rows: list[int] = []
    original = decode_module.decode_step

    def counting(q: Tensor, *arguments: object, **options: object) -> Tensor:
        rows.append(q.shape[0])
        return original(q, *arguments, **options)

    monkeypatch.setattr(decode_module, "decode_step", counting)
    return rows


@pytest.fixture
def no_launch(launches: list[int]) -> Iterator[None]:
    yield
    assert not launches


def tokens_of(*shape: int) -> Tensor:
    return random_tokens(*shape).to(DEVICE)


@torch.no_grad()
def read(model: LawcatForCausalLM, tokens: Tensor, mask: Tensor | None = None) -> LawcatCache:
    with use_backend("torch"):
        return model(tokens, attention_mask=mask, use_cache=True).past_key_values


@torch.no_grad()
def steps(model: LawcatForCausalLM, cache: LawcatCache, tokens: Tensor, backend: str) -> Tensor:
    with use_backend(backend):
        pieces = [model(token, past_key_values=cache).logits for token in tokens.split(1, dim=1)]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_are_those_of_pytorch_and_stay_in_place(name: str, launches: list[int]) -> None:
    model = model_of(name)
    cache, tokens = read(model, tokens_of(3, 6)), tokens_of(3, 3)
    linear = [layer for layer in cache.layers if hasattr(layer, "recurrent")]
    before = [dict(layer.tensors()) for layer in linear]
    expected_cache = cache.fork()
    expected = steps(model, expected_cache, tokens, "torch")
    assert not launches
    assert_near(steps(model, cache, tokens, "triton"), expected, 1e-5, "logits")
    assert launches == [3] * 3 * len(linear)
    for layer, tensors in zip(linear, before, strict=True):
        assert all(layer.tensors()[what] is tensor for what, tensor in tensors.items())
        assert layer.get_seq_length() == 9
    for what, tensor in expected_cache.tensors().items():
        assert_near(cache.tensors()[what], tensor, 1e-5, what)


def test_prompt_steps_and_pieces_on_the_kernels() -> None:
    model = model_of()
    tokens = tokens_of(2, 12)
    with torch.no_grad(), use_backend("torch"):
        expected = model(tokens).logits
    pieces, cache = [], model.new_cache()
    with torch.no_grad(), use_backend("triton"):
        for start, stop in itertools.pairwise([0, 1, 6, 7, 8, 12]):
            pieces.append(model(tokens[:, start:stop], past_key_values=cache).logits)
    assert_near(torch.cat(pieces, dim=1), expected, 1e-5)


@torch.no_grad()
def test_generate_on_the_kernels(launches: list[int]) -> None:
    """A left-padded batch of three; that each step comes with a mask of ones does not keep the kernel off."""
    model = model_of()
    padded, mask, _ = left_pad(random_tokens(3, 5), [0, 3, 1])
    options = {"attention_mask": mask.to(DEVICE), "max_new_tokens": 4, "do_sample": False}
    with use_backend("torch"):
        expected = model.generate(padded.to(DEVICE), **options)
    assert not launches
    with use_backend("triton"):
        actual = model.generate(padded.to(DEVICE), **options)
    assert torch.equal(actual, expected)
    assert launches == [3, 3, 3]


@torch.no_grad()
def test_beam_search_on_the_kernels(launches: list[int]) -> None:
    model = model_of("state a kv head")
    tokens = tokens_of(1, 5)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    options["attention_mask"] = torch.ones_like(tokens)
    with use_backend("torch"):
        expected = model.generate(tokens, **options)
    with use_backend("triton"):
        actual = model.generate(tokens, **options)
    assert torch.equal(actual, expected)
    assert launches == [3, 3, 3, 3]


def test_a_fork_is_not_written_to() -> None:
    model = model_of()
    cache, first, second = read(model, tokens_of(2, 6)), tokens_of(2, 2), tokens_of(2, 2)
    fork = cache.fork()
    before = {what: tensor.clone() for what, tensor in cache.tensors().items()}
    steps(model, fork, first, "triton")
    assert all(torch.equal(cache.tensors()[what], tensor) for what, tensor in before.items())
    again = steps(model, cache.fork(), second, "torch")
    assert_near(steps(model, cache, second, "triton"), again, 1e-5)


def test_rows_that_leave_and_move() -> None:
    model = model_of()
    cache, tokens = read(model, tokens_of(3, 6)), tokens_of(3, 3)
    expected = steps(model, cache.fork(), tokens, "torch")
    steps(model, cache, tokens[:, :1], "triton")
    rows = torch.tensor([2, 0], device=DEVICE)
    cache.reorder_cache(rows)
    assert_near(steps(model, cache, tokens[rows, 1:2], "triton"), expected[rows, 1:2], 1e-5)
    cache.batch_select_indices(torch.tensor([0], device=DEVICE))
    assert_near(steps(model, cache, tokens[rows[:1], 2:], "triton"), expected[rows[:1], 2:], 1e-5)


def test_a_state_of_any_layout() -> None:
    model = model_of()
    cache, tokens = read(model, tokens_of(2, 6)), tokens_of(2, 1)
    expected = steps(model, cache.fork(), tokens, "torch")
    layer = cache.layers[0]
    layer.recurrent = layer.recurrent.transpose(2, 3).contiguous().transpose(2, 3)
    layer.q_inputs = layer.q_inputs.transpose(1, 2).contiguous().transpose(1, 2)
    assert_near(steps(model, cache, tokens, "triton"), expected, 1e-5)


@torch.no_grad()
def test_a_step_of_padding_in_one_row(launches: list[int]) -> None:
    model = model_of()
    tokens = tokens_of(2, 3)
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]], device=DEVICE)
    with use_backend("torch"):
        expected = model(tokens, attention_mask=mask, use_cache=True)
    cache, pieces = model.new_cache(), []
    with use_backend("triton"):
        for stop in (1, 2, 3):
            output = model(tokens[:, stop - 1 : stop], attention_mask=mask[:, :stop], past_key_values=cache)
            pieces.append(output.logits)
    actual = torch.cat(pieces, dim=1)
    assert_near(actual[0], expected.logits[0], 1e-5)
    assert_near(actual[1, 2], expected.logits[1, 2], 1e-5)
    assert launches == [2]  # the last token alone


@pytest.mark.usefixtures("no_launch")
def test_with_a_gradient_nothing_is_written_over() -> None:
    model = copy.deepcopy(model_of())
    cache = read(model, tokens_of(1, 4))
    before = cache.tensors()
    copies = {what: tensor.clone() for what, tensor in before.items()}
    with use_backend("triton"):
        model(tokens_of(1, 1), past_key_values=cache).logits.sum().backward()
    assert model.attention_modules()[0].v_proj.weight.grad.any()
    assert all(torch.equal(before[what], copied) for what, copied in copies.items())


def test_a_state_that_a_gradient_may_need_is_not_written_over(launches: list[int]) -> None:
    model = copy.deepcopy(model_of())
    with use_backend("torch"):
        cache = model(tokens_of(1, 4), use_cache=True).past_key_values
    prompt = cache.layers[0].recurrent
    before = prompt.clone()
    steps(model, cache, tokens_of(1, 2), "triton")
    assert launches == [1]  # the second token's: the first one's state is nobody's
    assert torch.equal(prompt, before)
    prompt.square().sum().backward()
    assert model.attention_modules()[0].v_proj.weight.grad.isfinite().all()


@pytest.mark.usefixtures("no_launch")
def test_what_the_kernel_does_not_do() -> None:
    window = make_model(**(SMALL | {"sliding_window": 3})).to(DEVICE)
    untied = make_model(**(SMALL | {"feature_map": "untied"})).to(DEVICE)
    for model in (window, untied):
        cache, tokens = read(model, tokens_of(1, 4)), tokens_of(1, 2)
        expected = steps(model, cache.fork(), tokens, "torch")
        assert torch.equal(steps(model, cache, tokens, "triton"), expected)
    double = copy.deepcopy(model_of()).double()
    cache = read(double, tokens_of(1, 4))
    with pytest.raises(BackendError, match=r"use_backend='triton' cannot run: q is torch\.float64"):
        steps(double, cache, tokens_of(1, 1), "triton")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_on_the_kernels(checkpointing: bool) -> None:
    """Of the loss with respect to every parameter; stage 2 goes this way."""
    tokens = tokens_of(2, 6)
    gradients = {}
    for backend in ("torch", "triton"):
        model = copy.deepcopy(model_of("two layers")).train()
        if checkpointing:
            name = "activation_checkpointing_enable"  # since transformers 5.2x
            enable = getattr(model, name, None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        with use_backend(backend):
            model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients[backend] = {name: p.grad for name, p in model.named_parameters()}
    for name, expected in gradients["torch"].items():
        assert_near(gradients["triton"][name], expected, 1e-4, name)


def test_stage_1_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, of which the kernels get what they are made for: the gate and what trains in float32."""
    tokens = tokens_of(2, 6)
    dtypes: dict[str, torch.dtype] = {}
    original = function_module.run

    def noting(inputs: MixerInputs, options: MixerOptions) -> tuple[Tensor, Tensor]:
        dtypes.update({name: t.dtype for name, t in vars(inputs).items() if isinstance(t, Tensor)})
        return original(inputs, options)

    monkeypatch.setattr(function_module, "run", noting)
    found = {}
    for backend in ("torch", "triton"):
        model = in_bfloat16(model_of()).requires_grad_(False)
        new = [p for n, p in model.named_parameters() if is_new_parameter(n)]
        for parameter in new:
            parameter.requires_grad_(True)
        with use_backend(backend):
            losses = attention_transfer_losses(model, tokens, gradient_scale=1.0)
        found[backend] = [losses, *(parameter.grad for parameter in new)]
    for actual, expected in zip(found["triton"], found["torch"], strict=True):
        assert_near(actual, expected, 3e-2)
    float32 = dict.fromkeys(("gate", "q_taps", "k_taps", "map_weight"), torch.float32)
    assert dtypes == dict.fromkeys("qkv", torch.bfloat16) | float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_decoding_in_bfloat16_on_a_gpu(launches: list[int]) -> None:
    """The kernel is what "auto" takes; both backends against float32."""
    fields = {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}
    exact = make_model(**fields, noise=0.02).to(DEVICE)
    model = in_bfloat16(exact)
    tokens = tokens_of(4, 300)
    with use_backend("torch"):
        expected = exact(tokens).logits[:, 200:]
    cache = model(tokens[:, :200], use_cache=True).past_key_values
    pieces = [model(token, past_key_values=cache).logits for token in tokens[:, 200:].split(1, dim=1)]
    assert launches == [4] * 200
    assert_near(torch.cat(pieces, dim=1).float(), expected, 3e-2)
