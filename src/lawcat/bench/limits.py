"""What a benchmark does not try: what cannot be, and what would take far too long."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lawcat.errors import ConfigurationError
from lawcat.ops import backend_names
from lawcat.ops.triton import support

# A cell that would take so many times what it may take is left out.
_PATIENCE = 10.0


def timed_backends() -> tuple[str, ...]:
    """Return our backends without the slow definition, and without kernels where an interpreter runs them.

    >>> "reference" in timed_backends()
    False
    """
    left_out = {"auto", "reference"} | ({"triton"} if support.is_interpreted() else set())
    return tuple(name for name in backend_names() if name not in left_out)


def check_arguments(device: torch.device, lengths: Sequence[int], cuda_graphs: bool) -> None:
    """Raise ``ConfigurationError`` for what no benchmark can do."""
    if cuda_graphs and device.type != "cuda":
        raise ConfigurationError(f"CUDA graphs need a GPU, and the device is {device.type}.")
    if not lengths or min(lengths) < 1:
        raise ConfigurationError(f"lengths={list(lengths)} must hold whole numbers of tokens, at least 1.")


class Limits:
    """Which contenders are left out at a length, since they would take far too long there."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last: dict[str, list[tuple[int, float]]] = {}

    def saw(self, contender: str, tokens: int, seconds: float) -> None:
        """Remember what a contender took at a length."""
        self._last.setdefault(contender, []).append((tokens, seconds))

    def reason(self, contender: str, tokens: int) -> str | None:
        """Return why it is left out at this length, None where it is not."""
        seen = self._last.get(contender, [])
        if not seen:
            return None
        last_tokens, last_s = seen[-1]
        exponent = 1.0
        if len(seen) > 1:
            before_tokens, before_s = seen[-2]
            exponent = math.log(last_s / before_s) / math.log(last_tokens / before_tokens)
        expected = last_s * (tokens / last_tokens) ** max(exponent, 0.0)
        if expected <= _PATIENCE * self._seconds:
            return None
        return f"would take about {expected:.0f} s a call; raise --seconds to measure it"
