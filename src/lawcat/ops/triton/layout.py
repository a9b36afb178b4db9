"""The kernels of a call with the constants that they are compiled with. Legend: ``ops/shapes.py``."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl

from .backward import (
    gate_gradient_kernel,
    key_gradient_kernel,
    map_gradient_kernel,
    query_gradient_kernel,
    state_gradient_kernel,
)
from .configurations import STRONGEST_LOG_DECAY, Configuration, padded_width
from .forward import gate_kernel, output_kernel, scan_kernel, state_kernel
from .launch import Launch
from .prepared import (
    exponent_kernel,
    feature_kernel,
    prepared_output_kernel,
    prepared_state_kernel,
    query_feature_scan_kernel,
    strong_output_kernel,
)

# Tokens of a program of ``gate_gradient_kernel``.
GATE_ROWS = 32

_DOT_DTYPES = {tl.float32: torch.float32, tl.bfloat16: torch.bfloat16}


@dataclass(frozen=True)
class MixerOptions:
    """What a call computes, beside its tensors.

    Attributes:
        is_logit: The gate is logits, to be activated; else log-decays.
        gate_divisor: ``log a = logsigmoid(logit) / gate_divisor``.
        min_log_decay: The bound of the log-decays, to which they are clamped.
        normalize: Divide by the sum of weights.
        eps: Added to it.
        configuration: Instead of the one from the table.
    """

    is_logit: bool = False
    gate_divisor: float = 16.0
    min_log_decay: float = -2.5
    normalize: bool = True
    eps: float = 1e-6
    configuration: Configuration | None = None


class Layout:
    """What calls share that differ in length only: the kernels with their constants.

    Attributes:
        options: Of the call.
        configuration: How it is cut up.
        shape: The constants that all kernels take.
        heads: H.
        chunks_of_segment: Chunks of a segment.
        activation: What the kernels that read the gate take: divisor and bound.
        eps: Added to the normaliser.
        compiled: Device, with a gradient or not, from a state or not: what was compiled ahead.
    """

    def __init__(
        self, options: MixerOptions, configuration: Configuration, shape: dict[str, Any], heads: int
    ) -> None:
        self.options = options
        self.configuration = configuration
        self.shape = shape
        self.heads = heads
        self.chunks_of_segment = configuration.segment // configuration.chunk
        # Floats, since the kernels are compiled anew for integers.
        self.activation = float(options.gate_divisor), max(float(options.min_log_decay), STRONGEST_LOG_DECAY)
        self.eps = float(options.eps)
        self.compiled: set[tuple[torch.device, bool, bool]] = set()

    def constants(self, *names: str) -> dict[str, Any]:
        """Return those of the constants that a kernel takes."""
        return {name: self.shape[name] for name in names}

    @functools.cached_property
    def feature_dtype(self) -> torch.dtype:
        """Of features that are made once."""
        return _DOT_DTYPES[self.shape["DOT"]]

    @functools.cached_property
    def of_gradient(self) -> Layout:
        """The same with the chunks of the backward kernels, in the same segments."""
        configuration, chunk = self.configuration, self.configuration.gradient_chunk
        configuration = replace(configuration, chunk=chunk, sub_block=min(chunk, configuration.sub_block))
        # A program holds all values: the gradient of a weight is a sum over them.
        shape = {**self.shape, "C": chunk, "BV": padded_width(self.shape["DV"]), "V_BLOCKS": 1}
        return Layout(self.options, configuration, shape, self.heads)

    @functools.cached_property
    def decay_sums(self) -> Launch:
        """Of ``gate_kernel``, by chunk."""
        heads, width = self.shape["GATE_HEADS"], self.shape["GATE_WIDTH"]
        return Launch(
            gate_kernel, heads,
            GATE_HEADS=heads, GATE_WIDTH=width, WP=1 << (width - 1).bit_length(),
            IS_LOGIT=self.options.is_logit, **self.constants("C", "MASKED", "PACKED", "INTERPRETED"),
            warps=4,
        )  # fmt: skip

    @functools.cached_property
    def states(self) -> Launch:
        """Of ``state_kernel``, by segment."""
        each = self.shape["N"] * self.shape["V_BLOCKS"]
        return Launch(state_kernel, each, **self.shape, **self.configuration.state.options())

    @functools.cached_property
    def scans(self) -> dict[tuple[bool, bool], Launch]:
        """Of ``scan_kernel``, by sequence: by whether there is an initial state, and whether in reverse."""
        n, width, values = self.shape["N"], self.shape["F"], self.shape["DV"]
        block_f, block_v = min(16, padded_width(width)), min(64, padded_width(values))
        blocks_f, blocks_v = -(-width // block_f), -(-values // block_v)
        return {
            (has_initial, reverse): Launch(
                scan_kernel, n * blocks_f * blocks_v,
                N=n, F=width, DV=values, BF=block_f, BV=block_v, F_BLOCKS=blocks_f, V_BLOCKS=blocks_v,
                HAS_INITIAL=has_initial, REVERSE=reverse, PACKED=self.shape["PACKED"], STAGES=4,
                warps=2,
            )
            for has_initial in (False, True)
            for reverse in (False, True)
        }  # fmt: skip

    def _by_save_sums(self, kernel: Any, **constants: Any) -> tuple[Launch, Launch]:
        """Of a kernel that writes the output, by segment: without and with the sums of weights."""
        constants |= {"H": self.heads, "NORMALIZE": self.options.normalize}
        each = self.heads * self.shape["V_BLOCKS"]
        without, with_sums = (Launch(kernel, each, SAVE_SUMS=save, **constants) for save in (False, True))
        return without, with_sums

    @functools.cached_property
    def outputs(self) -> tuple[Launch, Launch]:
        """Of ``output_kernel``, by segment."""
        configuration = self.configuration
        return self._by_save_sums(
            output_kernel, SUB=configuration.sub_block, **self.shape, **configuration.output.options()
        )

    @functools.cached_property
    def exponents(self) -> Launch:
        """Of ``exponent_kernel``, by chunk."""
        names = ("GATE_HEADS", "GATE_WIDTH", "F", "FP", "C", "MASKED", "PACKED", "INTERPRETED")
        constants = self.constants(*names)
        return Launch(
            exponent_kernel, self.shape["GATE_HEADS"],
            IS_LOGIT=self.options.is_logit, **constants, warps=4,
        )  # fmt: skip

    def _of_features(self, heads: int, group: int) -> dict[str, Any]:
        """What kernels take that make features of so many heads, a group of them in a program."""
        taps = _power_of_two(self.shape["TAPS"])
        constants = self.constants(
            "N", "GATE_HEADS", "D", "F", "DP", "FP", "C", "TAPS", "HAS_BEFORE", "HAS_MAP", "MASKED", "PACKED",
            "DOT", "PRECISION", "INTERPRETED",
        )  # fmt: skip
        configuration = self.configuration
        block, run = min(configuration.feature_taps, taps), configuration.feature_chunks
        return {"HEADS": heads, "GROUP": group, "TAPS_P": taps, "BLOCK": block, "RUN": run, **constants}

    @functools.cached_property
    def _query_group(self) -> int:
        return math.gcd(self.configuration.query_heads, self.heads // self.shape["GATE_HEADS"])

    @property
    def query_programs(self) -> int:
        """Programs of a run of chunks that make features of q."""
        return self.heads // self._query_group

    @functools.cached_property
    def query_features(self) -> Launch:
        """The features of q, by run of chunks."""
        return Launch(
            feature_kernel, self.query_programs,
            X_HEADS=self.heads, IS_KEY=False, **self._of_features(self.heads, self._query_group),
            **self.configuration.query_features.options(),
        )  # fmt: skip

    @functools.cached_property
    def key_features(self) -> Launch:
        """The features of k, by run of chunks."""
        x_heads, heads = self.shape["K_HEADS"], self.shape["N"]
        group = 1  # each head has inputs of its own from before
        if not self.shape["HAS_BEFORE"]:
            group = math.gcd(self.configuration.key_heads, heads // max(x_heads, self.shape["GATE_HEADS"]))
        return Launch(
            feature_kernel, heads // group,
            X_HEADS=x_heads, IS_KEY=True, **self._of_features(heads, group),
            **self.configuration.key_features.options(),
        )  # fmt: skip

    @functools.cached_property
    def _scan_blocks(self) -> tuple[int, int]:
        """Of the scan beside the features of q: features of a program, for all values; programs of a head."""
        # Of a sequence of 32 heads that is 128 programs, about one for each multiprocessor.
        block = max(16, self.shape["FP"] // 4)
        return block, -(-self.shape["F"] // block)

    @property
    def scan_programs(self) -> int:
        """Programs of a sequence of that scan."""
        return self._scan_blocks[1] * int(self.shape["N"])

    @functools.cached_property
    def query_features_and_scan(self) -> dict[bool, Launch]:
        """Of ``query_feature_scan_kernel``, by program: by whether there is an initial state."""
        (block, blocks), values = self._scan_blocks, self.shape["DV"]
        return {
            has_initial: Launch(
                query_feature_scan_kernel, 1,
                **self._of_features(self.heads, self._query_group),
                DV=values, BF=block, BV=padded_width(values), F_BLOCKS=blocks, HAS_INITIAL=has_initial,
                STAGES=4, CHUNKS=_power_of_two(self.chunks_of_segment),
                **self.configuration.query_features.options(),
            )
            for has_initial in (False, True)
        }  # fmt: skip

    @functools.cached_property
    def _of_products(self) -> dict[str, Any]:
        names = ("V_HEADS", "GATE_HEADS", "N", "F", "DV", "FP", "BV", "V_BLOCKS", "C", "PACKED", "DOT")
        return self.constants(*names, "PRECISION")

    @functools.cached_property
    def prepared_states(self) -> Launch:
        """Of ``prepared_state_kernel``, by segment."""
        each = self.shape["N"] * self.shape["V_BLOCKS"]
        tuning = self.configuration.state.options()
        return Launch(prepared_state_kernel, each, **self._of_products, **tuning)

    @functools.cached_property
    def may_be_strong(self) -> bool:
        """Whether a channel may decay too much in a chunk for features that are made once."""
        return self.configuration.sub_block < self.configuration.chunk

    @functools.cached_property
    def prepared_outputs(self) -> tuple[Launch, Launch]:
        """Of ``prepared_output_kernel``, by segment."""
        return self._by_save_sums(
            prepared_output_kernel, MAY_BE_STRONG=self.may_be_strong, **self._of_products,
            **self.configuration.output.options(),
        )  # fmt: skip

    @functools.cached_property
    def strong_outputs(self) -> tuple[Launch, Launch]:
        """Of ``strong_output_kernel``, by segment."""
        chunk = max(16, min(32, self.configuration.sub_block))
        return self._by_save_sums(
            strong_output_kernel, SUB=min(chunk, self.configuration.sub_block),
            IS_LOGIT=self.options.is_logit, **{**self.shape, "C": chunk}, warps=4,
        )  # fmt: skip

    @functools.cached_property
    def _of_gradients(self) -> dict[str, Any]:
        normalize = self.options.normalize
        return {
            "H": self.heads,
            "NORMALIZE": normalize,
            **self.shape,
            **self.configuration.gradient.options(),
        }

    @functools.cached_property
    def state_gradients(self) -> Launch:
        """Of ``state_gradient_kernel``, by segment."""
        return Launch(state_gradient_kernel, self.shape["N"], **self._of_gradients)

    @functools.cached_property
    def query_gradients(self) -> Launch:
        """Of ``query_gradient_kernel``, by segment."""
        sub_block = self.configuration.sub_block
        return Launch(query_gradient_kernel, self.heads, SUB=sub_block, **self._of_gradients)

    @functools.cached_property
    def key_gradients(self) -> Launch:
        """Of ``key_gradient_kernel``, by segment."""
        sub_block = self.configuration.sub_block
        return Launch(key_gradient_kernel, self.shape["N"], SUB=sub_block, **self._of_gradients)

    @functools.cached_property
    def gate_gradients(self) -> Launch:
        """Of ``gate_gradient_kernel``, by rows of ``GATE_ROWS`` tokens."""
        heads, width = self.shape["GATE_HEADS"], self.shape["GATE_WIDTH"]
        return Launch(
            gate_gradient_kernel, heads,
            GATE_HEADS=heads, N=self.shape["N"], W=width, WP=1 << (width - 1).bit_length(), C=GATE_ROWS,
            IS_LOGIT=self.options.is_logit, **self.constants("MASKED", "INTERPRETED"),
            warps=4,
        )  # fmt: skip

    def _map_gradients(self, x_heads: int, heads: int) -> Launch:
        """Of ``map_gradient_kernel``, by segment."""
        constants = self.constants(
            "N", "D", "F", "DP", "FP", "C", "TAPS", "HAS_BEFORE", "MASKED", "PACKED", "DOT", "PRECISION"
        )
        return Launch(
            map_gradient_kernel, heads,
            X_HEADS=x_heads, HEADS=heads, TAPS_P=_power_of_two(self.shape["TAPS"]), **constants,
            **self.configuration.gradient.options(),
        )  # fmt: skip

    @functools.cached_property
    def query_map_gradients(self) -> Launch:
        """Of the map, as q reads it."""
        return self._map_gradients(self.heads, self.heads)

    @functools.cached_property
    def key_map_gradients(self) -> Launch:
        """Of the map, as k reads it."""
        return self._map_gradients(self.shape["K_HEADS"], self.shape["N"])


def _power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()
