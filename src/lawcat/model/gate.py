"""The gate: how much of the state each token keeps (equation 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.decay import log_decay_of
from ..ops.precision import at_least_float32

# Biases from 0 to 8 over the channels: logsigmoid(0)/16 halves a state in 16 tokens,
# logsigmoid(8)/16 in 33,000.
_SPREAD = (0.0, 8.0)


class DecayGate(nn.Module):
    """``log a_t = logsigmoid(W_2 W_1 x_t + b) / 16``, at most 0 and at least ``min_log_decay``; in float32.

    Args:
        hidden_size: Width of x.
        num_heads: Heads of the gate (the teacher's kv heads).
        width: Values a head: F, or 1 for one decay a head.
        rank: Inner width.
        divisor: The 16 above.
        min_log_decay: The bound, below 0.
        bias_init: ``"zeros"`` or ``"spread"``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        width: int,
        rank: int,
        divisor: float,
        min_log_decay: float,
        bias_init: str,
    ) -> None:
        super().__init__()
        self.num_heads, self.width = num_heads, width
        self.divisor, self.min_log_decay, self.bias_init = divisor, min_log_decay, bias_init
        self.reduce = nn.Parameter(at_least_float32(torch.empty(rank, hidden_size)))  # W_1
        self.expand = nn.Parameter(at_least_float32(torch.empty(num_heads * width, rank)))  # W_2
        self.bias = nn.Parameter(at_least_float32(torch.empty(num_heads * width)))
        self.reset_parameters()

    def initial_bias(self) -> Tensor:
        """Return the starting bias [heads * width]."""
        if self.bias_init == "zeros":
            return torch.zeros_like(self.bias)
        # Both halves of the feature map get the whole range: channels i and F/2 + i read the same projection.
        half = max(self.width // 2, 1)
        spread = torch.linspace(*_SPREAD, half, dtype=self.bias.dtype, device=self.bias.device)
        if self.width == 1:  # one value a head: spread over the heads instead
            return torch.linspace(*_SPREAD, self.num_heads, dtype=self.bias.dtype, device=self.bias.device)
        return spread.repeat(self.num_heads * self.width // half)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the starting values; ``W_2`` is zero, so that the gate starts as its bias says."""
        self.reduce.normal_(std=self.reduce.shape[1] ** -0.5)
        self.expand.zero_()
        self.bias.copy_(self.initial_bias())

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, T, heads, width] in float32 for x [B, T, hidden]: the gate before its activation.

        The activation is part of what comes next, ``linear_attention_mixer``, which may fuse it.
        """
        reduce, expand, bias = (at_least_float32(p) for p in (self.reduce, self.expand, self.bias))
        logits = F.linear(F.linear(at_least_float32(x), reduce), expand, bias)
        return logits.view(*x.shape[:2], self.num_heads, self.width)

    def log_decay(self, logits: Tensor) -> Tensor:
        """Return the log-decays of logits, in their shape."""
        return log_decay_of(logits, self.divisor, self.min_log_decay)
