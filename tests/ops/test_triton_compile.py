"""The kernels in what torch.compile makes: in Triton's interpreter on a CPU, by inductor on a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from mixer_cases import MixerCase, answer, run
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from comparison import assert_near
from kernel_device import DEVICE, on_gpu
from lawcat.errors import BackendError
from lawcat.ops.fused import linear_attention_mixer
from lawcat.ops.triton import custom_ops, mixer
from lawcat.ops.triton.configurations import choose_configuration
from lawcat.ops.triton.decode_step import decode_step

CASES = {
    "paper": MixerCase(5, taps=2),
    "padding": MixerCase(5, batch=2, padding=2, taps=2, heads=2, state_heads=1, gate_width=1),
    "packed": MixerCase(5, boundaries=(0, 2, 5), taps=2, normalize=False),
    "nothing optional": MixerCase(3, taps=None, has_state=False, gate_is_logit=False),
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiled before; what is read before it is written is NaN."""
    torch._dynamo.reset()

    def full_of_nan(size: Any, **options: Any) -> Tensor:
        return torch.full(size, float("nan"), **options)

    monkeypatch.setattr(mixer, "allocate", full_of_nan)


def kernels(**arguments: Any) -> Any:
    return linear_attention_mixer(**arguments, backend="triton")


def call_of(case: MixerCase, dtype: torch.dtype = torch.float32, *, save: bool = True) -> tuple[Any, ...]:
    """The arguments of ``lawcat::mixer``."""
    t: dict[str, Any] = case.tensors(dtype, DEVICE)
    mask = t.get("mask")
    names = ("q", "k", "v", "gate", "q_taps", "k_taps", "map_weight", "initial_state", "q_inputs", "k_inputs")
    tensors = (*(t.get(name) for name in names), None if mask is None else mask != 0)
    options = (case.gate_is_logit, 16.0, case.min_log_decay, case.normalize, 1e-6)
    return (*tensors, case.boundaries, case.state_heads, *options, save)


