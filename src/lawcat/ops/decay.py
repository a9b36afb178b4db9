"""The gate's activation (equation 5). Legend: see ``shapes.py``."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .precision import at_least_float32


def log_decay_of(logits: Tensor, divisor: float, min_log_decay: float) -> Tensor:
    """Return ``log a = max(logsigmoid(logits) / divisor, min_log_decay)`` in float32 at least.

    Example:
        >>> import torch
        >>> log_decay_of(torch.tensor([0.0, -1e4]), divisor=16.0, min_log_decay=-2.5)
        tensor([-0.0433, -2.5000])
    """
    return (F.logsigmoid(at_least_float32(logits)) / divisor).clamp(min=min_log_decay)
