"""The feature map on tensors (equation 4). Legend: see ``shapes.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import at_least_float32


def hedgehog_feature_map(u: Tensor, weight: Tensor) -> Tensor:
    """Return ``phi(u) = [softmax(u W_h) ; softmax(-u W_h)]``, in float32 at least.

    Args:
        u: [B, T, H, D].
        weight: One matrix a state head [N, D, F / 2]; query head h has that of head ``h // (H / N)``.

    Returns:
        Features [B, T, H, F].

    Source: LAWCAT (arXiv 2509.18467); the map is Hedgehog's (arXiv 2402.04347).

    Example:
        >>> import torch
        >>> hedgehog_feature_map(torch.zeros(1, 1, 2, 4), torch.zeros(1, 4, 2)).tolist()
        [[[[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]]]
    """
    num_heads, head_dim, half = weight.shape
    batch, tokens, heads = u.shape[:3]
    # Head by head, which is how the chunked form reads them: the last line copies nothing, but for several
    # query heads a state head in several sequences.
    grouped = at_least_float32(u).reshape(batch, tokens, num_heads, heads // num_heads, head_dim)
    grouped = grouped.permute(2, 0, 3, 1, 4).reshape(num_heads, -1, head_dim)
    projected = torch.bmm(grouped, at_least_float32(weight))  # [N, B * R * T, F/2]
    features = features_of(projected).view(num_heads, batch, heads // num_heads, tokens, 2 * half)
    features = features.permute(1, 3, 0, 2, 4)
    return features.reshape(batch, tokens, heads, 2 * half)


def features_of(projected: Tensor) -> Tensor:
    """Return the features [..., F] of what a map projects to, [..., F / 2]."""
    return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], dim=-1)
