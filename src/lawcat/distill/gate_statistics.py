"""How the gates are doing: a run whose gates saturate looks healthy in its loss and fails at length."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lawcat.model.gate import DecayGate
from lawcat.model.modeling_lawcat import LawcatForCausalLM

# The gradient of logsigmoid at the logit; below this, averaged over tokens, a channel hardly moves any more.
_SATURATED_GRADIENT = 1e-4


class GateStatistics:
    """Collects, while ``watching``, what the gates of each layer give."""

    def __init__(self) -> None:
        self._half_lives: list[Tensor] = []
        self._saturated: list[Tensor] = []

    @contextlib.contextmanager
    def watching(self, student: LawcatForCausalLM) -> Iterator[None]:
        """Within this context every forward of a gate is taken into account."""
        gates = [module for module in student.modules() if isinstance(module, DecayGate)]
        handles = [gate.register_forward_hook(self._record) for gate in gates]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _record(self, gate: DecayGate, inputs: Any, logits: Tensor) -> None:
        channels = gate.log_decay(logits.detach()).flatten(0, 1).flatten(1)  # [B*T, heads*width]
        gradient = -torch.expm1(channels * gate.divisor)  # sigmoid(-logit)
        at_bound = (channels <= gate.min_log_decay).float().mean(0) > 0.5
        self._saturated.append((gradient.mean(0) < _SATURATED_GRADIENT) | at_bound)
        self._half_lives.append(math.log(2) / (-channels.mean(0)).clamp(min=1e-9))

    def tensors(self) -> dict[str, Tensor]:
        """Return what ``summary`` does, on the gates' device, without waiting for it."""
        if not self._half_lives:
            return {}
        return {
            "gate_saturated_share": torch.cat(self._saturated).float().mean(),
            "gate_median_half_life_tokens": torch.cat(self._half_lives).median(),
        }

    def summary(self) -> dict[str, float]:
        """Return the share of saturated channels and the median half-life in tokens; empty without gates."""
        return {name: value.item() for name, value in self.tensors().items()}
