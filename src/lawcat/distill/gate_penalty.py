"""A penalty on forgetting, so that gates are pulled towards holding what they have no reason to drop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lawcat.model.gate import DecayGate
from lawcat.model.modeling_lawcat import LawcatForCausalLM


class GatePenalty:
    """Sums, while ``watching``, the penalty of each gate that runs with a gradient.

    A gate's penalty is the mean of ``-log a * divisor`` over tokens and channels, which is
    ``softplus(-logit)``: 0.7 where a gate's logit is zero, and less and less the longer it holds.

    Args:
        student: The model whose gates are meant.
        weight: Factor of the sum.
    """

    def __init__(self, student: LawcatForCausalLM, weight: float) -> None:
        self._gates = [module for module in student.modules() if isinstance(module, DecayGate)]
        self._weight = weight if self._gates else 0.0
        self._sum: Tensor | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within this context every forward of a gate with a gradient counts."""
        gates = self._gates if self._weight else []
        handles = [gate.register_forward_hook(self._add) for gate in gates]
        try:
            yield
        finally:
            self._sum = None
            for handle in handles:
                handle.remove()

    def _add(self, gate: DecayGate, inputs: Any, logits: Tensor) -> None:
        if torch.is_grad_enabled():
            penalty = -gate.log_decay(logits).mean() * gate.divisor
            self._sum = penalty if self._sum is None else self._sum + penalty

    def take(self, *, is_mean_over_layers: bool) -> Tensor | float:
        """Return the weighted penalty since the last call, and forget it.

        Args:
            is_mean_over_layers: Whether the sum is divided by the number of gates.
        """
        found, self._sum = self._sum, None
        if found is None:
            return 0.0
        return self._weight * (found / len(self._gates) if is_mean_over_layers else found)
