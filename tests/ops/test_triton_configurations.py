"""The table of configurations: what it says of the shapes that were measured, and of those beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lawcat.ops.triton.configurations import Configuration, choose_configuration


def table(
    tokens: int, width: int = 64, states: int = 32, processors: int = 132, **options: Any
) -> Configuration:
    dtype = options.pop("dtype", torch.bfloat16)
    return choose_configuration(width, width, dtype, tokens, states, -2.5, processors, **options)


@pytest.mark.parametrize(
    ("width", "segments"),
    [(64, [256, 256, 384, 256, 512, 1024, 2048]), (128, [256, 256, 512, 1024, 2048, 2048, 2048])],
)
def test_segments_of_an_h100(width: int, segments: list[int]) -> None:
    """As measured: 1K to 64K tokens of 32 heads."""
    assert [table(1024 * 2**i, width).segment for i in range(7)] == segments


def test_segments_of_one_wave() -> None:
    """Only where they are then one wave, at about that size, of long sequences."""
    longer = [tokens for tokens in range(64, 20_000, 64) if table(tokens).segment == 384]
    assert longer == list(range(4096, 4609, 64))
    assert table(4096, 128).segment == 512
    assert {table(4096 // n, states=32 * n).segment for n in (2, 4, 8)} == {256}
    for processors in range(1, 400):
        configuration = table(4096, processors=processors)
        if configuration.segment == 384:
            assert 11 * 32 <= 3 * processors < 16 * 32


def test_where_the_scan_runs_beside_the_features_of_q() -> None:
    """In wide shapes, with features made once."""
    for tokens in (1, 4096, 2**20):
        assert [table(tokens, width).scan_with_queries for width in (16, 64, 66, 128)] == [
            False,
            False,
            True,
            True,
        ]
        assert not table(tokens, 256).scan_with_queries
        assert not table(tokens, 128, dtype=torch.float32).scan_with_queries
    assert choose_configuration(64, 128, torch.float16, 99, 1, -2.5, 132).scan_with_queries
