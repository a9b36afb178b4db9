"""The operator's benchmark: what is timed is checked first, and whoever cannot run says why."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from comparison import assert_near
from lawcat.bench import operators
from lawcat.bench.mixers import (
    Mixer,
    MixerInputs,
    linear_reference,
    mixer_inputs,
    mixers,
    random_context,
    softmax_reference,
    step_by_torch,
)
from lawcat.bench.shapes import MixerShape, shape_names, teacher_config
from lawcat.errors import ConfigurationError
from lawcat.model.attention import LawcatAttention
from lawcat.ops import backend, backend_names
from lawcat.ops.triton import support
from small_models import make_config

CPU = torch.device("cpu")
SHAPE = MixerShape("small", num_heads=4, num_kv_heads=2, head_dim=8, feature_dim=8)


@pytest.fixture(autouse=True)
def _short_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_CHECK_TOKENS", 37)


def inputs(shape: MixerShape = SHAPE, tokens: int = 21, dtype: torch.dtype = torch.float64) -> MixerInputs:
    return mixer_inputs(shape, batch=2, tokens=tokens, dtype=dtype, device=CPU)


@pytest.mark.parametrize("state_heads", ["query", "kv"])
def test_the_reference_is_what_the_model_computes(state_heads: str) -> None:
    """Against the model's attention, its gate giving the logits that the benchmark takes as they are."""
    config = make_config(state_heads=state_heads)
    attention = LawcatAttention(config, 0).double()
    given = inputs(MixerShape.of("model", config))
    with torch.no_grad():
        attention.q_conv.weight.copy_(given.q_conv)
        attention.k_conv.weight.copy_(given.k_conv)
        attention.feature_map.weight.copy_(given.feature_weight)
    gate = attention.decay_gate
    gate.reduce.data, gate.bias.data = torch.eye(16, dtype=torch.float64), torch.zeros(16).double()
    gate.expand.data = torch.eye(16, dtype=torch.float64)
    x = given.gate_logits.flatten(2)
    with torch.no_grad():
        expected = attention.linear_attention(x, given.q, given.k, given.v)
        assert_near(linear_reference(given), expected, 1e-12)


def test_softmax_reference() -> None:
    given = inputs()
    q, k, v = (t.transpose(1, 2) for t in (given.q, given.k, given.v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_near(softmax_reference(given), expected.transpose(1, 2), 1e-12)


@pytest.mark.parametrize(
    "shape", [SHAPE, replace(SHAPE, state_heads="kv"), replace(SHAPE, conv_kernel_size=None)]
)
def test_a_step_continues_the_context(shape: MixerShape) -> None:
    given = inputs(shape, tokens=1)
    context = random_context(given, 7)
    assert_near(step_by_torch(given, context)(), linear_reference(given, context), 1e-12)
    one_of_many = random_context(given, 7, seed=5)
    assert not torch.equal(one_of_many.state, context.state)


def measure(**options: object) -> list:
    return operators.measure(
        SHAPE, lengths=[16, 40], device=CPU, dtype=torch.float32, seconds=0.005, **options
    )


def test_records() -> None:
    seen: list[tuple[int, int]] = []
    records = measure(batch=2, decode_batch=3, progress=lambda title, done, total: seen.append((done, total)))
    names = {mixer.name for mixer in mixers()}
    assert len(records) == 3 * 2 * len(names)
    assert seen == [(i, 9) for i in range(1, 10)]
    ran = [record for record in records if record.median_s is not None]
    assert {record.contender for record in ran} >= {"lawcat (torch)", "softmax attention (torch SDPA)"}
    for record in ran:
        is_decode = record.measurement == "operator decode"
        assert record.batch == (3 if is_decode else 2)
        done = record.batch * (1 if is_decode else record.tokens)
        assert record.tokens_per_s == pytest.approx(done / record.median_s)
        assert record.error < 1e-5
        assert record.reason is None
        # Of 3 sequences: 4 heads' states of 8 x 9, 3 inputs of 2 x 4 heads; keys and values of 2 heads.
        of_ours, of_softmax = 3 * 4 * (4 * 8 * 9 + 3 * 2 * 32), 3 * 4 * 2 * 2 * 8 * record.tokens
        expected = of_ours if record.is_ours else of_softmax
        assert record.state_bytes == (expected if is_decode else None)
        assert record.backend == ("torch" if record.contender == "lawcat (torch)" else record.backend)
    absent = {record.contender: record.reason for record in records if record.median_s is None}
    assert absent["FlashAttention-2 (torch SDPA)"] == "runs on a GPU only"


def contender(forward, kind: str = "linear", backend: str | None = None) -> Mixer:
    return Mixer("mine", kind, True, forward, lambda device, dtype: None, backend)


def only(monkeypatch: pytest.MonkeyPatch, mixer: Mixer) -> None:
    monkeypatch.setattr(operators, "mixers", lambda backends: [mixer])


def test_a_wrong_contender_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, contender(lambda given: 1.01 * linear_reference(given)))
    for record in measure(measurements=["forward"]):
        assert record.median_s is None
        assert record.reason == "wrong: relative error of output 0.01, allowed 0.001"
        assert record.error == pytest.approx(0.01, rel=1e-3)


def test_a_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, contender(lambda given: linear_reference(given) * torch.nan))
    assert {record.reason for record in measure(measurements=["forward"])} == {
        "wrong: relative error of output inf, allowed 0.001"
    }


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 1.1 * gradient


