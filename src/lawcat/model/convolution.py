"""The causal convolution across tokens on q and on k (equation 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.convolution import causal_conv1d_of_heads
from ..ops.precision import at_least_float32


class CausalConvolution(nn.Module):
    """A filter of K taps a channel; starts as nearly the identity: last tap 1, the others 0.001 or random.

    Args:
        num_heads: Heads of the input.
        head_dim: Width of a head.
        kernel_size: Taps K.
        init_std: Standard deviation of the other taps; 0 means 0.001 for all.
    """

    def __init__(self, num_heads: int, head_dim: int, kernel_size: int, init_std: float = 0.0) -> None:
        super().__init__()
        self.kernel_size, self.init_std = kernel_size, init_std
        self.weight = nn.Parameter(at_least_float32(torch.empty(num_heads * head_dim, kernel_size)))
        self.reset_parameters()

    def initial_value(self) -> Tensor:
        """Return the starting filters [C, K]."""
        weight = torch.full_like(self.weight, 0.001)
        if self.init_std:
            weight.normal_(std=self.init_std)
        weight[:, -1] = 1.0
        return weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the starting values."""
        self.weight.copy_(self.initial_value())

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x [B, T, G, D] convolved [B, T, heads, D], and the state [B, C, K-1] for what follows."""
        return causal_conv1d_of_heads(x, self.weight, state)