def step_arguments() -> tuple[Any, ...]:
    """Those of ``lawcat::decode_step``: 2 rows, 2 heads of q and 1 of k, v and the state, widths of 16."""
    torch.manual_seed(3)
    shapes = [
        (2, 1, 2, 16), (2, 1, 1, 16), (2, 1, 1, 16), (2, 1, 1, 16), (2, 1, 16, 17), (2, 32, 2), (2, 16, 2),
        (32, 3), (16, 3), (1, 16, 8),
    ]  # fmt: skip
    return (*(torch.rand(shape, device=DEVICE) for shape in shapes), 16.0, -2.5, True, 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_one_graph_gives_what_the_definition_does(name: str) -> None:
    """Output, state, the convolutions' inputs and every gradient."""
    case = CASES[name]
    expected = answer(case, torch.float32)
    results = run(torch.compile(kernels, fullgraph=True, backend="aot_eager"), case, torch.float32, DEVICE)
    assert results.keys() == expected.keys()
    for what, actual in results.items():
        assert_near(actual.cpu(), expected[what], 5e-5, what)


@pytest.mark.parametrize(("name", "save"), [("paper", True), ("packed", False)])
def test_the_mixer_is_what_it_says_it_is(name: str, save: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, shapes without data, gradients, and the same for sizes that are symbols."""
    monkeypatch.setattr(mixer, "allocate", torch.zeros)  # what fills up to whole lines is compared, too
    call = call_of(CASES[name], save=save)
    if not save:
        call = tuple(t.detach() if isinstance(t, Tensor) else t for t in call)
    library.opcheck(torch.ops.lawcat.mixer.default, call)


def test_the_backward_is_what_it_says_it_is() -> None:
    call = call_of(CASES["nothing optional"])
    with torch.no_grad():
        output, final, saved = torch.ops.lawcat.mixer(*call)
    # Of what went before, nothing has a gradient a second time.
    tensors = [t.detach() if isinstance(t, Tensor) else t for t in call[:-1]]
    gradients = torch.randn_like(output), torch.randn_like(final)
    library.opcheck(
        torch.ops.lawcat.mixer_backward.default,
        (*tensors, output, saved, *gradients),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_the_step_is_what_it_says_it_is() -> None:
    library.opcheck(torch.ops.lawcat.decode_step.default, step_arguments())


def test_a_compiled_step_writes_in_place() -> None:
    def step(*arguments: Any, out: Tensor | None = None) -> Tensor:
        *tensors, divisor, lowest, normalize, eps = arguments
        return decode_step(
            *tensors, gate_divisor=divisor, min_log_decay=lowest, normalize=normalize, eps=eps, out=out
        )

    ours, theirs = step_arguments(), step_arguments()
    before = ours[4].clone()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(*ours), step(*theirs))
    assert all(torch.equal(a, b) for a, b in zip(ours[:10], theirs[:10], strict=True))
    assert not torch.equal(ours[4], before)
    out = torch.empty(2, 1, 2, 16, device=DEVICE)
    assert compiled(*ours, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, step(*theirs))


def test_gradients_of_one_result_alone() -> None:
    """The other one's is then not there rather than zeros."""
    case = CASES["nothing optional"]
    compiled = torch.compile(kernels, fullgraph=True, backend="aot_eager")
    for index in (0, 1):
        found = []
        for form in (compiled, kernels):
            tensors = case.tensors(torch.float32, DEVICE)
            form(**tensors, **case.options())[index].square().sum().backward()
            found.append(tensors["k"].grad)
        assert found[0] is not None
        assert torch.equal(*found)


def test_any_length_by_one_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kernels, fullgraph=True, backend=counter)
    for tokens in (5, 9):
        case = MixerCase(tokens, taps=2)
        tensors = case.tensors(torch.float32, DEVICE)
        for name in ("q", "k", "v", "gate"):
            torch._dynamo.mark_dynamic(tensors[name], 1)
        results = compiled(**tensors, **case.options())
        results[0].sum().backward()
        assert_near(results[0].cpu(), answer(case, torch.float32)["output"], 1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [1, 63, 1000, 4097, 70_000])
def test_what_is_saved_is_as_long_as_a_compiler_is_told(
    name: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the lengths at which segments become longer, as a GPU with many processors cuts them."""
    monkeypatch.setattr(mixer, "processors", lambda device: 132)
    case = CASES[name]
    *call, _ = call_of(case, torch.bfloat16)
    inputs, options = custom_ops._call(call)
    for field in ("q", "k", "v", "gate"):
        setattr(inputs, field, getattr(inputs, field)[:, :1].expand(-1, tokens, -1, -1))
    if inputs.boundaries is not None:
        inputs.boundaries = (0, tokens) if tokens == 1 else (0, tokens // 3 + 1, tokens)
    plan = mixer.make_plan(inputs, options)
    assert mixer.saved_numbers(inputs, options) == sum(mixer._aligned(plan.saved_sizes()))


def test_eager_calls_do_without_the_dispatcher() -> None:
    """Which would cost them some 20 microseconds."""
    seen: list[str] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    case = CASES["nothing optional"]
    with Noting():
        kernels(**case.tensors(torch.float32, DEVICE), **case.options())[0].sum().backward()
        with torch.no_grad():
            kernels(**case.tensors(torch.float32, DEVICE), **case.options())
        *tensors, _, _, _, _ = step_arguments()
        decode_step(*tensors)
        assert not [name for name in seen if "lawcat" in name]
        torch.ops.lawcat.decode_step(*step_arguments())
    assert [name for name in seen if "lawcat" in name] == ["lawcat.decode_step.default"]


def test_what_the_kernels_refuse_stays_readable() -> None:
    case = MixerCase(3, width=80, feature_dim=80, taps=None)
    with pytest.raises(Exception, match=r"a width is 80; for torch\.float32 with gradients .* up to 64"):
        torch.compile(kernels, backend="aot_eager")(**case.tensors(torch.float32, DEVICE))
    table = choose_configuration(16, 16, torch.float32, 8, 1, -2.5, 1)
    options = mixer.MixerOptions(configuration=dataclasses.replace(table, segment=128))
    with pytest.raises(BackendError, match="other than the table's cannot be compiled"):
        custom_ops.traced_mixer((), None, 1, options, save=False)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("width", [64, 128])
def test_inductor_on_a_gpu(width: int, mode: str | None) -> None:
    """With gradients in bfloat16; the second mode replays CUDA graphs from the third call on."""
    case = MixerCase(
        600, heads=8, kv_heads=2, state_heads=8, width=width, feature_dim=width, batch=2, padding=9
    )
    expected = run(kernels, case, torch.bfloat16, DEVICE)

    def scaled(**arguments: Any) -> Any:  # something for inductor to do on both sides
        output, *others = kernels(**arguments | {"q": 2 * arguments["q"] - arguments["q"]})
        return (output * 1.0, *others)

    compiled = torch.compile(scaled, fullgraph=True, mode=mode)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        for what, actual in run(compiled, case, torch.bfloat16, DEVICE).items():
            assert_near(actual, expected[what], 2e-2, what)


@pytest.mark.gpu
@on_gpu
def test_inductor_at_any_length_on_a_gpu() -> None:
    """Across the lengths at which the table changes: inductor checks the sizes that it was told."""
    compiled = torch.compile(kernels, fullgraph=True, dynamic=True)
    for tokens in (100, 1000, 5000, 9000, 40_000):
        case = MixerCase(tokens, heads=4, kv_heads=2, state_heads=4, width=64, feature_dim=64)
        expected = run(kernels, case, torch.bfloat16, DEVICE)
        for what, actual in run(compiled, case, torch.bfloat16, DEVICE).items():
            assert_near(actual, expected[what], 2e-2, what)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_an_inductor_step_on_a_gpu(mode: str | None) -> None:
    def step(*arguments: Any) -> Tensor:
        q, *tensors, divisor, lowest, normalize, eps = arguments
        found = decode_step(
            2 * q - q, *tensors, gate_divisor=divisor, min_log_decay=lowest, normalize=normalize, eps=eps
        )
        return found + 0.0

    ours, theirs = step_arguments(), step_arguments()
    compiled = torch.compile(step, fullgraph=True, mode=mode)
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        assert_near(compiled(*ours), step(*theirs), 1e-5)
    for actual, wanted in zip(ours[4:7], theirs[4:7], strict=True):
        assert_near(actual, wanted, 1e-5)
