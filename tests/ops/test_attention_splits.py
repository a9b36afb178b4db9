"""Splitting a sequence anywhere and handing the state on gives the same outputs and the same final state."""

from __future__ import annotations

import itertools

import torch
from attention_cases import DECAYS, Case, answer
from hypothesis import given
from hypothesis import strategies as st

from comparison import assert_near
from lawcat.ops import causal_conv1d, gated_linear_attention, gated_linear_attention_step

TOKENS = 70


def pieces(cuts: list[int], tokens: int) -> list[slice]:
    edges = [0, *sorted(cuts), tokens]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


@given(
    cuts=st.lists(st.integers(0, TOKENS), max_size=6),
    decay=st.sampled_from(sorted(DECAYS)),
    is_float32=st.booleans(),
    is_per_head=st.booleans(),
    prefers_step=st.booleans(),
)
def test_any_split_of_a_sequence(
    cuts: list[int], decay: str, is_float32: bool, is_per_head: bool, prefers_step: bool
) -> None:
    case = Case(TOKENS, decay, is_per_head=is_per_head)
    *tokens, state = case.inputs(torch.float32 if is_float32 else torch.float64).values()
    outputs = []
    for piece in pieces(cuts, TOKENS):
        part = [tensor[:, piece] for tensor in tokens]
        is_step = prefers_step and piece.stop - piece.start == 1
        if is_step:
            output, state = gated_linear_attention_step(*part, state)
        else:
            output, state = gated_linear_attention(*part, initial_state=state)
        outputs.append(output)
    tolerance = 5e-6 if is_float32 else 1e-13
    assert_near(torch.cat(outputs, dim=1), answer(case)["output"], tolerance, "output")
    assert_near(state, answer(case)["state"], tolerance, "state")


@given(
    cuts=st.lists(st.integers(0, 20), max_size=5),
    num_taps=st.integers(1, 5),
    has_state=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_any_split_of_a_convolution(
    cuts: list[int], num_taps: int, has_state: bool, dtype: torch.dtype
) -> None:
    x, weight = torch.randn(2, 20, 3, dtype=dtype), torch.randn(3, num_taps, dtype=dtype)
    state = torch.randn(2, 3, num_taps - 1, dtype=dtype) if has_state else None
    expected, expected_state = causal_conv1d(x, weight, state)
    outputs = []
    for piece in pieces(cuts, 20):
        output, state = causal_conv1d(x[:, piece], weight, state)
        outputs.append(output)
    # Not merely near: the same sums in the same order.
    assert torch.equal(torch.cat(outputs, dim=1), expected)
    assert torch.equal(state, expected_state)
