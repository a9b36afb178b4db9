"""Sizes of tiles and numbers of warps by shape: a search would cost minutes before the first step."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Half of what a sub-block may decay, as a natural logarithm: exp(40) is far from what float32 and bfloat16
# hold also when it is multiplied with values and summed.
_MAX_HALF_DECAY = 40.0
_SMALLEST_SUB_BLOCK = 16
# A decay stronger than this a token cannot be factored over the smallest sub-block.
STRONGEST_LOG_DECAY = -2 * _MAX_HALF_DECAY / _SMALLEST_SUB_BLOCK


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

    def options(self) -> dict[str, int | None]:
        """Return the launch options."""
        return {"warps": self.warps, "stages": self.stages, "registers": self.registers}


@dataclass(frozen=True)
class Configuration:
    """How the kernels cut one shape up.

    Attributes:
        chunk: Tokens C of a chunk.
        sub_block: Tokens of a sub-block, a divisor of C.
        value_block: Values a program of the output kernel computes, a power of two.
        segment: Tokens of a segment, a multiple of C: one program walks it.
        state: Of the state kernel.
        output: Of the output kernel.
    """

    chunk: int
    sub_block: int
    value_block: int
    segment: int
    state: Tuning
    output: Tuning


def sub_block_tokens(min_log_decay: float, chunk: int) -> int:
    """Return the tokens of the largest sub-block over which this decay can be factored, 0 where none is.

    >>> sub_block_tokens(-2.5, 64), sub_block_tokens(-5.0, 64), sub_block_tokens(-0.1, 64)
    (32, 16, 64)
    """
    tokens = chunk
    while tokens >= _SMALLEST_SUB_BLOCK:
        if -min_log_decay * tokens <= 2 * _MAX_HALF_DECAY:
            return tokens
        tokens //= 2
    return 0


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
        min_log_decay: The bound of the log-decays, not below ``STRONGEST_LOG_DECAY``.
        processors: Multiprocessors of the device.
    """
    wide = max(padded_width(feature_dim), padded_width(value_dim))
    is_float32 = dtype == torch.float32
    # Chunks of 64 are what Hopper's matrix unit takes, with 4 warps; wider tiles do not fit into registers.
    chunk = 64 if wide <= 64 else 32
    warps = 4 if wide <= 64 else 8
    value_block = min(padded_width(value_dim), 64 if wide >= 256 or is_float32 else 128)
    # Enough programs to fill the device four times over, and segments long enough that their states are
    # small beside q, k and v.
    segment = 2 * chunk
    while segment < 1024 and -(-tokens // (2 * segment)) * states >= 4 * processors:
        segment *= 2
    return Configuration(
        chunk=chunk,
        sub_block=sub_block_tokens(min_log_decay, chunk),
        value_block=value_block,
        segment=segment,
        state=Tuning(warps),
        output=Tuning(warps),
    )


def padded_width(width: int) -> int:
    """Return the power of two of at least 16 that holds ``width`` columns in two equal halves.

    >>> padded_width(64), padded_width(96), padded_width(6)
    (64, 128, 16)
    """
    return max(16, 1 << (width - 1).bit_length())
