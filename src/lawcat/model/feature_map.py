"""The learned feature map, one matrix a head for q and k alike (equation 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.precision import at_least_float32


class FeatureMap(nn.Module):
    """``phi(u) = [softmax(u W_h) ; softmax(-u W_h)]``: positive features, and so positive weights of tokens.

    Args:
        num_heads: Heads with a matrix of their own.
        head_dim: Width D of a head.
        feature_dim: Width F of the result, even; ``W_h`` is [D, F / 2] and starts as columns of the identity.

    Source: LAWCAT (arXiv 2509.18467); the map is Hedgehog's (arXiv 2402.04347).
    """

    def __init__(self, num_heads: int, head_dim: int, feature_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(at_least_float32(torch.empty(num_heads, head_dim, feature_dim // 2)))
        self.reset_parameters()

    def initial_value(self) -> Tensor:
        """Return the starting matrices [heads, D, F/2]: the first F/2 columns of the identity."""
        num_heads, head_dim, half = self.weight.shape
        identity = torch.eye(head_dim, half, dtype=self.weight.dtype, device=self.weight.device)
        return identity.expand(num_heads, head_dim, half)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the starting values."""
        self.weight.copy_(self.initial_value())

    def forward(self, u: Tensor) -> Tensor:
        """Return the features [B, T, heads, F] of u [B, T, heads, D]; heads of a group share a matrix."""
        num_heads, head_dim, half = self.weight.shape
        batch, tokens = u.shape[:2]
        grouped = at_least_float32(u).reshape(batch, tokens, num_heads, -1, head_dim)
        projected = torch.einsum("btgrd,gdf->btgrf", grouped, at_least_float32(self.weight))
        features = torch.cat([projected.softmax(-1), (-projected).softmax(-1)], dim=-1)
        return features.reshape(batch, tokens, u.shape[2], 2 * half)
