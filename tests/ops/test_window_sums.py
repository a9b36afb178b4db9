"""Sums over a window, in blocks, against a softmax over a dense matrix; and what a window is made of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from comparison import assert_near
from lawcat.ops import gated_linear_attention_reference, use_backend
from lawcat.ops.window import (
    Sinks,
    Sums,
    gated_linear_attention_sums,
    sliding_sum,
    sliding_window_sums,
)

WIDTH = 4


def dense(
    q: Tensor, keys: Tensor, values: Tensor, is_visible: Tensor, window: int, sinks: Sinks | None
) -> Sums:
    """All scores of all pairs, most of them masked."""
    group = q.shape[2] // keys.shape[2]
    keys, values = (t.repeat_interleave(group, dim=2) for t in (keys, values))
    scores = torch.einsum("bthd,bshd->bhts", q, keys)
    token, key = torch.arange(q.shape[1])[:, None] + window, torch.arange(keys.shape[1])[None]
    is_seen = ((key <= token) & (key > token - window) & is_visible[:, None])[:, None].expand_as(scores)
    if sinks is not None:
        sink_keys, sink_values = (t.repeat_interleave(group, dim=2) for t in (sinks.keys, sinks.values))
        sink_scores = torch.einsum("bthd,bshd->bhts", sinks.queries, sink_keys)
        scores, values = torch.cat([scores, sink_scores], dim=-1), torch.cat([values, sink_values], dim=1)
        is_seen = torch.cat([is_seen, sinks.is_visible[:, None].expand_as(sink_scores)], dim=-1)
    scores = scores.masked_fill(~is_seen, -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    weights = torch.where(largest.isinf(), 0.0, (scores - largest).exp())
    return Sums(torch.einsum("bhts,bshd->bthd", weights, values), weights.sum(-1).transpose(1, 2)[..., None])


def inputs(tokens: int, window: int, num_sinks: int, heads: tuple[int, int], seed: int = 0):
    torch.manual_seed(seed)
    q = torch.randn(2, tokens, heads[0], WIDTH, dtype=torch.float64, requires_grad=True)
    keys, values = torch.randn(2, 2, window + tokens, heads[1], WIDTH, dtype=torch.float64).requires_grad_()
    is_visible = torch.rand(2, window + tokens) < 0.8
    sinks = None
    if num_sinks:
        sinks = Sinks(
            torch.randn_like(q),
            *torch.randn(2, 2, num_sinks, heads[1], WIDTH, dtype=torch.float64),
            torch.rand(2, tokens, num_sinks) < 0.7,
        )
    return q, keys, values, is_visible, sinks


@given(
    tokens=st.integers(1, 40),
    window=st.integers(1, 45),
    num_sinks=st.integers(0, 3),
    heads=st.sampled_from([(4, 2), (3, 3), (6, 1)]),
    seed=st.integers(0, 9),
)
def test_blocks_give_what_a_dense_matrix_gives(
    tokens: int, window: int, num_sinks: int, heads: tuple[int, int], seed: int
) -> None:
    q, keys, values, is_visible, sinks = inputs(tokens, window, num_sinks, heads, seed)
    actual = sliding_window_sums(q, keys, values, is_visible, window=window, sinks=sinks)
    expected = dense(q, keys, values, is_visible, window, sinks)
    weights = torch.randn_like(expected.numerator)
    gradients = []
    for sums in (actual, expected):
        loss = (sums.numerator * weights).sum() + (sums.denominator * weights[..., :1]).sum()
        gradients.append(torch.autograd.grad(loss, (q, keys, values)))
    for what, ours, theirs in zip(Sums._fields, actual, expected, strict=True):
        assert_near(ours, theirs, 1e-13, what)
    for what, ours, theirs in zip(("q", "keys", "values"), *gradients, strict=True):
        assert_near(ours, theirs, 1e-12, f"gradient of {what}", least_scale=1.0)


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 64, 700, 1100])
def test_several_segments(window: int) -> None:
    q, keys, values, is_visible, sinks = inputs(1300, window, 2, (2, 1))
    expected = dense(q, keys, values, is_visible, window, sinks)
    actual = sliding_window_sums(q, keys, values, is_visible, window=window, sinks=sinks)
    for what, ours, theirs in zip(Sums._fields, actual, expected, strict=True):
        assert_near(ours, theirs, 1e-13, what)


def test_who_sees_nothing_gets_nothing() -> None:
    q, keys, values, is_visible, _ = inputs(10, 3, 0, (2, 1))
    sums = sliding_window_sums(q, keys, values, torch.zeros_like(is_visible), window=3)
    assert not sums.numerator.any()
    assert not sums.denominator.any()
    sums.numerator.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_large_scores() -> None:
    q, keys, values, is_visible, _ = (t if t is None else t.detach() for t in inputs(10, 3, 0, (2, 1)))
    sums = sliding_window_sums(q.float() * 1e4, keys.float(), values.float(), is_visible, window=3)
    assert sums.numerator.isfinite().all()
    assert sums.denominator.max() <= 3


@given(tokens=st.integers(1, 30), window=st.integers(1, 35))
def test_sliding_sums(tokens: int, window: int) -> None:
    x = torch.randn(2, window + tokens, 3, dtype=torch.float64)
    expected = torch.stack([x[:, t + 1 : t + 1 + window].sum(1) for t in range(tokens)], dim=1)
    assert_near(sliding_sum(x, window), expected, 1e-13, least_scale=1.0)


def test_sliding_sums_forget_what_was_large() -> None:
    """A difference of running sums over everything is off by 1e-2 here."""
    x = torch.full((1, 64 + 4096, 1), -1e-4)
    x[:, :2000] = -50.0
    tail = sliding_sum(x, 64)[:, 2100:]
    assert_near(tail, torch.full_like(tail, -64e-4), 1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_sums_of_linear_attention(tokens: int, backend: str) -> None:
    """Their quotient is the normalised output, and the state is the same."""
    torch.manual_seed(0)
    q, k = torch.rand(2, tokens, 4, 6), torch.rand(2, tokens, 2, 6)
    v, log_decay = torch.randn(2, tokens, 2, 5), -0.3 * torch.rand(2, tokens, 2, 6)
    state = torch.rand(2, 2, 6, 6)
    for initial_state in (None, state):
        with use_backend(backend):
            sums, after = gated_linear_attention_sums(q, k, v, log_decay, initial_state=initial_state)
        expected, expected_state = gated_linear_attention_reference(
            q, k, v, log_decay, initial_state=initial_state
        )
        assert_near(sums.numerator / (sums.denominator + 1e-6), expected, 1e-5)
        assert_near(after, expected_state, 1e-5)
        assert after.is_contiguous()


def test_sums_are_not_rounded_to_the_values_dtype() -> None:
    q = torch.rand(1, 40, 2, 6)
    sums, _ = gated_linear_attention_sums(q, q, q.to(torch.bfloat16), torch.zeros_like(q))
    assert sums.denominator.dtype == sums.numerator.dtype == torch.float32
