"""Comparison of tensors that says where they differ most."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_near(
    actual: Tensor, expected: Tensor, tolerance: float, what: str = "tensor", least_scale: float = 0.0
) -> None:
    """Fail unless each entry differs by at most ``tolerance`` times the scale, naming the worst.

    The scale is the largest expected entry, or ``least_scale`` where that is larger.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = max(expected.abs().max().item(), least_scale) or 1.0
    difference = (actual - expected).abs() / scale
    # A NaN compares as neither larger nor smaller, so it is counted as the worst.
    difference = torch.where(difference.isnan(), torch.inf, difference)
    worst = int(difference.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape))
    error = difference.flatten()[worst].item()
    assert error <= tolerance, (
        f"{what} at {index}: {actual[index].item():.9g}, expected {expected[index].item():.9g}; "
        f"{error:.3g} of the scale {scale:.3g}, allowed {tolerance:.3g}; "
        f"{int((difference > tolerance).sum())} of {expected.numel()} entries are off"
    )
