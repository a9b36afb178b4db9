"""How tests run the kernels: what these allocate is filled with NaN, and few tokens cross many borders."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import kernel_device  # noqa: F401  # skips where there is no triton
from lawcat.ops.fused import linear_attention_mixer
from lawcat.ops.triton import mixer
from lawcat.ops.triton.configurations import choose_configuration


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every test of a module that imports it."""

    def full_of_nan(size: Any, **options: Any) -> Tensor:
        return torch.full(size, float("nan"), **options)

    monkeypatch.setattr(mixer, "allocate", full_of_nan)


def configure(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """Chunks and segments of 16 tokens, so that few tokens cross borders, and what else is given."""
    fields = {"chunk": 16, "segment": 16, "gradient_chunk": 16} | fields

    def choose(*arguments: Any) -> Any:
        table = choose_configuration(*arguments)
        return dataclasses.replace(table, sub_block=min(fields["chunk"], table.sub_block), **fields)

    monkeypatch.setattr(mixer, "choose_configuration", choose)


def kernels(**arguments: Any) -> Any:
    """Call the mixer on the kernels."""
    return linear_attention_mixer(**arguments, backend="triton")
