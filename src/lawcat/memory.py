"""Memory that is no more in use."""

from __future__ import annotations

import gc

import torch


def free_memory() -> None:
    """Give back what nothing refers to any more, a GPU's too, so that the next model or batch fits."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
