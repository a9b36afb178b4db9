"""Sizes of tiles and numbers of warps by shape: a search would cost minutes before the first step."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

# What a sub-block may decay in all, as a natural logarithm; below twice ``MAX_EXPONENT`` of ``blocks.py``.
_MAX_SUB_BLOCK_DECAY = 80.0
# exp(-44) = 2^-64 of a state is nothing beside what a token adds: stronger decays are taken as this, so that
# sums over a chunk stay finite and keep the digits of the weaker ones.
STRONGEST_LOG_DECAY = -44.0


@dataclass(frozen=True)
class Tuning:
    """How a kernel is compiled.

    Attributes:
        warps: Warps of a program.
        stages: Stages of software pipelining of its loop over chunks.
        registers: The most that a thread may have, or None for what the compiler takes.
    """

    warps: int
    stages: int = 1
    registers: int | None = None

    def options(self) -> dict[str, Any]:
        """Return the launch options."""
        return {"warps": self.warps, "stages": self.stages, "registers": self.registers}


@dataclass(frozen=True)
class Configuration:
    """How the kernels cut one shape up.

    Attributes:
        chunk: Tokens C of a chunk.
        sub_block: Tokens of a sub-block of a chunk that decays too much to be factored in one piece.
        value_block: Values a program of the output kernel computes, a power of two.
        segment: Tokens of a segment, a multiple of C: one program walks it.
        state: Of the state kernel.
        output: Of the output kernel.
        gradient_chunk: Tokens of a chunk in the backward kernels, not more than ``chunk``.
        gradient: Of the backward kernels.
        is_prepared: The forward makes features once, in a kernel of their own: that and the kernels that
            ``state`` and ``output`` are of are then those of ``prepared.py``.
        query_features: Of that kernel, for q.
        key_features: The same for k.
        feature_chunks: Chunks of a head that one of its programs makes.
        feature_taps: Taps of the convolution in one of its products, a power of two; 0 convolves before.
        query_heads: The most heads of q that one of its programs makes: they share a gate.
        key_heads: The most of k: they share a gate and their inputs.
        scan_with_queries: The scan runs beside the features of q, in one launch, and completes what each
            chunk's queries read of the normaliser.
    """

    chunk: int
    sub_block: int
    value_block: int
    segment: int
    state: Tuning
    output: Tuning
    gradient_chunk: int
    gradient: Tuning
    is_prepared: bool = False
    query_features: Tuning = Tuning(4)
    key_features: Tuning = Tuning(4)
    feature_chunks: int = 4
    feature_taps: int = 4
    query_heads: int = 1
    key_heads: int = 1
    scan_with_queries: bool = False


def sub_block_tokens(min_log_decay: float, chunk: int) -> int:
    """Return the tokens of the largest sub-block over which this decay can be factored.

    >>> sub_block_tokens(-2.5, 64), sub_block_tokens(-5.0, 64), sub_block_tokens(-0.1, 64)
    (32, 16, 64)
    >>> sub_block_tokens(float("-inf"), 64)
    1
    """
    lowest, tokens = max(min_log_decay, STRONGEST_LOG_DECAY), chunk
    while tokens > 1 and -lowest * tokens > _MAX_SUB_BLOCK_DECAY:
        tokens //= 2
    return tokens


@functools.lru_cache(maxsize=256)
def choose_configuration(
    feature_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    tokens: int,
    states: int,
    min_log_decay: float,
    processors: int,
) -> Configuration:
    """Return the configuration of a shape.

    Args:
        feature_dim: F.
        value_dim: D of the values.
        dtype: Of q, k and v.
        tokens: Of the longest sequence.
        states: Sequences times state heads: programs of one segment.
        min_log_decay: The bound of the log-decays.
        processors: Multiprocessors of the device.
    """
    wide = max(padded_width(feature_dim), padded_width(value_dim))
    gradient = Tuning(4, 2) if wide <= 64 else Tuning(8)
    sizes: dict[str, Any] = {"gradient_chunk": 32, "gradient": gradient}
    if wide <= 128 and dtype != torch.float32:
        size = tokens * states
        is_long = size >= 2**18
        is_narrow = wide <= 64
        segment = _segment_tokens(256, 2048, tokens, states, (4 if is_narrow else 1.9) * processors)
        # A multiprocessor holds three narrow programs: 4,096 tokens of 32 heads are 1.3 waves of an H100 in
        # segments of 256 tokens and one in segments of 384, 2% faster. Half and twice as many are slower in
        # other segments; many short sequences, as in training, were not measured.
        if (
            is_narrow and tokens >= 4096 and 2**17 <= size < 2**18
            and -(-tokens // 256) * states > 3 * processors >= -(-tokens // 384) * states
        ):  # fmt: skip
            segment = 384
        return Configuration(
            chunk=64,
            sub_block=sub_block_tokens(min_log_decay, 64),
            value_block=padded_width(value_dim),
            segment=segment,
            state=Tuning(4),
            output=Tuning(4, 3 if is_narrow else 2),
            is_prepared=True,
            query_features=Tuning(4, 1, 128 if is_narrow else 168),
            key_features=Tuning(4, 1, None if is_long else 128) if is_narrow else Tuning(4, 1, 168),
            feature_chunks=4 if is_long or not is_narrow else 2,
            # Wide weights of all taps would leave one program a multiprocessor.
            feature_taps=4 if is_narrow else 0,
            key_heads=4 if is_narrow and is_long else 1,
            # 8% of the time, all in the output kernel, which at this width waits for what it reads.
            scan_with_queries=not is_narrow,
            **sizes,
        )
    chunk = 64 if wide <= 64 else 32
    tuning = Tuning(4 if wide <= 64 else 8)
    return Configuration(
        chunk=chunk,
        sub_block=sub_block_tokens(min_log_decay, chunk),
        value_block=min(padded_width(value_dim), 64),
        segment=_segment_tokens(2 * chunk, 1024, tokens, states, 4 * processors),
        state=tuning,
        output=tuning,
        **sizes,
    )


def _segment_tokens(shortest: int, longest: int, tokens: int, states: int, programs: float) -> int:
    """Return the tokens of a segment: as many as leave so many programs, so that states are few."""
    segment = shortest
    while segment < longest and -(-tokens // (2 * segment)) * states >= programs:
        segment *= 2
    return segment


def padded_width(width: int) -> int:
    """Return the power of two of at least 16 that holds ``width`` columns in two equal halves.

    >>> padded_width(64), padded_width(96), padded_width(6)
    (64, 128, 16)
    """
    return max(16, 1 << (width - 1).bit_length())
