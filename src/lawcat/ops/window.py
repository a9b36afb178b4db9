"""Softmax attention over the last tokens and the first, in blocks; and what a state does with the rest.

Legend: see ``shapes.py``; also G kv heads, w tokens of the window, S sinks, M blocks of C tokens.

Two kinds of weights that share one denominator cannot be computed by two attentions that divide by their own.
So both are had here as sums: the numerator (weights times values) and the denominator (weights). See
``docs/method.md`` for what is computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import choose_backend, count_call, no_kernel, run_recurrence
from .precision import at_least_float32
from .step import gated_linear_attention_step

# Longer inputs are taken in segments of about so many scores a head: on a CPU they have to fit in its cache,
# on other devices to keep it busy. Segments shorter than the least compute too little at a time.
_SEGMENT_SCORES = {"cpu": 2**15}
_SEGMENT_SCORES_ELSEWHERE = 2**20
_MIN_SEGMENT_TOKENS = 64


class Sums(NamedTuple):
    """Weighted sums over past tokens: what is divided to give an attention's output.

    Attributes:
        numerator: Weights times values [B, T, H, D].
        denominator: Weights [B, T, H, 1].
    """

    numerator: Tensor
    denominator: Tensor


class Sinks(NamedTuple):
    """The first tokens, which every later one sees.

    Attributes:
        queries: The queries as they meet the sinks [B, T, H, D].
        keys: [B, S, G, D].
        values: [B, S, G, D].
        is_visible: Which of them each query sees [B, T, S], bool.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    is_visible: Tensor


def sliding_window_sums(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    is_visible: Tensor,
    *,
    window: int,
    sinks: Sinks | None = None,
) -> Sums:
    """Return the sums of softmax attention over the last ``window`` tokens, each query's own among them.

    A weight is ``exp(q . k - maximum)``, the maximum being over what the query sees, so that the largest
    weight is 1. Memory and time are linear in T. Arithmetic is in float32, or float64 when an input is.

    Args:
        q: Queries [B, T, H, D], scaled; query head h reads kv head ``h // (H / G)``.
        keys: [B, w + T, G, D]: those of the ``window`` tokens before, then those of the queries' tokens.
        values: [B, w + T, G, D].
        is_visible: Which of these tokens take part [B, w + T], bool.
        window: w, at least 1.
        sinks: Tokens seen besides; none of them may take part in the window too.

    Returns:
        Numerator and denominator; both 0 for a query that sees nothing.
    """
    tokens = q.shape[1]
    segment = _SEGMENT_SCORES.get(q.device.type, _SEGMENT_SCORES_ELSEWHERE) // window
    segment = max(segment, _MIN_SEGMENT_TOKENS)
    if segment > window:  # whole blocks, so that only the last segment is filled up
        segment -= segment % window
    parts = []
    for start in range(0, tokens, segment):
        stop = min(start + segment, tokens)
        here = None
        if sinks is not None:
            here = sinks._replace(
                queries=sinks.queries[:, start:stop], is_visible=sinks.is_visible[:, start:stop]
            )
        keys_here, values_here, visible_here = (
            t[:, start : stop + window] for t in (keys, values, is_visible)
        )
        parts.append(_segment(q[:, start:stop], keys_here, values_here, visible_here, window, here))
    if len(parts) == 1:
        return parts[0]
    return Sums(torch.cat([p.numerator for p in parts], dim=1), torch.cat([p.denominator for p in parts], 1))


