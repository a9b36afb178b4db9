"""The kernels against the definition in float64: Triton's interpreter on a CPU, the device on a GPU.

All that they allocate is filled with NaN first.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from attention_cases import DECAYS, GRADIENTS, Case
from attention_cases import answer as operator_answer
from attention_cases import run as run_operator
from kernel_cases import configure, kernels, poison  # noqa: F401
from mixer_cases import MixerCase, answer, definition, run
from torch import Tensor

from comparison import assert_near
from kernel_device import DEVICE, HAS_GPU, on_gpu
from lawcat.errors import BackendError
from lawcat.ops import backend, explain, gated_linear_attention, use_backend
from lawcat.ops.fused import linear_attention_mixer
from lawcat.ops.triton import launch, mixer, support
from lawcat.ops.triton.configurations import choose_configuration
from lawcat.ops.triton.launch import Launch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
GRADIENT_TOLERANCE = {torch.float32: 5e-5, torch.float16: 5e-2, torch.bfloat16: 5e-2}


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    configure(monkeypatch, segment=getattr(request, "param", 16))


def check(case: MixerCase, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    results = run(kernels, case, dtype, DEVICE)
    expected = answer(case, dtype)
    assert results.keys() == expected.keys()
    for what, actual in results.items():
        tolerance = (GRADIENT_TOLERANCE if what.startswith("gradient") else TOLERANCE)[dtype]
        assert_near(actual.cpu(), expected[what], tolerance, what)
    return results


def check_forward(case: MixerCase, tolerance: float = TOLERANCE[torch.float32]) -> None:
    tensors = case.tensors(torch.float32, DEVICE)
    with torch.no_grad():
        results = kernels(**tensors, **case.options())
    for what, actual in zip(("output", "state"), results, strict=False):
        assert_near(actual.cpu(), answer(case)[what], tolerance, what)


@pytest.mark.parametrize("tokens", [1, 3, 4, 63, 64, 65])
def test_lengths(tokens: int) -> None:
    check(MixerCase(tokens))


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("short_segments", [32], indirect=True)
@pytest.mark.parametrize("tokens", [32, 65] if HAS_GPU else [33])
def test_borders(tokens: int) -> None:
    check(MixerCase(tokens))


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize(
    "fields",
    [
        {"heads": 4, "kv_heads": 1, "state_heads": 2, "taps": 3},
        {"heads": 2, "kv_heads": 1, "state_heads": 1, "normalize": False},
        {"kv_heads": 2, "gate_width": 1},
        {"gate_width": 1, "heads": 4, "state_heads": 2, "taps": None},
        {"width": 12, "feature_dim": 20, "has_state": False},
        {"width": 6, "feature_dim": 2, "gate_is_logit": False},
        {"batch": 2, "padding": 5},
        {"batch": 2, "padding": 19, "has_state": False, "taps": None},
        {"taps": 1, "has_state": False},
        {"taps": 8},
        {"taps": 6, "batch": 2, "padding": 3},
    ],
    ids=str,
)
def test_variants(fields: dict[str, Any]) -> None:
    check(MixerCase(20, **({"taps": 2} | fields)))


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize(("heads", "kv_heads", "state_heads"), [(4, 1, 4), (4, 2, 2), (8, 1, 1)])
def test_heads(heads: int, kv_heads: int, state_heads: int) -> None:
    check_forward(MixerCase(17, heads=heads, kv_heads=kv_heads, state_heads=state_heads, taps=2))


# The designs of the forward.
DESIGNS: dict[str, dict[str, Any]] = {
    "fused": {"is_prepared": False},
    "prepared": {"is_prepared": True, "scan_with_queries": False},
    "scan with queries": {"is_prepared": True, "scan_with_queries": True},
}
PREPARED = ["prepared", "scan with queries"]


@pytest.mark.parametrize("design", PREPARED)
@pytest.mark.parametrize(
    ("fields", "configuration"),
    [
        ({"heads": 4, "kv_heads": 1, "state_heads": 2, "width": 32}, {"segment": 32, "value_block": 16}),
        (
            {"heads": 4, "kv_heads": 1, "state_heads": 4},
            {"feature_chunks": 1, "feature_taps": 1, "query_heads": 2, "key_heads": 4},
        ),
        (
            {"heads": 4, "kv_heads": 1, "state_heads": 4, "has_state": False},
            {"feature_taps": 2, "query_heads": 4, "key_heads": 4},
        ),
        ({"width": 12, "feature_dim": 20, "has_state": False, "normalize": False}, {"feature_taps": 2}),
        ({"gate_scale": 300.0, "min_log_decay": -10.0, "gate_width": 1}, {"chunk": 32, "segment": 64}),
        ({"gate_scale": 20.0, "min_log_decay": -40.0, "gate_is_logit": False}, {}),
        ({"gate_scale": 100.0, "min_log_decay": -2.5}, {"chunk": 64, "segment": 64}),
        ({"batch": 2, "padding": 19, "taps": None}, {"segment": 32}),
        ({"batch": 2, "padding": 7}, {"feature_taps": 0}),
        ({"boundaries": (0, 1, 3, 20, 37)}, {"chunk": 32, "segment": 32}),
        ({"boundaries": (0, 2, 37), "width": 12, "feature_dim": 20}, {"chunk": 16, "segment": 32}),
        ({"gate_scale": 3.0}, {"chunk": 16, "segment": 48}),
        ({"batch": 2, "padding": 7, "has_state": False}, {"chunk": 16, "segment": 32}),
    ],
    ids=str,
)
def test_features_made_once(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], configuration: dict[str, Any], design: str
) -> None:
    configure(monkeypatch, **DESIGNS[design], **configuration)
    # Decays are rounded before they are multiplied with features; no table entry takes this form for float32.
    check_forward(MixerCase(37, **({"taps": 2} | fields)), tolerance=2e-5)


@pytest.mark.parametrize("design", PREPARED)
def test_gradients_after_features_made_once(monkeypatch: pytest.MonkeyPatch, design: str) -> None:
    configure(monkeypatch, **DESIGNS[design])
    check(MixerCase(20, taps=2))


@pytest.mark.parametrize("is_logit", [True, False])
@pytest.mark.parametrize("design", DESIGNS)
def test_nan_shows(monkeypatch: pytest.MonkeyPatch, design: str, is_logit: bool) -> None:
    """A NaN in a gate reaches all outputs of its heads from its token on, and its gradient; no others."""
    configure(monkeypatch, **DESIGNS[design], segment=16)
    case = MixerCase(40, heads=4, kv_heads=2, state_heads=4, taps=2, gate_is_logit=is_logit)
    tensors = case.tensors(torch.float32, DEVICE)
    with torch.no_grad():
        tensors["gate"][0, 20, 0, 1] = torch.nan
    output = kernels(**tensors, **case.options())[0]
    assert output[0, 20:, :2].isnan().all()
    assert output[:, :, 2:].isfinite().all()
    assert output[0, :16].isfinite().all()
    (gradient,) = torch.autograd.grad(output[:, :, :2].sum(), tensors["gate"])
    assert gradient[:, :, 0].isnan().any()
    assert gradient[:, :, 1].isfinite().all()


@pytest.mark.parametrize("design", DESIGNS)
@torch.no_grad()
def test_one_segment_that_decays_too_much(monkeypatch: pytest.MonkeyPatch, design: str) -> None:
    configure(monkeypatch, **DESIGNS[design], segment=32)
    tensors = {name: t.detach() for name, t in MixerCase(70, taps=2).tensors().items()}
    tensors["gate"][:, 35:60, :, ::3] = -300.0
    expected = definition(**tensors, min_log_decay=-10.0)
    moved = {name: t.float().to(DEVICE) for name, t in tensors.items()}
    for actual, wanted, what in zip(kernels(**moved, min_log_decay=-10.0), expected, "oSqk", strict=True):
        assert_near(actual.cpu(), wanted, 1e-5, what)


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize(
    "fields",
    [
        {"gate_scale": 300.0, "min_log_decay": -10.0},
        {"gate_scale": 100.0, "min_log_decay": -5.0, "heads": 4, "state_heads": 2},
        {"gate_scale": 20.0, "min_log_decay": -40.0, "gate_is_logit": False},
        {"gate_scale": 0.0, "gate_is_logit": False},
    ],
    ids=str,
)
def test_decays(fields: dict[str, Any]) -> None:
    check(MixerCase(20, **({"taps": 2} | fields)))


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize(
    ("boundaries", "fields"),
    [((0, 1, 3, 20), {}), ((0, 16, 20), {"has_state": False, "heads": 4})],
    ids=str,
)
def test_packed_sequences(boundaries: tuple[int, ...], fields: dict[str, Any]) -> None:
    check(MixerCase(20, boundaries=boundaries, **fields))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_inputs_of_the_convolutions_are_not_kept_unasked(backend: str) -> None:
    case = MixerCase(5)
    tensors = case.tensors(torch.float32, DEVICE)
    output, _, *inputs = linear_attention_mixer(**tensors, keep_inputs=False, backend=backend)
    assert inputs == [None, None]
    assert_near(output.cpu(), answer(case)["output"], TOLERANCE[torch.float32], "output")


@pytest.mark.usefixtures("short_segments")
def test_a_sequence_in_pieces() -> None:
    whole = MixerCase(24)
    tensors = {name: t.detach().float().to(DEVICE) for name, t in whole.tensors().items()}
    carried = {name: tensors.pop(name) for name in ("initial_state", "q_inputs", "k_inputs")}
    by_token = {name: tensors.pop(name) for name in ("q", "k", "v", "gate")}
    outputs = []
    for piece in zip(*(t.split([1, 2, 17, 4], dim=1) for t in by_token.values()), strict=True):
        output, *after = kernels(**dict(zip(by_token, piece, strict=True)), **tensors, **carried)
        carried = dict(zip(carried, after, strict=True))
        outputs.append(output)
    assert_near(torch.cat(outputs, dim=1).cpu(), answer(whole)["output"], 1e-5, "output")
    for name, after in zip(("state", "q_inputs", "k_inputs"), carried.values(), strict=True):
        assert_near(after.cpu(), answer(whole)[name], 1e-5, name)


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("decay", DECAYS if HAS_GPU else ["moderate", "-100", "everything"])
def test_the_operator_on_features(decay: str) -> None:
    case = Case(20, decay, 2, 1, batch=1, feature_dim=6, value_dim=5)

    def function(*tensors: Tensor, initial_state: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
        moved = [tensor.to(DEVICE) for tensor in tensors]
        output, state = gated_linear_attention(
            *moved, initial_state=initial_state.to(DEVICE), normalize=normalize, backend="triton"
        )
        return output.cpu(), state.cpu()

    for what, actual in run_operator(function, case, torch.float32).items():
        # Sums over a chunk that holds resets have fewer digits.
        tolerance = 1e-4 if "100" in decay or "inf" in decay or "every" in decay else 2e-5
        least = 1.0 if what in GRADIENTS else 0.0
        assert_near(actual, operator_answer(case)[what], tolerance, what, least_scale=least)


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    results = check(MixerCase(20), dtype)
    assert results["output"].dtype == dtype
    assert results["state"].dtype == torch.float32
    assert results["gradient of gate"].dtype == dtype


@pytest.mark.usefixtures("short_segments")
def test_the_same_each_time() -> None:
    first, second = (
        run(kernels, MixerCase(9, heads=1, state_heads=1), torch.float32, DEVICE) for _ in range(2)
    )
    assert all(torch.equal(first[what], second[what]) for what in first)


def test_inputs_laid_out_in_any_way() -> None:
    tensors = {name: t.detach().float().to(DEVICE) for name, t in MixerCase(9).tensors().items()}
    expected = kernels(**tensors)[0]
    tensors["q"] = tensors["q"].transpose(1, 2).contiguous().transpose(1, 2)
    tensors["v"] = torch.cat([tensors["v"], tensors["v"]], dim=-1)[..., :16]
    assert torch.equal(kernels(**tensors)[0], expected)


def test_inputs_at_any_address() -> None:
    """Also after a call with aligned ones has compiled the kernels for these."""
    tensors = {name: t.detach().float().to(DEVICE) for name, t in MixerCase(9).tensors().items()}
    expected = kernels(**tensors)
    shifted = {name: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for name, t in tensors.items()}
    assert all(t.is_contiguous() and t.data_ptr() % 16 for t in shifted.values())
    for _ in range(2):
        for actual, wanted in zip(kernels(**shifted), expected, strict=True):
            assert_near(actual, wanted, 1e-6)


def test_buffers_of_a_call_are_aligned_and_apart() -> None:
    sizes = (3, 0, 129, 128)
    pieces = mixer.workspace(sizes, torch.bfloat16, torch.device(DEVICE))
    assert all(piece.numel() >= size for piece, size in zip(pieces, sizes, strict=True))
    starts = [piece.data_ptr() for piece in pieces if piece.numel()]
    assert [(start - starts[0]) % 256 for start in starts] == [0, 0, 0]
    for index, piece in enumerate(pieces):
        piece.fill_(index)
    assert [set(piece.tolist()) for piece in pieces] == [{0.0}, set(), {2.0}, {3.0}]


def test_nothing_to_do() -> None:
    tensors = {name: t.detach().float().to(DEVICE) for name, t in MixerCase(4).tensors().items()}
    for name in ("q", "k", "v", "gate"):
        tensors[name] = tensors[name][:, :0]
    output, state, _, _ = kernels(**tensors)
    assert output.shape == (1, 0, 2, 16)
    assert torch.equal(state, tensors["initial_state"])


def tensors_of(dtype: torch.dtype = torch.float32, **fields: Any) -> dict[str, Tensor]:
    return {name: t.detach().to(DEVICE, dtype) for name, t in MixerCase(4, **fields).tensors().items()}


def test_what_the_kernels_refuse() -> None:
    with pytest.raises(BackendError, match=r"backend='triton' cannot run: q is torch.float64; .* bfloat16"):
        kernels(**tensors_of(torch.float64))
    with pytest.raises(BackendError, match=r"a width is 300; .*float32 the kernels take up to 128"):
        kernels(**tensors_of(width=300))
    wide = tensors_of(width=80)
    wide["v"].requires_grad_()
    with pytest.raises(BackendError, match="with gradients the kernels take up to 64"):
        kernels(**wide)
    inputs = tensors_of()
    inputs["q_inputs"].requires_grad_()
    with pytest.raises(BackendError, match="q_inputs or k_inputs requires a gradient"):
        kernels(**inputs)
    x = torch.rand(1, 3, 1, 4, device=DEVICE)
    with pytest.raises(ValueError, match="it must be at most 0"):
        gated_linear_attention(x, x, x, x, backend="triton")
    with use_backend("triton"), pytest.raises(BackendError, match="use_backend='triton' cannot run"):
        linear_attention_mixer(**tensors_of(torch.float64))


def test_auto_falls_back_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backend, "_fallbacks", {})
    monkeypatch.setattr(backend, "_choose", lambda *_, **__: ("triton", None))  # as "auto" on a GPU
    for _ in range(2):
        output, *_ = linear_attention_mixer(**tensors_of(torch.float64))
    assert output.dtype == torch.float64
    messages = [str(w.message) for w in recwarn if "kernels" in str(w.message)]
    assert len(messages) == 1
    assert "lawcat's kernels are not used: q is torch.float64" in messages[0]
    assert "fell back to torch: q is torch.float64" in explain()


class FakeKernel:
    """Notes what is compiled, and what is launched without being compiled."""

    arg_names = ("x", "y", "tokens", "A", "B")

    warmup: Any

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.calls.append("compiled" if "num_warps" in options else (grid, arguments))
            return self

        return run


def test_reuse_of_what_was_compiled() -> None:
    """Compiled once for each device, dtype and None, whatever the lengths; constants in their order."""
    kernel, x = FakeKernel(), torch.zeros(64)
    again = Launch(kernel, 2, B=2, A=1, warps=4)
    again(3, (x, None), (5,))
    again(7, (x.clone(), None), (9,))
    again(7, (x, None), (1,))
    assert kernel.calls[0] == "compiled"
    assert [grid for grid, _ in kernel.calls[1:]] == [(14, 1, 1)] * 2
    assert kernel.calls[2][1] == (x.data_ptr(), None, 1, 1, 2)
    kernel.calls.clear()
    others = [((x.half(), None), (5,)), ((x, x), (5,)), ((x, x.half()), (5,)), ((x.to("meta"), None), (5,))]
    for tensors, numbers in others:
        again(3, tensors, numbers)
    assert kernel.calls == ["compiled"] * 4
    for tensors, numbers in others:
        again(3, tensors, numbers)
    assert "compiled" not in kernel.calls[4:]
    Launch(kernel, 2, B=2, A=3, warps=4)(3, (x, None), (5,))
    Launch(kernel, 2, B=2, A=1, warps=8)(3, (x, None), (5,))
    assert kernel.calls[8:] == ["compiled"] * 2


def test_compiling_ahead_launches_nothing() -> None:
    """Each kernel is compiled by what it would be launched with; later calls launch."""
    kernel, x = FakeKernel(), torch.zeros(64)
    again = Launch(kernel, 2, B=2, A=1, warps=4)
    seen: list[tuple[Any, ...]] = []
    kernel.warmup = lambda *arguments, **options: seen.append((arguments, options))
    launch.compile_together(lambda: [again(3, (x, None), (5,)), again(4, (x, None), (6,))])
    assert kernel.calls == []
    assert [arguments for arguments, _ in seen] == [(x, None, 5), (x, None, 6)]
    assert seen[0][1].items() >= {"grid": (6,), "A": 1, "B": 2, "num_warps": 4}.items()
    again(3, (x, None), (5,))
    assert kernel.calls == ["compiled"]
    with pytest.raises(RuntimeError, match="stop"):
        launch.compile_together(lambda: (_ for _ in ()).throw(RuntimeError("stop")))
    again(3, (x, None), (5,))
    assert kernel.calls[1][0] == (6, 1, 1)


@pytest.mark.parametrize("is_reusing", [False, True])
def test_what_is_not_reused(monkeypatch: pytest.MonkeyPatch, is_reusing: bool) -> None:
    """Unaligned tensors and integers of 64 bits; nothing where it is switched off."""
    monkeypatch.setattr(launch, "reuse_compiled", is_reusing)
    kernel, x = FakeKernel(), torch.zeros(64)
    again = Launch(kernel, 1, A=1, B=2, warps=4)
    odd = [((x[1:], None), (5,)), ((x, x[2:]), (5,)), ((x, None), (2**31,))]
    for tensors, numbers in odd * 2:
        again(3, tensors, numbers)
    assert kernel.calls == ["compiled"] * 6
    for _ in range(2):
        again(3, (x[4:], None), (2**31 - 1,))
    assert (kernel.calls[7] == "compiled") != is_reusing


def test_what_cannot_be_launched_again_is_not_kept() -> None:
    """Triton gives nothing in its interpreter, and a promise in its asynchronous mode."""
    for result in (None, object()):
        calls: list[Any] = []

        class Kernel:
            def __getitem__(self, grid: tuple[int, ...], calls: Any = calls, result: object = result) -> Any:
                calls.append(grid)
                return lambda *arguments, **options: result

        again = Launch(Kernel(), 1, warps=4)
        for _ in range(2):
            again(3, (torch.zeros(4),), (5,))
        assert calls == [(3,), (3,)]


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize(
    ("design", "kernels_seen"), [("fused", 9), ("prepared", 12), ("scan with queries", 13)]
)
def test_no_integer_is_compiled_in(monkeypatch: pytest.MonkeyPatch, design: str, kernels_seen: int) -> None:
    """What a launch takes as given: Triton would compile anew for 1 and for multiples of 16."""
    specialized: dict[str, set[str]] = {}

    def note(self: Launch, units: int, tensors: tuple[Any, ...], numbers: tuple[float, ...]) -> None:
        kernel = self._kernel
        listed = kernel.kwargs["do_not_specialize"] if hasattr(kernel, "kwargs") else kernel.do_not_specialize
        names = kernel.arg_names[len(tensors) :]
        integers = {name for name, number in zip(names, numbers, strict=False) if isinstance(number, int)}
        specialized[kernel.fn.__name__] = integers - set(listed)
        assert not any(isinstance(number, bool) for number in numbers)

    monkeypatch.setattr(Launch, "__call__", note)
    monkeypatch.setattr(mixer, "allocate", torch.zeros)
    configure(monkeypatch, **DESIGNS[design], chunk=64, segment=64)
    run(kernels, MixerCase(20, min_log_decay=-10.0), torch.float32, DEVICE)
    assert not any(specialized.values()), specialized
    assert len(specialized) == kernels_seen


def test_calls_of_one_shape_share_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(case: MixerCase, choose: Any = choose_configuration) -> mixer.Plan:
        monkeypatch.setattr(mixer, "choose_configuration", choose)
        tensors = case.tensors(torch.float32)
        inputs = mixer.MixerInputs(
            *(tensors[name] for name in ("q", "k", "v", "gate", "q_taps", "k_taps", "map_weight")),
            num_state_heads=case.state_heads,
        )
        return mixer.make_plan(inputs, mixer.MixerOptions(is_logit=True, eps=1e-6))

    first = plan(MixerCase(9))
    assert plan(MixerCase(9)).segments is first.segments
    assert plan(MixerCase(10)).segments is not first.segments
    assert plan(MixerCase(10)).layout is first.layout

    def shorter(*arguments: Any) -> Any:
        return dataclasses.replace(choose_configuration(*arguments), segment=64)

    assert plan(MixerCase(9), shorter).segments.size == (9, 1, 64)


@pytest.mark.skipif(HAS_GPU, reason="of machines without a GPU")
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    support.missing.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET")
    try:
        with pytest.raises(BackendError, match="there is no CUDA device"):
            kernels(**tensors_of())
        assert "triton: fused kernels for NVIDIA GPUs, differentiable (not available:" in explain()
        assert backend.choose_backend() == "torch"
    finally:
        support.missing.cache_clear()


# Larger than an interpreter can do.


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("width", "features"), [(32, 32), (64, 64), (96, 96), (128, 128), (64, 128), (128, 64)], ids=str
)
@pytest.mark.parametrize("tokens", [1, 3, 4, 63, 64, 65, 1000])
def test_real_widths(tokens: int, width: int, features: int, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and max(width, features) > 64:
        pytest.skip("no gradients of this width in float32")
    check(MixerCase(tokens, heads=4, kv_heads=2, state_heads=4, width=width, feature_dim=features), dtype)


@pytest.mark.gpu
@on_gpu
def test_eight_taps() -> None:
    check(
        MixerCase(1000, heads=4, kv_heads=2, state_heads=4, width=64, feature_dim=64, taps=8), torch.bfloat16
    )


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("state_heads", "width"), [(2, 64), (8, 64), (8, 128)])
def test_8192_tokens(state_heads: int, width: int, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and width > 64:
        pytest.skip("no gradients of this width in float32")
    case = MixerCase(8192, heads=8, kv_heads=2, state_heads=state_heads, width=width, feature_dim=width)

    def by_torch(**arguments: Any) -> Any:
        return linear_attention_mixer(**arguments, backend="torch")

    expected = run(by_torch, case, torch.float64, DEVICE, dtype)
    for what, actual in run(kernels, case, dtype, DEVICE).items():
        tolerance = (GRADIENT_TOLERANCE if what.startswith("gradient") else TOLERANCE)[dtype]
        assert_near(actual, expected[what], tolerance, what)


@pytest.mark.gpu
@on_gpu
@torch.no_grad()
def test_a_million_tokens() -> None:
    """Finite, and near the same in float64."""
    case = MixerCase(2**20, heads=1, kv_heads=1, state_heads=1, width=64, feature_dim=64, has_state=False)
    tensors = {name: t.detach() for name, t in case.tensors(torch.float32, DEVICE).items()}
    tensors["gate"] = tensors["gate"] + torch.linspace(0, 8, 64, device=DEVICE)
    output, state, _, _ = kernels(**{n: t.bfloat16() if n in "qkv" else t for n, t in tensors.items()})
    double = {n: (t.bfloat16() if n in "qkv" else t).double() for n, t in tensors.items()}
    expected, expected_state, _, _ = linear_attention_mixer(**double, backend="torch")
    assert torch.isfinite(output).all()
    assert_near(output, expected, 1e-2, "output")
    assert_near(state, expected_state, 1e-2, "state")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("width", [64, 128])
def test_designs(monkeypatch: pytest.MonkeyPatch, width: int, design: str) -> None:
    """With real chunks, three in a segment; the second call launches what the first compiled."""
    chunk = 32 if design == "fused" and width == 128 else 64
    configure(monkeypatch, **DESIGNS[design], chunk=chunk, segment=192, gradient_chunk=32, value_block=64)
    for gate_scale in (1.0, 100.0):
        case = MixerCase(
            1000, heads=4, kv_heads=2, state_heads=4, width=width, feature_dim=width, gate_scale=gate_scale
        )
        for _ in range(2):
            check(case, torch.bfloat16)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    "fields",
    [
        {"boundaries": (0, 1, 70, 1000), "has_state": False},
        {"batch": 2, "padding": 9},
        {"gate_scale": 100.0, "min_log_decay": -10.0},
        {"gate_scale": 3.0, "normalize": False},
    ],
    ids=str,
)
def test_variants_as_the_table_has_them(fields: dict[str, Any], width: int) -> None:
    case = MixerCase(1000, heads=4, kv_heads=2, state_heads=4, width=width, feature_dim=width, **fields)
    check(case, torch.bfloat16)


@pytest.mark.gpu
@on_gpu
@torch.no_grad()
def test_capture_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixer, "allocate", torch.empty)
    tensors = tensors_of(torch.bfloat16, width=64, feature_dim=64)
    expected = kernels(**tensors)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = kernels(**tensors)[0]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, expected)
