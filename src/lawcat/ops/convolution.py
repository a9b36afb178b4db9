"""Depthwise causal convolution across tokens, with its state. Legend: see ``shapes.py``."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from .precision import at_least_float32


def causal_conv1d(x: Tensor, weight: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ``y_t = sum_i weight[:, i] x_{t - K + 1 + i}`` and the inputs that the next call needs.

    No bias and no activation; the last tap weighs the present token. Splitting a sequence and handing the
    state on gives the same ``y``.

    Args:
        x: Input [B, T, C], T of 1 or more.
        weight: One filter a channel [C, K], K of 2 or more.
        initial_state: The K - 1 inputs before the first token [B, C, K - 1], oldest first; zeros when None.

    Returns:
        ``y`` [B, T, C] in the dtype that x and weight promote to, and the state [B, C, K - 1] in x's dtype.

    Raises:
        ValueError: when shapes do not fit together.

    Source: section 3 of LAWCAT (arXiv 2509.18467).

    Example:
        >>> import torch
        >>> y, state = causal_conv1d(torch.ones(1, 3, 1), torch.ones(1, 2))
        >>> y[0, :, 0].tolist(), state.shape
        ([1.0, 2.0, 2.0], torch.Size([1, 1, 1]))
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(
            f"x must be [B, T, C] and weight [C, K]; got {tuple(x.shape)} and {tuple(weight.shape)}."
        )
    batch, tokens, channels = x.shape
    taps = weight.shape[1]
    if initial_state is None:
        before = x.new_zeros(batch, taps - 1, channels)
    else:
        if tuple(initial_state.shape) != (batch, channels, taps - 1):
            raise ValueError(
                f"initial_state is {tuple(initial_state.shape)}; it must be [B, C, K - 1] = "
                f"{(batch, channels, taps - 1)}."
            )
        before = initial_state.transpose(1, 2).to(x.dtype)
    extended = torch.cat([before, x], dim=1)  # [B, K-1+T, C]
    state = extended[:, tokens:].transpose(1, 2).contiguous()  # [B, C, K-1]
    # Shifted products in the layout the projections give: F.conv1d would need a transposition to [B, C, T].
    dtype = torch.promote_types(x.dtype, weight.dtype)
    extended, weight = extended.to(dtype), weight.to(dtype)
    y = extended[:, taps - 1 :] * weight[:, taps - 1]
    for tap in range(taps - 1):
        y.addcmul_(extended[:, tap : tap + tokens], weight[:, tap])
    return y, state


def causal_conv1d_of_heads(
    x: Tensor, weight: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``causal_conv1d`` of x [B, T, G, D] by the filters of as many heads or more, and the state.

    The filters are taken in float32 at least. Those of head n filter head ``n // (heads / G)`` of x, which is
    not copied for each.

    Args:
        x: [B, T, G, D].
        weight: One filter a channel [heads * D, K].
        initial_state: [B, heads * D, K - 1]; zeros when None.

    Returns:
        [B, T, heads, D], and the state [B, heads * D, K - 1].
    """
    batch, tokens, groups, width = x.shape
    heads, taps = weight.shape[0] // width, weight.shape[1]
    weight = at_least_float32(weight)
    if heads == groups:
        y, state = causal_conv1d(x.flatten(2), weight, initial_state)
        return y.view(x.shape), state
    kept = taps - 1
    state = last_inputs(x, heads, kept, initial_state)
    filters = weight.to(torch.promote_types(x.dtype, weight.dtype)).view(groups, heads // groups, width, taps)

    def filtered(extended: Tensor) -> Tensor:  # [B, K-1+T, G, P or 1, D]
        length = extended.shape[1] - kept
        y = extended[:, kept:] * filters[..., kept]
        for tap in range(kept):
            y.addcmul_(extended[:, tap : tap + length], filters[..., tap])
        return y

    y = filtered(functional.pad(x.to(filters.dtype)[:, :, :, None], (0, 0, 0, 0, 0, 0, kept, 0)))
    if initial_state is not None:
        earlier = initial_state.to(filters.dtype).view(batch, groups, -1, width, kept).permute(0, 4, 1, 2, 3)
        reached = min(kept, tokens)
        y[:, :reached] += filtered(functional.pad(earlier, (0, 0, 0, 0, 0, 0, 0, reached)))
    return y.flatten(2, 3), state


def last_inputs(
    x: Tensor,
    heads: int,
    kept: int,
    before: Tensor | None,
    mask: Tensor | None = None,
    boundaries: tuple[int, ...] | None = None,
) -> Tensor:
    """Return the last inputs of a convolution [S, heads * D, kept], oldest first.

    Args:
        x: [B, T, G, D], of which each head stands for ``heads / G``.
        heads: Of the convolution.
        kept: How many, K - 1.
        before: Those before the first token [S, heads * D, kept]; zeros when None.
        mask: [B, T], 0 for padding, which counts as zeros.
        boundaries: Where the sequences of a packed batch start, and the end.
    """
    if boundaries is not None:
        parts = [
            last_inputs(
                x[:, a:b], heads, kept, None if before is None else before[s : s + 1],
                None if mask is None else mask[:, a:b], None,
            )
            for s, (a, b) in enumerate(itertools.pairwise(boundaries))
        ]  # fmt: skip
        return torch.cat(parts)
    batch, tokens, groups, width = x.shape
    first = max(0, tokens - kept)
    last = x[:, first:]
    if mask is not None:
        last = last * mask[:, first:, None, None].to(x.dtype)
    last = last.permute(0, 2, 3, 1)  # [B, G, D, tokens]
    if groups != heads:
        last = last[:, :, None].expand(-1, -1, heads // groups, -1, -1)
    missing = kept - tokens + first
    if missing:
        shape = (batch, heads * width, missing)
        earlier = x.new_zeros(shape) if before is None else before[:, :, -missing:].to(x.dtype)
        return torch.cat([earlier, last.reshape(batch, heads * width, tokens - first)], dim=2)
    # Not a view, which would hold all of x in memory; copied once, repeated heads and order at the same time.
    return last.clone(memory_format=torch.contiguous_format).view(batch, heads * width, kept)