def test_a_wrong_gradient_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(given: MixerInputs) -> Tensor:
        return linear_reference(replace(given, v=_WrongGradient.apply(given.v)))

    only(monkeypatch, contender(forward))
    records = measure(measurements=["forward", "forward and backward"])
    assert [record.median_s is not None for record in records] == [True, True, False, False]
    assert records[-1].reason.startswith("wrong: relative error of gradient of v 0.1")


def test_a_form_that_falls_back_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the second time, when the warning is not repeated."""

    def forward(given: MixerInputs) -> Tensor:
        own = next(mixer for mixer in mixers(("auto",)) if mixer.is_ours)
        return own.forward(given.map(Tensor.double)).float()

    monkeypatch.setattr(backend, "_choose", lambda *_, **__: ("triton", None))  # as "auto" on a GPU
    monkeypatch.setattr(backend, "_fallbacks", {})
    monkeypatch.setattr(support, "_cannot_run_on", lambda device: None)
    only(monkeypatch, contender(forward, backend="triton"))
    why = "q is torch.float64; the kernels take bfloat16, float16 and float32"
    with pytest.warns(UserWarning, match=f"lawcat's kernels are not used: {why}"):
        first = measure(measurements=["forward"])
    second = measure(measurements=["forward"])
    assert {record.reason for record in first + second} == {f"torch runs, not triton: {why}"}
    only(monkeypatch, contender(forward, backend="torch"))
    assert {record.reason for record in measure(measurements=["forward"])} == {None}


def test_one_without_a_form_for_one_token_and_one_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(given: MixerInputs) -> Tensor:
        raise NotImplementedError("not for these widths")

    only(monkeypatch, contender(forward))
    reasons = [record.reason for record in measure()]
    assert reasons[0] == "NotImplementedError: not for these widths"
    assert reasons[-1] == "has no form for one token here"


def test_mistakes() -> None:
    with pytest.raises(ConfigurationError, match="CUDA graphs need a GPU"):
        measure(cuda_graphs=True)
    with pytest.raises(ConfigurationError, match="at least 1"):
        operators.measure(SHAPE, lengths=[0], device="cpu", dtype=torch.float32)


def test_shapes() -> None:
    assert MixerShape.of("x", make_config(use_conv=False)).conv_kernel_size is None
    for name in shape_names():
        config = teacher_config(name)
        assert config.num_attention_heads % config.num_key_value_heads == 0
    with pytest.raises(ConfigurationError, match=r"Did you mean 'llama-3\.2-1b'\?"):
        teacher_config("llama-3.2-1")


@pytest.mark.parametrize("is_interpreted", [False, True])
def test_every_backend_is_a_contender(is_interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the definition, and for kernels that an interpreter would run."""
    monkeypatch.setenv("TRITON_INTERPRET", "1" if is_interpreted else "0")
    names = [mixer.name for mixer in mixers() if mixer.is_ours]
    left_out = ("auto", "reference", "triton") if is_interpreted else ("auto", "reference")
    assert names == [f"lawcat ({name})" for name in backend_names() if name not in left_out]
    assert [mixer.name for mixer in mixers(("reference",)) if mixer.is_ours] == ["lawcat (reference)"]


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_our_mixer_keeps_nothing_for_a_next_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention beside it does not copy its cache either."""

    def copies(*arguments: object, **options: object) -> Tensor:
        raise AssertionError("copied")

    monkeypatch.setattr("lawcat.ops.fused.last_inputs", copies)
    (mixer,) = (mixer for mixer in mixers((name,)) if mixer.is_ours)
    assert_near(mixer.forward(inputs()), linear_reference(inputs()), 1e-12)


def test_the_package_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called with tensors laid out as it takes them, [B, T, heads, D], kv heads not repeated."""
    mixer = next(mixer for mixer in mixers() if mixer.name == "flash-attn")
    gpu = torch.device("cuda")
    monkeypatch.setattr("lawcat.bench.mixers.util.find_spec", lambda name: None)
    assert mixer.unavailable_because(gpu, torch.bfloat16) == "the package 'flash_attn' is not installed"
    monkeypatch.setattr("lawcat.bench.mixers.util.find_spec", lambda name: name)
    assert mixer.unavailable_because(gpu, torch.bfloat16) is None
    assert mixer.unavailable_because(gpu, torch.float32) == "runs in bfloat16 and float16 only"
    assert mixer.unavailable_because(CPU, torch.bfloat16) == "runs on a GPU only"

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        assert q.shape[1] == 2 * k.shape[1]
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)

    package = types.ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    assert_near(mixer.forward(inputs()), softmax_reference(inputs()), 1e-12)


def test_onnx_runtime() -> None:
    pytest.importorskip("onnxruntime")
    given = inputs(dtype=torch.float32)
    mixer = next(mixer for mixer in mixers() if mixer.name == "softmax attention (ONNX Runtime)")
    assert mixer.unavailable_because(CPU, torch.float32) is None
    assert_near(mixer.forward(given), softmax_reference(given.map(Tensor.double)), 1e-5)
    assert mixer.unavailable_because(CPU, torch.bfloat16) == "runs in float32 only"
    records = measure(measurements=["forward and backward"])
    assert {r.reason for r in records if r.contender == mixer.name} == {"has no gradient"}
