"""Where floating point goes wrong if nobody looks: tiny normalisers, infinities, short floats, autocast."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, Function, answer
from torch import Tensor

from comparison import assert_near
from lawcat.ops import (
    gated_linear_attention,
    gated_linear_attention_chunked,
    gated_linear_attention_reference,
    gated_linear_attention_step,
)


def stepwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    state = initial_state
    if state is None:
        state = torch.zeros(v.shape[0], v.shape[2], q.shape[-1], v.shape[-1] + 1)
    outputs = [v.new_zeros(v.shape[0], 0, q.shape[2], v.shape[-1])]
    for t in range(q.shape[1]):
        token = (tensor[:, t : t + 1] for tensor in (q, k, v, log_decay))
        output, state = gated_linear_attention_step(*token, state, eps=eps)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


FORMS = pytest.mark.parametrize(
    "form", [gated_linear_attention_chunked, gated_linear_attention_reference, stepwise]
)


def is_finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


@FORMS
@pytest.mark.parametrize("value", [-0.1, -5.0, -20.0, -torch.inf])
def test_nothing_divided_by_nothing_is_nothing(form: Function, value: float) -> None:
    """Rows of padding: keys of 0 from an empty state give outputs of 0 and finite gradients."""
    tokens = 40
    q = torch.rand(1, tokens, 2, 4).requires_grad_()
    k = torch.zeros(1, tokens, 1, 4).requires_grad_()
    v = torch.randn(1, tokens, 1, 3).requires_grad_()
    log_decay = torch.full((1, tokens, 1, 4), value).requires_grad_()
    output, state = form(q, k, v, log_decay)
    assert not output.any()
    assert not state.any()
    gradients = torch.autograd.grad(output.sum() + state.sum(), (q, k, v, log_decay))
    assert is_finite(*gradients)


@FORMS
@pytest.mark.parametrize("value", [-0.5, -5.0, -20.0, -100.0, -torch.inf])
@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_a_normaliser_that_fades_away(form: Function, value: float, eps: float) -> None:
    """One token, then decay without keys: outputs follow the definition down to 0 and never become NaN."""
    tokens = 100
    q = torch.rand(1, tokens, 1, 4, dtype=torch.float64)
    k = torch.zeros(1, tokens, 1, 4, dtype=torch.float64)
    k[:, 0] = 0.25
    v = torch.ones(1, tokens, 1, 3, dtype=torch.float64)
    log_decay = torch.full((1, tokens, 1, 4), value, dtype=torch.float64)
    expected, _ = gated_linear_attention_reference(q, k, v, log_decay, eps=eps)
    leaves = [t.float().requires_grad_() for t in (q, k, v, log_decay)]
    output, state = form(*leaves, eps=eps)
    assert_near(output, expected, 2e-5, "output")
    assert is_finite(*torch.autograd.grad(output.sum() + state.sum(), leaves))


@FORMS
def test_padded_rows_leave_the_state_alone(form: Function) -> None:
    case = Case(33, "moderate")
    q, k, v, log_decay, state = case.inputs(torch.float32).values()
    keep = torch.ones(2, 33)
    keep[0, :7] = 0
    keep[1, 20:] = 0
    keep = keep[:, :, None, None]
    output, state_after = form(q, k * keep, v, log_decay * keep, initial_state=state)
    for row, tokens in ((0, slice(7, None)), (1, slice(0, 20))):
        part = [t[row : row + 1, tokens] for t in (q, k, v, log_decay)]
        expected, expected_state = form(*part, initial_state=state[row : row + 1])
        assert_near(output[row : row + 1, tokens], expected, 1e-5, "output")
        assert_near(state_after[row : row + 1], expected_state, 1e-5, "state")


@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 1e3, 1e5])
@pytest.mark.parametrize("decay", ["none", "bound", "bound or slow", "everything"])
def test_features_of_any_size(decay: str, magnitude: float) -> None:
    """The factors of a strong decay are as large as exp(40), and what they are of is not always a softmax."""
    case = Case(64, decay, has_state=False, normalize=False)
    q, k, v, log_decay, _ = case.inputs().values()
    expected, expected_state = gated_linear_attention_reference(
        q * magnitude, k * magnitude, v * magnitude, log_decay, normalize=False
    )
    leaves = [t.detach().float().requires_grad_() for t in (q, k, v, log_decay)]
    output, state = gated_linear_attention_chunked(
        *(leaf * magnitude for leaf in leaves[:3]), leaves[3], normalize=False
    )
    assert_near(output, expected, 1e-5, "output")
    assert_near(state, expected_state, 1e-5, "state")
    assert is_finite(*torch.autograd.grad(output.sum() + state.sum(), leaves))


@FORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", ["vanishing", "moderate", "bound", "everything"])
def test_short_floats_come_in_and_go_out(form: Function, dtype: torch.dtype, decay: str) -> None:
    """Inputs are rounded by their dtype; nothing in between is."""
    q, k, v, log_decay, state = Case(40, decay).inputs().values()
    rounded = [t.to(dtype) for t in (q, k, v, log_decay)]
    output, state_after = form(*rounded, initial_state=state.float())
    assert output.dtype == dtype
    assert state_after.dtype == torch.float32
    expected, expected_state = gated_linear_attention_reference(
        *(t.double() for t in rounded), initial_state=state.float().double()
    )
    assert_near(state_after, expected_state, 5e-6, "state")
    assert_near(output, expected, torch.finfo(dtype).eps, "output")


@FORMS
def test_one_float64_input_makes_all_arithmetic_float64(form: Function) -> None:
    case = Case(20, "moderate")
    q, k, v, log_decay, state = case.inputs().values()
    arguments = [t.float() for t in (q, k, v, log_decay)]
    expected, _ = gated_linear_attention_reference(*(t.double() for t in arguments), initial_state=state)
    for index in range(4):
        mixed = [t.double() if i == index else t for i, t in enumerate(arguments)]
        output, state_after = form(*mixed, initial_state=state)
        assert state_after.dtype == torch.float64
        assert output.dtype == mixed[2].dtype
        assert_near(output, expected, 1e-7 if index != 2 else 1e-13, "output")


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("decay", ["moderate", "bound or slow", "everything"])
def test_autocast_changes_nothing(form: Function, dtype: torch.dtype, decay: str) -> None:
    q, k, v, log_decay, state = Case(40, decay).inputs(torch.float32).values()
    expected, expected_state = form(q, k, v, log_decay, initial_state=state)
    with torch.autocast("cpu", dtype=dtype):
        output, state_after = form(q, k, v, log_decay, initial_state=state)
    assert torch.equal(output, expected)
    assert torch.equal(state_after, expected_state)


@FORMS
def test_inputs_of_any_strides(form: Function) -> None:
    """Slices, transposes and expanded tensors, as projections and repeated heads give them."""
    case = Case(37, "moderate")
    q, k, v, log_decay, state = (t.detach() for t in case.inputs(torch.float32).values())
    strided = [
        q.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([k, k], dim=-1)[..., 0],
        torch.cat([v, v], dim=2)[:, :, : v.shape[2]],
        log_decay.flip(1).contiguous().flip(1),
    ]
    state = state.transpose(-1, -2).contiguous().transpose(-1, -2)
    output, state_after = form(*strided, initial_state=state)
    assert_near(output, answer(case)["output"], 5e-6, "output")
    assert_near(state_after, answer(case)["state"], 5e-6, "state")
    expanded = log_decay[:, :, :1, :1].expand_as(log_decay)
    output, _ = form(q, k, v, expanded, initial_state=state)
    expected, _ = form(q, k, v, expanded.contiguous(), initial_state=state)
    assert_near(output, expected, 1e-6, "output")


@FORMS
def test_inputs_are_not_written_to(form: Function) -> None:
    inputs = [t.detach() for t in Case(40, "everything").inputs(torch.float32).values()]
    copies = [t.clone() for t in inputs]
    form(*inputs[:4], initial_state=inputs[4])
    assert all(torch.equal(t, copy) for t, copy in zip(inputs, copies, strict=True))


@FORMS
@pytest.mark.parametrize("has_state", [True, False])
def test_no_tokens_are_no_change(form: Function, has_state: bool) -> None:
    q, k, v, log_decay, state = Case(4, "moderate").inputs(torch.float32).values()
    nothing = [t[:, :0] for t in (q, k, v, log_decay)]
    output, state_after = form(*nothing, initial_state=state if has_state else None)
    assert output.shape == (2, 0, 4, 5)
    assert torch.equal(state_after, state if has_state else torch.zeros_like(state))


def test_an_empty_batch() -> None:
    inputs = [t[:0] for t in Case(4, "moderate").inputs(torch.float32).values()]
    output, state = gated_linear_attention(*inputs[:4], initial_state=inputs[4])
    assert output.shape == (0, 4, 4, 5)
    assert state.shape == (0, 2, 6, 6)


@FORMS
def test_nan_shows(form: Function) -> None:
    """A NaN in a log-decay reaches the outputs after it, and of those before it at most its chunk's."""
    q, k, v, log_decay, state = (t.detach() for t in Case(40, "moderate").inputs(torch.float32).values())
    log_decay[0, 32, 0, 0] = torch.nan
    output, _ = form(q, k, v, log_decay, initial_state=state)
    assert output[0, 32:, :2].isnan().all()
    assert is_finite(output[1], output[0, :, 2:], output[0, :32])


@pytest.mark.parametrize("tokens", [1025, 3000])
def test_gradients_reach_across_segments(tokens: int) -> None:
    k = torch.rand(1, tokens, 1, 2).requires_grad_()
    v = torch.randn(1, tokens, 1, 2)
    output, _ = gated_linear_attention(k.detach(), k, v, torch.full_like(k, -1e-4))
    (gradient,) = torch.autograd.grad(output[:, -1].sum(), k)
    assert gradient[0, 0].abs().min() > 0