def _segment(
    q: Tensor, keys: Tensor, values: Tensor, is_visible: Tensor, window: int, sinks: Sinks | None
) -> Sums:
    """One segment, cut into blocks of C = w tokens, or one block of C < w; shapes as in the public function.

    A query in place i of its block sees the places up to i of it, and those after i of the w tokens before
    the block. The two fill one row of w scores between them: no score is computed that is not used.
    """
    batch, tokens, num_heads, width = q.shape
    num_kv_heads = keys.shape[2]
    block = min(window, tokens)
    num_blocks = -(-tokens // block)
    if padding := num_blocks * block - tokens:
        q, keys, values = (F.pad(t, (0, 0, 0, 0, 0, padding)) for t in (q, keys, values))
        is_visible = F.pad(is_visible, (0, padding))

    def by_block(t: Tensor) -> Tensor:  # [B, M*C, H, D] -> [B, G, M, R*C, D]
        t = t.reshape(batch, num_blocks, block, num_kv_heads, -1, width).permute(0, 3, 1, 4, 2, 5)
        return at_least_float32(t).flatten(3, 4)

    def before_and_own(t: Tensor) -> tuple[Tensor, Tensor]:  # [B, G, M, w, D] and [B, G, M, C, D]
        # With more than one block C is w: the tokens before a block are the block before it.
        before = t[:, : num_blocks * window].view(batch, num_blocks, window, num_kv_heads, width)
        own = t[:, window:].view(batch, num_blocks, block, num_kv_heads, width)
        before, own = (at_least_float32(part).permute(0, 3, 1, 2, 4) for part in (before, own))
        return before, own

    def by_query(t: Tensor) -> Tensor:  # [B, G, M, R*C, .] -> [B, G, M, R, C, .]
        return t.view(batch, num_kv_heads, num_blocks, -1, block, t.shape[-1])

    def scores_of(queries: Tensor, k: Tensor) -> Tensor:  # [B, G, M, R, C, keys]
        return by_query(queries @ k.transpose(-1, -2))

    queries = by_block(q)
    keys_before, keys_own = before_and_own(keys)
    values_before, values_own = before_and_own(values)
    visible_before = is_visible[:, : num_blocks * window].view(batch, 1, num_blocks, 1, 1, window)
    visible_own = is_visible[:, window:].view(batch, 1, num_blocks, 1, 1, block)

    is_own = torch.ones(block, block, dtype=torch.bool, device=q.device).tril()
    before, own = scores_of(queries, keys_before), scores_of(queries, keys_own)
    scores = [torch.where(is_own, own, before[..., :block])]
    visible = [torch.where(is_own, visible_own, visible_before[..., :block])]
    if block < window:
        scores.append(before[..., block:])
        visible.append(visible_before[..., block:].expand(-1, -1, -1, -1, block, -1))
    parts = [part.masked_fill(~seen, -torch.inf) for part, seen in zip(scores, visible, strict=True)]
    if sinks is not None:
        sink_queries, sink_visible = sinks.queries, sinks.is_visible
        if padding:
            sink_queries = F.pad(sink_queries, (0, 0, 0, 0, 0, padding))
            sink_visible = F.pad(sink_visible, (0, 0, 0, padding))
        sink_keys, sink_values = (
            at_least_float32(t).transpose(1, 2)[:, :, None] for t in (sinks.keys, sinks.values)
        )
        sink_scores = scores_of(by_block(sink_queries), sink_keys)
        sink_visible = sink_visible.view(batch, 1, num_blocks, 1, block, -1)
        parts.append(sink_scores.masked_fill(~sink_visible, -torch.inf))
    scores_all = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    # A query that sees nothing has only -inf; -inf - -inf would be NaN.
    maximum = scores_all.amax(-1, keepdim=True).clamp(min=torch.finfo(scores_all.dtype).min)
    weights = torch.exp(scores_all - maximum)  # [B, G, M, R, C, w (+ S)]
    denominator = weights.sum(-1, keepdim=True)

    shared = weights[..., :block]
    weights_own = shared.masked_fill(~is_own, 0.0)
    weights_before = shared.masked_fill(is_own, 0.0)
    if block < window:
        weights_before = torch.cat([weights_before, weights[..., block:window]], dim=-1)
    numerator = weights_own.flatten(3, 4) @ values_own + weights_before.flatten(3, 4) @ values_before
    if sinks is not None:
        numerator = numerator + weights[..., window:].flatten(3, 4) @ sink_values

    def by_token(t: Tensor) -> Tensor:  # [B, G, M, R, C, .] -> [B, T, H, .]
        t = t.permute(0, 2, 4, 1, 3, 5).reshape(batch, num_blocks * block, num_heads, t.shape[-1])
        return t[:, :tokens]

    return Sums(by_token(by_query(numerator)), by_token(denominator))


def sliding_sum(x: Tensor, window: int) -> Tensor:
    """Return, for each of the last T tokens of x, the sum over it and the ``window - 1`` tokens before.

    Each sum is made of two running sums over parts of it. A difference of two running sums over everything
    would lose small sums beside the large ones of long ago.

    Args:
        x: [B, w + T, ...].
        window: w, at least 1.

    Returns:
        [B, T, ...].

    Example:
        >>> import torch
        >>> sliding_sum(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), 2).tolist()
        [[5.0, 7.0, 9.0]]
    """
    tokens = x.shape[1] - window
    if tokens == 1:
        return x[:, 1:].sum(1, keepdim=True)
    if padding := -tokens % window:
        x = torch.cat([x, x.new_zeros(x.shape[0], padding, *x.shape[2:])], dim=1)
    blocks = x.reshape(x.shape[0], -1, window, *x.shape[2:])  # [B, M+1, w, ...]
    until = blocks[:, 1:].cumsum(2)  # of the block up to a token
    after = blocks[:, :-1].flip(2).cumsum(2).flip(2)[:, :, 1:]  # of the block before, after the same place
    sums = until + torch.cat([after, torch.zeros_like(until[:, :, :1])], dim=2)
    flat: Tensor = sums.flatten(1, 2)
    return flat[:, :tokens]


def gated_linear_attention_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    min_log_decay: float | None = None,
) -> tuple[Sums, Tensor]:
    """Return numerator and denominator of gated linear attention, and the final state.

    Args:
        q: Query features [B, T, H, F]; query head h reads state head ``h // (H / N)``.
        k: Key features [B, T, N, F].
        v: Values [B, T, G, D]; state head n takes in those of head ``n // (N / G)``.
        log_decay: At most 0: [B, T, G, F], or [B, T, G, 1] for one a head.
        initial_state: State before the first token [B, N, F, D + 1]; zeros when None.
        min_log_decay: A bound below which no log_decay lies, where the caller knows one.

    Returns:
        The sums in float32 (float64 when an input is), and the state [B, N, F, D + 1].
    """
    # A column of ones among the values makes the denominator a column of the output; the state's own
    # normaliser, which comes out a second time, is left out again.
    v = at_least_float32(v)
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    state = None
    if initial_state is not None:
        state = torch.cat([initial_state, initial_state[..., -1:]], dim=-1)
    no_kernel(q.device.type, "a sliding window beside linear attention")
    if q.shape[1] == 1 and state is not None:
        count_call("step", "torch")
        sums, state = gated_linear_attention_step(q, k, v, log_decay, state, normalize=False)
    else:
        # The others have no place for a value of this width.
        backend = "reference" if choose_backend() == "reference" else "torch"
        sums, state = run_recurrence(
            q,
            k,
            v,
            log_decay,
            initial_state=state,
            normalize=False,
            eps=1e-6,
            backend=backend,
            min_log_decay=min_log_decay,
        )
    return Sums(sums[..., :-1], sums[..., -1:]), state[..., :-1].contiguous()
