"""The causal convolution against torch's and ONNX's, its state, its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from comparison import assert_near
from lawcat.ops import causal_conv1d
from lawcat.ops.convolution import causal_conv1d_of_heads, last_inputs

LENGTHS = (1, 2, 3, 4, 5, 31, 100)


def by_torch(x: Tensor, weight: Tensor, state: Tensor | None) -> Tensor:
    channels, taps = weight.shape
    before = x.new_zeros(x.shape[0], channels, taps - 1) if state is None else state
    extended = torch.cat([before, x.transpose(1, 2)], dim=-1)
    return F.conv1d(extended, weight[:, None], groups=channels).transpose(1, 2)


@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("taps", [2, 3, 4, 5])
def test_torch_conv1d(taps: int, tokens: int, has_state: bool) -> None:
    x = torch.randn(2, tokens, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, taps, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 3, taps - 1, dtype=torch.float64, requires_grad=True) if has_state else None
    y, state_after = causal_conv1d(x, weight, state)
    expected = by_torch(x, weight, state)
    assert_near(y, expected, 1e-14, "y")

    before = torch.zeros(2, 3, taps - 1) if state is None else state
    assert torch.equal(state_after, torch.cat([before, x.transpose(1, 2)], dim=-1)[..., tokens:])

    leaves = [x, weight] if state is None else [x, weight, state]
    loss_weights = torch.randn_like(y)
    for name, actual, wanted in zip(
        ("x", "weight", "state"),
        torch.autograd.grad((y * loss_weights).sum(), leaves),
        torch.autograd.grad((expected * loss_weights).sum(), leaves),
        strict=False,
    ):
        assert_near(actual, wanted, 1e-13, f"gradient of {name}")


def test_onnx_reference_evaluator() -> None:
    onnx = pytest.importorskip("onnx", minversion="1.22")
    from onnx.reference import ReferenceEvaluator

    names = ["input", "weight", "", "past_state"]
    node = onnx.helper.make_node("CausalConvWithState", names, ["output", "present_state"])
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in ("input", "weight", "past_state", "output", "present_state")
    ]
    graph = onnx.helper.make_graph([node], "convolution", values[:3], values[3:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 27)])

    x, weight, state = torch.randn(2, 9, 3), torch.randn(3, 4), torch.randn(2, 3, 3)
    feeds = {"input": x.transpose(1, 2), "weight": weight[:, None], "past_state": state}
    expected, expected_state = ReferenceEvaluator(model).run(
        None, {name: np.ascontiguousarray(tensor) for name, tensor in feeds.items()}
    )
    y, state_after = causal_conv1d(x, weight, state)
    assert_near(y.transpose(1, 2), torch.from_numpy(np.asarray(expected)), 1e-6, "y")
    assert_near(state_after, torch.from_numpy(np.asarray(expected_state)), 0.0, "state")


def test_gradcheck() -> None:
    leaves = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 5, 3), (3, 4), (2, 3, 3))
    ]
    assert torch.autograd.gradcheck(causal_conv1d, leaves)


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_the_last_tap_weighs_the_present_token(tokens: int) -> None:
    x = torch.randn(1, tokens, 2)
    identity = torch.tensor([[0.0, 0.0, 1.0]]).expand(2, 3)
    y, _ = causal_conv1d(x, identity)
    assert torch.equal(y, x)
    delay = torch.tensor([[1.0, 0.0, 0.0]]).expand(2, 3)
    y, _ = causal_conv1d(x, delay, torch.zeros(1, 2, 2))
    assert torch.equal(y[:, 2:], x[:, :-2])


def test_no_token_sees_a_later_one() -> None:
    x, weight = torch.randn(1, 10, 2), torch.randn(2, 4)
    y, _ = causal_conv1d(x, weight)
    x[:, 6:] = torch.nan
    changed, _ = causal_conv1d(x, weight)
    assert torch.equal(changed[:, :6], y[:, :6])


def test_no_tokens_are_no_change() -> None:
    state = torch.randn(2, 3, 3)
    y, state_after = causal_conv1d(torch.zeros(2, 0, 3), torch.randn(3, 4), state)
    assert y.shape == (2, 0, 3)
    assert torch.equal(state_after, state)


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype", "y_dtype"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_dtypes(x_dtype: torch.dtype, weight_dtype: torch.dtype, y_dtype: torch.dtype) -> None:
    x, weight = torch.randn(1, 6, 2).to(x_dtype), torch.randn(2, 3).to(weight_dtype)
    y, state = causal_conv1d(x, weight, torch.randn(1, 2, 2))
    assert y.dtype == y_dtype
    assert state.dtype == x_dtype


def test_the_state_is_a_copy() -> None:
    """What is kept must not hold the whole input in memory, nor change with it."""
    x = torch.randn(1, 1000, 2)
    _, state = causal_conv1d(x, torch.randn(2, 4))
    before = state.clone()
    x.zero_()
    assert torch.equal(state, before)
    assert state.untyped_storage().nbytes() == state.numel() * 4


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("has_state", [False, True])
def test_several_filters_of_one_head(has_state: bool, tokens: int, taps: int) -> None:
    """The same as of copies of the head, gradients too, also where the copies began differently."""
    x = torch.randn(2, tokens, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6 * 3, taps, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 6 * 3, taps - 1, dtype=torch.float64, requires_grad=True) if has_state else None
    leaves = [x, weight] + ([] if state is None else [state])
    copies = x.repeat_interleave(3, dim=2)
    results = [causal_conv1d_of_heads(t, weight, state) for t in (x, copies)]
    (y, after), (expected, expected_after) = results
    assert_near(y, expected, 1e-14, "output")
    assert torch.equal(after, expected_after)
    factors = torch.randn_like(y)
    gradients = [torch.autograd.grad((t * factors).sum(), leaves) for t, _ in results]
    for actual, wanted in zip(*gradients, strict=True):
        assert_near(actual, wanted, 1e-13, "gradient")


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_last_inputs_are_a_copy(tokens: int, taps: int) -> None:
    last = last_inputs(torch.randn(1, tokens, 2, 3), 2, taps - 1, None)
    assert last.shape == (1, 6, taps - 1)
    assert last.untyped_storage().nbytes() == last.numel() * 4


@pytest.mark.parametrize(
    ("x", "weight", "state", "message"),
    [
        ((2, 5), (3, 4), None, r"x must be \[B, T, C\] and weight \[C, K\]; got \(2, 5\) and \(3, 4\)"),
        ((2, 5, 3), (4, 4), None, "got"),
        ((2, 5, 3), (3,), None, "got"),
        ((2, 5, 3), (3, 4), (2, 3, 4), r"initial_state is \(2, 3, 4\); it must be .* = \(2, 3, 3\)"),
        ((2, 5, 3), (3, 4), (1, 3, 3), "initial_state"),
    ],
    ids=str,
)
def test_bad_shapes(
    x: tuple[int, ...], weight: tuple[int, ...], state: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        causal_conv1d(torch.zeros(x), torch.zeros(weight), None if state is None else torch.zeros(state))
