"""What training reads: one sequence of tokens with a weight each, and a batch of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """

    input_ids: NDArray[np.int64]
    loss_weight: NDArray[np.float32]
    is_answer: NDArray[np.bool_]
    source: str


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences side by side.

    Args:
        input_ids: [B, T], int64.
        loss_weight: [B, T], float32, as in `PackedSequence`.
        is_answer: [B, T], bool.
        sources: The name of each sequence's source.
    """

    input_ids: Tensor
    loss_weight: Tensor
    is_answer: Tensor
    sources: tuple[str, ...]

    @classmethod
    def stack(cls, sequences: list[PackedSequence]) -> Batch:
        """Return sequences of one length as a batch."""
        return cls(
            torch.from_numpy(np.stack([sequence.input_ids for sequence in sequences])),
            torch.from_numpy(np.stack([sequence.loss_weight for sequence in sequences])),
            torch.from_numpy(np.stack([sequence.is_answer for sequence in sequences])),
            tuple(sequence.source for sequence in sequences),
        )

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            loss_weight=self.loss_weight.to(device),
            is_answer=self.is_answer.to(device),
        )
