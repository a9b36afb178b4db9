"""What training reads: one sequence of tokens with a weight each, and a batch of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """A full sequence of T tokens. Documents in it are separated by EOS.

    Args:
        input_ids: [T], int64.
        loss_weight: [T], float32: what the prediction of token t from those before it counts; 0 at t = 0.
        is_answer: [T], whether a token belongs to the answer of a task sample.
        source: Name of the source it comes from.
        kl_factor: [T], float32: what the divergence from the teacher counts beside the other losses at token
            t, 1 being as much as `recovery.kl_weight` says; None for 1 everywhere.
    """

    input_ids: NDArray[np.int64]
    loss_weight: NDArray[np.float32]
    is_answer: NDArray[np.bool_]
    source: str
    kl_factor: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences side by side.

    Args:
        input_ids: [B, T], int64.
        loss_weight: [B, T], float32, as in `PackedSequence`.
        is_answer: [B, T], bool.
        sources: The name of each sequence's source.
        kl_factor: [B, T], float32, as in `PackedSequence`; None for 1 everywhere.
        total_weight: [], float32: the weights of the whole step's tokens, of which other processes have
            other sequences; None where this batch is the whole step.
    """

    input_ids: Tensor
    loss_weight: Tensor
    is_answer: Tensor
    sources: tuple[str, ...]
    kl_factor: Tensor | None = None
    total_weight: Tensor | None = None

    @classmethod
    def stack(cls, sequences: list[PackedSequence]) -> Batch:
        """Return sequences of one length as a batch."""
        # Whether or not a factor is set in these: a graph of a step is made for the tensors of its batch.
        factors = [
            np.ones_like(one.loss_weight) if one.kl_factor is None else one.kl_factor for one in sequences
        ]
        return cls(
            torch.from_numpy(np.stack([sequence.input_ids for sequence in sequences])),
            torch.from_numpy(np.stack([sequence.loss_weight for sequence in sequences])),
            torch.from_numpy(np.stack([sequence.is_answer for sequence in sequences])),
            tuple(sequence.source for sequence in sequences),
            torch.from_numpy(np.stack(factors)),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that there are, by field."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with what `function` makes of each of its tensors."""
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`."""
        return self.map(lambda tensor: tensor.to(device))
