"""Depthwise causal convolution across tokens, with its state. Legend: see ``shapes.py``."""

from __future__ import annotations

import torch
from torch import Tensor

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
    """Return ``causal_conv1d`` of x [B, T, heads, D] in x's shape, and the state.

    The filters are taken in float32 at least.

    Args:
        x: [B, T, heads, D].
        weight: One filter a channel [heads * D, K].
        initial_state: [B, heads * D, K - 1]; zeros when None.
    """
    y, state = causal_conv1d(x.flatten(2), at_least_float32(weight), initial_state)
    return y.view(x.shape), state
