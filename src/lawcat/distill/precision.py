"""Which number format the frozen weights and the matrix products of training use."""

from __future__ import annotations

import time

import torch

from lawcat.distill.recipe import Precision


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of the frozen weights; what trains is float32 in any case.

    Args:
        precision: ``"auto"`` takes bfloat16 where the device computes it natively: a GPU that supports it, or
            a CPU on which a matrix product in bfloat16 is at least 1.5 times as fast as in float32.
        device: Where training runs.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type != "cpu":
        return torch.float32
    return torch.bfloat16 if _product_s(torch.float32) > 1.5 * _product_s(torch.bfloat16) else torch.float32


def _product_s(dtype: torch.dtype) -> float:
    """Best of a few times of one product of a small model's size."""
    a, b = torch.randn(512, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return min(times)
