"""Every form of the operator gives what its definition gives in float64: outputs, state, every gradient."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DECAYS, Case, Function, answer, run
from torch import Tensor

from comparison import assert_near
from lawcat.ops import (
    gated_linear_attention,
    gated_linear_attention_chunked,
    gated_linear_attention_reference,
    gated_linear_attention_step,
)

TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5}
# Around the chunks of 16 and 32 tokens and segments of 512.
SHORT_LENGTHS = (1, 2, 3, 4, 31, 32, 33, 63, 64, 65)
LONG_LENGTHS = (513, 1000, 1025)


def check(function: Function, case: Case, dtype: torch.dtype) -> None:
    expected = answer(case)
    for what, actual in run(function, case, dtype).items():
        if what.startswith("gradient"):
            # Where one token outweighs all others its share is 1 whatever q is: the gradient of q is a
            # difference of equal numbers then, and is compared with their size, which is about 1.
            assert_near(actual, expected[what], GRADIENT_TOLERANCE[dtype], what, least_scale=1.0)
        else:
            assert_near(actual, expected[what], TOLERANCE[dtype], what)


def token_by_token(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, initial_state: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    state = initial_state
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[2], q.shape[-1], v.shape[-1] + 1)
    outputs = []
    for t in range(q.shape[1]):
        token = (tensor[:, t : t + 1] for tensor in (q, k, v, log_decay))
        output, state = gated_linear_attention_step(*token, state, normalize=normalize)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", SHORT_LENGTHS)
def test_chunked(tokens: int, decay: str, dtype: torch.dtype) -> None:
    check(gated_linear_attention_chunked, Case(tokens, decay), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("decay", ["vanishing", "moderate", "bound or slow", "everything"])
@pytest.mark.parametrize("tokens", LONG_LENGTHS)
def test_chunked_of_long_inputs(tokens: int, decay: str, dtype: torch.dtype) -> None:
    check(gated_linear_attention_chunked, Case(tokens, decay, batch=1), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", [1, 33])
def test_step(tokens: int, decay: str, dtype: torch.dtype) -> None:
    check(token_by_token, Case(tokens, decay), dtype)


@pytest.mark.parametrize("decay", DECAYS)
def test_reference_in_float32(decay: str) -> None:
    check(gated_linear_attention_reference, Case(33, decay), torch.float32)


@pytest.mark.parametrize("form", [gated_linear_attention_chunked, token_by_token])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("decay", ["moderate", "everything"])
@pytest.mark.parametrize("ratio", range(1, 9))
@pytest.mark.parametrize("num_state_heads", [1, 3])
def test_head_groups(
    num_state_heads: int, ratio: int, decay: str, dtype: torch.dtype, form: Function
) -> None:
    check(form, Case(35, decay, ratio * num_state_heads, num_state_heads, batch=1), dtype)


@pytest.mark.parametrize("form", [gated_linear_attention_chunked, token_by_token])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("decay", ["moderate", "bound or slow", "everything"])
@pytest.mark.parametrize(
    "fields",
    [
        {"has_state": False},
        {"is_per_head": True},
        {"normalize": False},
        {"has_state": False, "is_per_head": True, "normalize": False},
        {"feature_dim": 1, "value_dim": 1},
        {"feature_dim": 64, "value_dim": 48, "batch": 1},
    ],
    ids=str,
)
def test_variants(fields: dict[str, bool | int], decay: str, dtype: torch.dtype, form: Function) -> None:
    check(form, Case(35, decay, **fields), dtype)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("decay", ["moderate", "everything"])
def test_each_backend(backend: str, decay: str) -> None:
    def function(*tensors: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        return gated_linear_attention(*tensors, backend=backend, **options)

    check(function, Case(40, decay), torch.float32)


@pytest.mark.parametrize("decay", ["moderate", "bound", "-20"])
def test_a_known_bound_changes_nothing(decay: str) -> None:
    for bound in (-5.0, -20.0, -1000.0):
        if decay == "-20" and bound == -5.0:
            continue

        def function(*tensors: Tensor, bound: float = bound, **options: object) -> tuple[Tensor, Tensor]:
            return gated_linear_attention(*tensors, min_log_decay=bound, **options)

        check(function, Case(40, decay), torch.float32)


def test_gradients_of_gradients() -> None:
    case = Case(5, "moderate", batch=1, num_query_heads=2, num_state_heads=1, feature_dim=2, value_dim=1)
    inputs = tuple(tensor for tensor in case.inputs().values() if tensor is not None)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        *tokens, state = tensors
        return gated_linear_attention_chunked(*tokens, initial_state=state, min_log_decay=-1.0)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("form", ["chunked", "pairwise", "step", "reference"])
def test_gradcheck(form: str) -> None:
    decay = "-20" if form == "pairwise" else "moderate"
    tokens = 1 if form == "step" else 9
    case = Case(tokens, decay, batch=1, num_query_heads=2, num_state_heads=1, feature_dim=2, value_dim=2)
    inputs = tuple(tensor for tensor in case.inputs().values() if tensor is not None)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        *tokens, state = tensors
        if form == "step":
            return gated_linear_attention_step(*tokens, state)
        if form == "reference":
            return gated_linear_attention_reference(*tokens, initial_state=state)
        return gated_linear_attention_chunked(*tokens, initial_state=state)

    assert torch.autograd.gradcheck(function, inputs)
