"""The whole mixer over many tokens in plain PyTorch, without copies of k, v or the gate a head.

Convolution and map are both linear: ``(sum_i taps_i x_{t-i}) W`` is ``sum_i x_{t-i} (taps_i W)``, a matrix
product a tap. So each state head reads its kv head as it is, though their taps and maps differ, and there are
no convolved copies. All that is made for a head is its features, of a segment of tokens at a time.

Legend: see ``shapes.py``; also P = N / G state heads of one head of k, v and the gate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunked import AttentionShape, ChunkedRecurrence
from .decay import log_decay_of
from .feature_map import features_of
from .precision import state_dtype

# By tap, the products of filter and map of the G heads that are taken at once [G, D, F / 2].
Weights = tuple[Tensor, ...]


def linear_attention_mixer_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    map_weight: Tensor,
    *,
    q_taps: Tensor | None,
    k_taps: Tensor | None,
    gate_is_logit: bool,
    gate_divisor: float,
    min_log_decay: float,
    initial_state: Tensor | None,
    q_inputs: Tensor | None,
    k_inputs: Tensor | None,
    mask: Tensor | None,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return output and state of ``linear_attention_mixer``, which has the arguments. Nothing is checked."""
    num_state_heads, _, half = map_weight.shape
    dtype = state_dtype(q, k, v, gate, map_weight, q_taps, k_taps, initial_state, q_inputs, k_inputs)
    batch, tokens, num_query_heads, width = q.shape
    groups, value_dim = v.shape[2:]
    shape = AttentionShape(batch, tokens, num_query_heads, 2 * half, num_state_heads, groups, value_dim)
    recurrence = ChunkedRecurrence(shape, v, initial_state, dtype, normalize, eps, min_log_decay)
    if shape.is_empty:
        return recurrence.result()
    q_weights = _weights(q_taps, map_weight, shape, num_query_heads, dtype)
    k_weights = _weights(k_taps, map_weight, shape, num_state_heads, dtype)
    kept = len(k_weights[0][0]) - 1
    # By head, what is before the first token; a segment's own convolutions begin with what precedes it.
    q_before, k_before = (
        None if t is None else shape.by_head(t.reshape(batch, -1, width, kept).permute(0, 3, 1, 2))
        for t in (q_inputs, k_inputs)
    )
    q_previous = k_previous = None

    length = max(shape.segment_tokens(q.device), kept)
    parts = [torch.split(t, length, dim=1) for t in (q, k, v, gate)]
    masks = [None] * len(parts[0]) if mask is None else torch.split(mask, length, dim=1)
    for q_part, k_part, v_part, gate_part, keep in zip(*parts, masks, strict=True):
        log_decay = log_decay_of(gate_part, gate_divisor, min_log_decay) if gate_is_logit else gate_part
        if keep is not None:
            by_token = keep[:, :, None, None]
            q_part, k_part = (x * by_token.to(x.dtype) for x in (q_part, k_part))
            log_decay = log_decay * by_token.to(log_decay.dtype)
        recurrence.begin(v_part, log_decay, keep)
        k_rows = _rows(k_part, k_previous, kept, dtype)  # one for all state heads
        q_by_head = shape.by_head(q_part)
        for p, queries in enumerate(q_by_head):
            before = None if k_before is None else k_before[p][0]
            recurrence.take_in(_features(k_rows, before, k_weights[p][0]))
            for r, query in enumerate(queries):
                q_rows = _rows(query, None if q_previous is None else q_previous[p][r], kept, dtype)
                before = None if q_before is None else q_before[p][r]
                recurrence.read(_features(q_rows, before, q_weights[p][r]))
        q_previous, k_previous, q_before, k_before = q_by_head, k_part, None, None
    return recurrence.result()


def _weights(
    taps: Tensor | None, map_weight: Tensor, shape: AttentionShape, heads: int, dtype: torch.dtype
) -> list[list[Weights]]:
    """Return products of taps and map, by state head of a group and query head of that.

    Args:
        taps: [heads * D, K]; one that is 1 when None.
        map_weight: [N, D, F / 2].
        shape: Of the mixer.
        heads: Of q or of k.
        dtype: Of all arithmetic.
    """
    num_state_heads, width, half = map_weight.shape
    groups, readers = shape.groups, heads // num_state_heads
    maps = map_weight.to(dtype).reshape(groups, -1, 1, 1, width, half)
    if taps is None:
        weights = maps.expand(-1, -1, readers, -1, -1, -1)
    else:
        filters = taps.to(dtype).reshape(groups, maps.shape[1], readers, width, -1)
        weights = filters.movedim(-1, 3)[..., None] * maps  # [G, P, R, K, D, F/2]
    return [[of_reader.unbind(1) for of_reader in of_copy.unbind(1)] for of_copy in weights.unbind(1)]


def _rows(x: Tensor, previous: Tensor | None, kept: int, dtype: torch.dtype) -> Tensor:
    """Return x [B, T, G, D] head by head [G, K - 1 + T, B, D], after its last ``kept`` inputs or zeros."""
    x = x.permute(2, 1, 0, 3)
    if not kept:
        return x.to(dtype)
    if previous is None:
        earlier = x.new_zeros((), dtype=dtype).expand(x.shape[0], kept, *x.shape[2:])
    else:
        earlier = previous[:, previous.shape[1] - kept :].permute(2, 1, 0, 3).to(dtype)
    return torch.cat([earlier, x], dim=1)


def _features(rows: Tensor, before: Tensor | None, weights: Weights) -> Tensor:
    """Return features [G, B, T, F] of inputs.

    Args:
        rows: Inputs of G heads [G, K - 1 + T, B, D].
        before: What is before the first of T tokens, where ``rows`` has zeros [B, K - 1, G, D].
        weights: By tap.
    """
    groups, length, batch, _ = rows.shape
    kept = len(weights) - 1
    projected = _project(rows, weights)
    if before is not None and kept:
        earlier = _rows(before.new_zeros(before.shape), before, kept, rows.dtype)
        reached = min(kept, length - kept) * batch
        projected[:, :reached] += _project(earlier, weights)[:, :reached]
    return features_of(projected).view(groups, length - kept, batch, -1).transpose(1, 2)


def _project(rows: Tensor, weights: Weights) -> Tensor:
    """Return the mapped convolution of rows [G, K - 1 + T, B, D], [G, T * B, F / 2]."""
    batch, kept = rows.shape[2], len(weights) - 1
    tokens = rows.shape[1] - kept
    flat = rows.flatten(1, 2)
    projected = torch.bmm(flat[:, kept * batch :], weights[kept])
    for tap in range(kept):
        projected.baddbmm_(flat[:, tap * batch : (tap + tokens) * batch], weights[tap])
    return projected
