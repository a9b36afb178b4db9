"""Host side of the kernels: from tensors to launches. Legend: ``ops/shapes.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import BackendError
from .backward import (
    gate_gradient_kernel,
    key_gradient_kernel,
    map_gradient_kernel,
    query_gradient_kernel,
    state_gradient_kernel,
)
from .configurations import STRONGEST_LOG_DECAY, Configuration, choose_configuration, padded_width
from .forward import gate_kernel, output_kernel, scan_kernel, state_kernel
from .prepared import (
    exponent_kernel,
    feature_kernel,
    prepared_output_kernel,
    prepared_state_kernel,
    strong_output_kernel,
)

# Launch what was compiled before without asking Triton what to compile, which costs it tens of microseconds.
reuse_compiled = False
_compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

# Tests put a function here that fills what it allocates with NaN: nothing may be read before it is written.
allocate: Any = torch.empty


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


@dataclass
class MixerInputs:
    """The tensors of a call; all contiguous.

    Attributes:
        q: [B, T, H, D], or features [B, T, H, F] without a map.
        k: [B, T, G, D], or features [B, T, N, F] without a map.
        v: [B, T, G or N, D].
        gate: Logits or log-decays [B, T, G or N, F or 1].
        q_taps: [H * D, K], or None for no convolution.
        k_taps: [N * D, K], or None.
        map_weight: [N, D, F/2], or None.
        initial_state: [S, N, F, D + 1] float32, S sequences, or None for zeros.
        q_before: The K - 1 inputs of q's convolution before the first token [S, H * D, K - 1], or None.
        k_before: The same of k [S, N * D, K - 1].
        keep: [B, T] bool, False for padding, or None.
        boundaries: Where the sequences of a packed batch (B = 1) start, and its end; None for B sequences.
        num_state_heads: N.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    q_taps: Tensor | None = None
    k_taps: Tensor | None = None
    map_weight: Tensor | None = None
    initial_state: Tensor | None = None
    q_before: Tensor | None = None
    k_before: Tensor | None = None
    keep: Tensor | None = None
    boundaries: tuple[int, ...] | None = None
    num_state_heads: int = 0


@dataclass
class Plan:
    """One call cut up: sizes, the configuration, and the constants that all its kernels take."""

    inputs: MixerInputs
    options: MixerOptions
    configuration: Configuration
    num_sequences: int
    num_segments: int  # a sequence; of a packed batch, in all
    all_segments: int
    table: Tensor | None
    ranges: Tensor | None
    shape: dict[str, Any] = field(default_factory=dict)

    def for_gradient(self) -> Plan:
        """Return the same with the chunks of the backward kernels, in the same segments."""
        chunk = self.configuration.gradient_chunk
        configuration = replace(
            self.configuration, chunk=chunk, sub_block=min(chunk, self.configuration.sub_block)
        )
        return replace(self, configuration=configuration, shape={**self.shape, "C": chunk})

    def constants(self, *names: str) -> dict[str, Any]:
        """Return those of the constants that a kernel takes."""
        return {name: self.shape[name] for name in names}

    @property
    def chunks_of_segment(self) -> int:
        """Chunks of a segment."""
        return self.configuration.segment // self.configuration.chunk

    @property
    def size(self) -> tuple[int, int, int]:
        """Tokens and segments of a sequence, tokens of a segment: what a kernel finds its place by."""
        return self.inputs.q.shape[1], self.num_segments, self.configuration.segment


def dot_dtype(dtype: torch.dtype) -> Any:
    """Return the type of the operands of matrix products for inputs of this dtype.

    bfloat16 also for float16: decay factors reach exp(40).
    """
    if dtype == torch.float32 or triton.knobs.runtime.interpret:  # the interpreter has no bfloat16 products
        return tl.float32
    return tl.bfloat16


_DOT_DTYPES = {tl.float32: torch.float32, tl.bfloat16: torch.bfloat16}


def _precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def processors(device: torch.device) -> int:
    """Return how many multiprocessors the device has."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def make_plan(inputs: MixerInputs, options: MixerOptions) -> Plan:
    """Cut a call up into segments."""
    q, v = inputs.q, inputs.v
    batch, tokens = q.shape[:2]
    n = inputs.num_state_heads
    feature_dim = q.shape[3] if inputs.map_weight is None else 2 * inputs.map_weight.shape[2]
    lengths = [tokens] * batch
    if inputs.boundaries is not None:
        lengths = [b - a for a, b in zip(inputs.boundaries, inputs.boundaries[1:], strict=False)]
    configuration = options.configuration or choose_configuration(
        feature_dim, v.shape[3], q.dtype, sum(lengths) // max(1, len(lengths)), n * len(lengths),
        options.min_log_decay, processors(q.device),
    )  # fmt: skip
    segment = configuration.segment
    table = ranges = None
    if inputs.boundaries is None:
        num_segments = -(-tokens // segment)
        all_segments = num_segments * batch
    else:
        rows, first = [], [0]
        for index, (start, length) in enumerate(zip(inputs.boundaries, lengths, strict=False)):
            rows += [(start, t, min(t + segment, length), index, length) for t in range(0, length, segment)]
            first.append(len(rows))
        num_segments = all_segments = len(rows)
        table = torch.tensor(rows, dtype=torch.int32).reshape(-1, 5).to(q.device, non_blocking=True)
        ranges = torch.tensor(first, dtype=torch.int32).to(q.device, non_blocking=True)
    value_block = min(configuration.value_block, padded_width(v.shape[3]))
    plan = Plan(inputs, options, configuration, len(lengths), num_segments, all_segments, table, ranges)
    plan.shape = {
        "K_HEADS": inputs.k.shape[2],
        "V_HEADS": v.shape[2],
        "GATE_HEADS": inputs.gate.shape[2],
        "GATE_WIDTH": inputs.gate.shape[3],
        "N": n,
        "D": q.shape[3],
        "F": feature_dim,
        "DV": v.shape[3],
        "DP": padded_width(q.shape[3]),
        "FP": padded_width(feature_dim),
        "BV": value_block,
        "V_BLOCKS": -(-v.shape[3] // value_block),
        "C": configuration.chunk,
        "TAPS": 0 if inputs.q_taps is None else inputs.q_taps.shape[1],
        "HAS_BEFORE": inputs.q_before is not None,
        "HAS_MAP": inputs.map_weight is not None,
        "MASKED": inputs.keep is not None,
        "PACKED": inputs.boundaries is not None,
        "DOT": dot_dtype(q.dtype),
        "PRECISION": _precision(q.dtype),
        "INTERPRETED": triton.knobs.runtime.interpret,
    }
    return plan


def launch(
    kernel: Any,
    programs: int,
    *arguments: Any,
    warps: int,
    stages: int = 1,
    registers: int | None = None,
    **constants: Any,
) -> None:
    """Run a kernel on a grid of one dimension. The first of the arguments is a tensor."""
    if reuse_compiled:
        key = (
            kernel, arguments[0].device, warps, stages, registers,
            *map(_what_is_compiled_for, arguments), *constants.items(),
        )  # fmt: skip
        if key in _compiled:
            compiled, values = _compiled[key]
            compiled[programs, 1, 1](*arguments, *values)
            return
    try:
        compiled = kernel[(programs,)](
            *arguments, **constants, num_warps=warps, num_stages=stages, maxnreg=registers
        )
    except triton.runtime.errors.OutOfResources as error:
        raise BackendError(
            f"{kernel.fn.__name__} needs more of the GPU than it has: {error}. Use backend='torch' (for a "
            "whole program, the environment variable LAWCAT_BACKEND=torch)."
        ) from error
    if reuse_compiled and compiled is not None:  # the interpreter compiles nothing
        names = kernel.arg_names[len(arguments) :]
        _compiled[key] = compiled, tuple(constants[name] for name in names)


def _what_is_compiled_for(argument: Any) -> Any:
    """Return what of an argument a compiled kernel depends on: not an integer's value, for none."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return "int64" if argument >= 2**31 else int
    return None if argument is None else type(argument)


def decay_sums(plan: Plan) -> Tensor:
    """Return the sums of log-decays (base 2) since the start of each chunk, in the gate's shape, float32."""
    inputs, options, configuration = plan.inputs, plan.options, plan.configuration
    gate = inputs.gate
    sums: Tensor = allocate(gate.shape, dtype=torch.float32, device=gate.device)
    num_chunks = plan.chunks_of_segment
    heads, width = gate.shape[2:]
    launch(
        gate_kernel, plan.all_segments * num_chunks * heads,
        gate, sums, inputs.keep, plan.table, *plan.size, num_chunks,
        options.gate_divisor, max(options.min_log_decay, STRONGEST_LOG_DECAY),
        GATE_HEADS=heads, GATE_WIDTH=width, WP=1 << (width - 1).bit_length(), C=configuration.chunk,
        IS_LOGIT=options.is_logit,
        **plan.constants("MASKED", "PACKED", "INTERPRETED"),
        warps=4,
    )  # fmt: skip
    return sums


@dataclass
class States:
    """States at the borders of segments, with a row more than segments for each sequence.

    Attributes:
        states: [segments + S, N, D, F]: what a segment adds; after the scan, the state before it.
        normalisers: The same of the normaliser [segments + S, N, F].
        decays: The segments' sums of log-decays [segments + S, N, F].
        strongest: The least sum of log-decays of a chunk of each segment [segments + S, N].
        final: The state after each sequence [S, N, F, D + 1].
    """

    states: Tensor
    normalisers: Tensor
    decays: Tensor
    strongest: Tensor
    final: Tensor


def allocate_states(plan: Plan) -> States:
    """Return room for the states."""
    n, width, values = plan.shape["N"], plan.shape["F"], plan.shape["DV"]
    options = {"dtype": torch.float32, "device": plan.inputs.q.device}
    rows = plan.all_segments + plan.num_sequences
    return States(
        allocate((rows, n, values, width), **options),
        allocate((rows, n, width), **options),
        allocate((rows, n, width), **options),
        allocate((rows, n), **options),
        allocate((plan.num_sequences, n, width, values + 1), **options),
    )


def scan(
    plan: Plan,
    states: Tensor,
    normalisers: Tensor,
    decays: Tensor,
    initial: Tensor | None,
    final: Tensor,
    *,
    reverse: bool,
) -> None:
    """Replace what each segment adds by the state before it (after it in reverse); see ``scan_kernel``."""
    n, values, width = states.shape[1:]
    block_f, block_v = min(16, padded_width(width)), min(64, padded_width(values))
    blocks_f, blocks_v = -(-width // block_f), -(-values // block_v)
    launch(
        scan_kernel, plan.num_sequences * n * blocks_f * blocks_v,
        states, normalisers, decays, initial, final, plan.ranges, plan.num_segments,
        N=n, F=width, DV=values, BF=block_f, BV=block_v, F_BLOCKS=blocks_f, V_BLOCKS=blocks_v,
        HAS_INITIAL=initial is not None, REVERSE=reverse, PACKED=plan.ranges is not None, STAGES=4,
        warps=2,
    )  # fmt: skip


@dataclass
class Forward:
    """What the forward gives and the backward needs.

    Attributes:
        output: [B, T, H, D].
        final: The state after each sequence [S, N, F, D + 1].
        states: The state before each segment and after the last [segments + S, N, D, F].
        normalisers: The same of the normaliser [segments + S, N, F].
        strongest: The least sum of log-decays of a chunk of each segment [segments + S, N].
        weight_sums: What the output was divided by, less eps [B, T, H], where it was asked for.
    """

    output: Tensor
    final: Tensor
    states: Tensor
    normalisers: Tensor
    strongest: Tensor
    weight_sums: Tensor | None


def forward(plan: Plan, *, save_sums: bool = False) -> Forward:
    """Run the forward kernels; ``save_sums`` keeps what the backward needs of the normaliser."""
    q, v = plan.inputs.q, plan.inputs.v
    batch, tokens, heads = q.shape[:3]
    output = allocate((batch, tokens, heads, v.shape[3]), dtype=v.dtype, device=v.device)
    weight_sums = None
    if save_sums and plan.options.normalize:
        weight_sums = allocate((batch, tokens, heads), dtype=torch.float32, device=v.device)
    states = allocate_states(plan)
    run = _forward_prepared if plan.configuration.is_prepared else _forward
    run(plan, states, output, weight_sums)
    return Forward(output, states.final, states.states, states.normalisers, states.strongest, weight_sums)


def _forward(plan: Plan, states: States, output: Tensor, weight_sums: Tensor | None) -> None:
    """Run the kernels that make features wherever they need them."""
    inputs, configuration, shape = plan.inputs, plan.configuration, plan.shape
    sums = decay_sums(plan)
    launch(
        state_kernel, plan.all_segments * shape["N"] * shape["V_BLOCKS"],
        inputs.k, inputs.v, sums, inputs.k_taps, inputs.k_before, inputs.map_weight, inputs.keep, plan.table,
        states.states, states.normalisers, states.decays, states.strongest, *plan.size,
        **shape, **configuration.state.options(),
    )  # fmt: skip
    scan(
        plan, states.states, states.normalisers, states.decays, inputs.initial_state, states.final,
        reverse=False,
    )  # fmt: skip
    heads = inputs.q.shape[2]
    launch(
        output_kernel, plan.all_segments * heads * shape["V_BLOCKS"],
        inputs.q, inputs.k, inputs.v, sums, inputs.q_taps, inputs.k_taps, inputs.q_before, inputs.k_before,
        inputs.map_weight, inputs.keep, plan.table, states.states, states.normalisers, states.strongest,
        output, weight_sums, *plan.size, plan.options.eps,
        H=heads, SUB=configuration.sub_block, NORMALIZE=plan.options.normalize,
        SAVE_SUMS=weight_sums is not None, **shape, **configuration.output.options(),
    )  # fmt: skip


def _forward_prepared(plan: Plan, states: States, output: Tensor, weight_sums: Tensor | None) -> None:
    """Run the kernels of ``prepared.py``."""
    inputs, options, configuration, shape = plan.inputs, plan.options, plan.configuration, plan.shape
    heads, n, width, chunk = inputs.q.shape[2], shape["N"], shape["FP"], configuration.chunk
    chunks = plan.all_segments * plan.chunks_of_segment
    of_float32: dict[str, Any] = {"dtype": torch.float32, "device": inputs.q.device}
    z_added, z_exponents = (allocate((chunks, n, width), **of_float32) for _ in range(2))
    exponents = allocate((chunks, shape["GATE_HEADS"], 2, width), **of_float32)
    of_features = {"dtype": _DOT_DTYPES[shape["DOT"]], "device": inputs.q.device}
    decays = allocate((chunks, shape["GATE_HEADS"], chunk, width), **of_features)
    activation = options.gate_divisor, max(options.min_log_decay, STRONGEST_LOG_DECAY)
    size = (*plan.size, plan.chunks_of_segment)
    launch(
        exponent_kernel, chunks * shape["GATE_HEADS"],
        inputs.gate, inputs.keep, plan.table, decays, exponents, *size, *activation,
        IS_LOGIT=options.is_logit,
        **plan.constants("GATE_HEADS", "GATE_WIDTH", "F", "FP", "C", "MASKED", "PACKED", "INTERPRETED"),
        warps=4,
    )  # fmt: skip
    q_features, _ = _features(plan, inputs.q, inputs.q_taps, inputs.q_before, decays, heads, is_key=False)
    k_features, k_sums = _features(plan, inputs.k, inputs.k_taps, inputs.k_before, decays, n, is_key=True)
    of_products = plan.constants(
        "V_HEADS", "GATE_HEADS", "N", "F", "DV", "FP", "BV", "V_BLOCKS", "C", "PACKED", "DOT", "PRECISION"
    )
    launch(
        prepared_state_kernel, plan.all_segments * n * shape["V_BLOCKS"],
        inputs.v, plan.table, k_features, k_sums, exponents, states.states, states.normalisers,
        states.decays, states.strongest, z_added, z_exponents, *size, **of_products,
        **configuration.state.options(),
    )  # fmt: skip
    scan(
        plan, states.states, states.normalisers, states.decays, inputs.initial_state, states.final,
        reverse=False,
    )  # fmt: skip
    of_output = {"H": heads, "NORMALIZE": options.normalize, "SAVE_SUMS": weight_sums is not None}
    may_be_strong = configuration.sub_block < chunk
    programs = plan.all_segments * heads * shape["V_BLOCKS"]
    launch(
        prepared_output_kernel, programs,
        inputs.v, plan.table, q_features, k_features, exponents, z_added, z_exponents, states.states,
        states.normalisers, states.strongest, output, weight_sums, *size, options.eps,
        MAY_BE_STRONG=may_be_strong, **of_output, **of_products, **configuration.output.options(),
    )  # fmt: skip
    if may_be_strong:
        strong_chunk = max(16, min(32, configuration.sub_block))
        launch(
            strong_output_kernel, programs,
            inputs.q, inputs.k, inputs.v, inputs.gate, inputs.q_taps, inputs.k_taps, inputs.q_before,
            inputs.k_before, inputs.map_weight, inputs.keep, plan.table, states.states, states.normalisers,
            states.strongest, output, weight_sums, *plan.size, *activation, options.eps,
            SUB=min(strong_chunk, configuration.sub_block), IS_LOGIT=options.is_logit, **of_output,
            **{**shape, "C": strong_chunk}, warps=4,
        )  # fmt: skip


def _features(
    plan: Plan,
    x: Tensor,
    taps: Tensor | None,
    before: Tensor | None,
    decays: Tensor,
    heads: int,
    *,
    is_key: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return decayed features by tiles [chunks, heads, C, FP]; of keys, also their sums."""
    configuration, shape = plan.configuration, plan.shape
    chunks, width = decays.shape[0], shape["FP"]
    features = allocate((chunks, heads, configuration.chunk, width), dtype=decays.dtype, device=x.device)
    sums = allocate((chunks, heads, width), dtype=torch.float32, device=x.device) if is_key else None
    padded_taps = 1 << max(shape["TAPS"] - 1, 0).bit_length()
    run = configuration.feature_chunks
    if not is_key:
        group = math.gcd(configuration.query_heads, heads // shape["GATE_HEADS"])
    elif before is None:
        group = math.gcd(configuration.key_heads, heads // max(x.shape[2], shape["GATE_HEADS"]))
    else:
        group = 1  # each head has inputs of its own from before
    launch(
        feature_kernel, plan.all_segments * -(-plan.chunks_of_segment // run) * (heads // group),
        x, taps, before, plan.inputs.map_weight, plan.inputs.keep, plan.table, decays, features, sums,
        *plan.size, plan.chunks_of_segment,
        X_HEADS=x.shape[2], HEADS=heads, TAPS_P=padded_taps, IS_KEY=is_key, GROUP=group, RUN=run,
        BLOCK=min(configuration.feature_taps, padded_taps),
        **plan.constants(
            "N", "GATE_HEADS", "D", "F", "DP", "FP", "C", "TAPS", "HAS_BEFORE", "HAS_MAP", "MASKED", "PACKED",
            "DOT", "PRECISION", "INTERPRETED",
        ),
        **(configuration.key_features if is_key else configuration.query_features).options(),
    )  # fmt: skip
    return features, sums


@dataclass
class Gradients:
    """The gradients of a call's inputs by the names of ``MixerInputs``; None where there is no such input."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    q_taps: Tensor | None
    k_taps: Tensor | None
    map_weight: Tensor | None
    initial_state: Tensor


def backward(plan: Plan, saved: Forward, grad_output: Tensor, grad_final: Tensor | None) -> Gradients:
    """Run the backward kernels.

    Args:
        plan: Of the forward.
        saved: What the forward gave.
        grad_output: The output's gradient, contiguous.
        grad_final: The final state's, contiguous and float32, or None for zeros.
    """
    plan = plan.for_gradient()
    inputs, options, shape = plan.inputs, plan.options, dict(plan.shape)
    tuning = plan.configuration.gradient.options()
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, tokens, heads = q.shape[:3]
    n, width, values = shape["N"], shape["F"], shape["DV"]
    # A program holds all values: the gradient of a weight is a sum over them.
    shape["BV"], shape["V_BLOCKS"] = padded_width(values), 1
    constants: dict[str, Any] = {"H": heads, "NORMALIZE": options.normalize}
    float32: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    sums = decay_sums(plan)

    deltas = allocate((batch, tokens, heads), **float32) if options.normalize else None
    state_gradients = allocate(saved.states.shape, **float32)
    normaliser_gradients, decays = (allocate(saved.normalisers.shape, **float32) for _ in range(2))
    launch(
        state_gradient_kernel, plan.all_segments * n,
        q, sums, inputs.q_taps, inputs.q_before, inputs.map_weight, inputs.keep, plan.table,
        saved.output, grad_output, saved.weight_sums, deltas, state_gradients, normaliser_gradients, decays,
        *plan.size, options.eps, **constants, **shape, **tuning,
    )  # fmt: skip
    grad_initial = allocate((plan.num_sequences, n, width, values + 1), **float32)
    scan(plan, state_gradients, normaliser_gradients, decays, grad_final, grad_initial, reverse=True)

    # Of the map's argument where there is a map, else of the features.
    before_map = q.dtype
    if inputs.map_weight is not None and q.dtype == torch.float16:
        before_map = torch.bfloat16  # float16 would lose the small ones
    grad_q = allocate((batch, tokens, heads, width), dtype=before_map, device=q.device)
    grad_k = allocate((batch, tokens, n, width), dtype=before_map, device=q.device)
    products = allocate((batch, tokens, heads, width), **float32)
    launch(
        query_gradient_kernel, plan.all_segments * heads,
        q, k, v, sums, inputs.q_taps, inputs.k_taps, inputs.q_before, inputs.k_before,
        inputs.map_weight, inputs.keep, plan.table, saved.states, saved.normalisers, saved.strongest,
        grad_output, saved.weight_sums, deltas, grad_q, products,
        *plan.size, options.eps, SUB=plan.configuration.sub_block, **constants, **shape, **tuning,
    )  # fmt: skip
    grad_v = allocate((batch, tokens, n, values), dtype=v.dtype, device=q.device)
    gate_width = shape["GATE_WIDTH"]
    # q dq is read before the decay's gradient is written where both have one place.
    grad_decay = products
    if n != heads or gate_width == 1:
        grad_decay = allocate((batch, tokens, n, gate_width), **float32)
    launch(
        key_gradient_kernel, plan.all_segments * n,
        q, k, v, sums, inputs.q_taps, inputs.k_taps, inputs.q_before, inputs.k_before,
        inputs.map_weight, inputs.keep, plan.table, saved.states, saved.normalisers, saved.strongest,
        state_gradients, normaliser_gradients, grad_output, saved.weight_sums, deltas,
        grad_k, grad_v, products, grad_decay,
        *plan.size, options.eps, SUB=plan.configuration.sub_block, **constants, **shape, **tuning,
    )  # fmt: skip
    grad_gate = _gate_gradient(plan, grad_decay)
    q_taps = k_taps = map_weight = None
    if inputs.map_weight is not None:
        grad_q, q_map, q_taps = _map_gradient(plan, q, grad_q, inputs.q_taps, inputs.q_before)
        grad_k, k_map, k_taps = _map_gradient(plan, k, grad_k, inputs.k_taps, inputs.k_before)
        map_weight = q_map.view(n, -1, *q_map.shape[1:]).sum(1) + k_map
        map_weight = (map_weight[..., : width // 2] - map_weight[..., width // 2 :]).to(
            inputs.map_weight.dtype
        )
    return Gradients(
        grad_q,
        _sum_heads(grad_k, k),
        _sum_heads(grad_v, v),
        grad_gate,
        q_taps,
        k_taps,
        map_weight,
        grad_initial,
    )


def _sum_heads(gradient: Tensor, like: Tensor) -> Tensor:
    """Sum the gradients of the state heads [B, T, N, W] that read one head [B, T, G, W]."""
    if gradient.shape[2] == like.shape[2]:
        return gradient.to(like.dtype)
    grouped = gradient.view(*gradient.shape[:2], like.shape[2], -1, gradient.shape[3])
    return grouped.sum(3, dtype=torch.float32).to(like.dtype)


def _gate_gradient(plan: Plan, grad_decay: Tensor) -> Tensor:
    inputs, options = plan.inputs, plan.options
    gate = inputs.gate
    heads, width = gate.shape[2:]
    rows, chunk = gate.shape[0] * gate.shape[1], 32
    result: Tensor = allocate(gate.shape, dtype=gate.dtype, device=gate.device)
    launch(
        gate_gradient_kernel, -(-rows // chunk) * heads,
        gate, grad_decay, inputs.keep, result, rows, options.gate_divisor, options.min_log_decay,
        GATE_HEADS=heads, N=plan.shape["N"], W=width, WP=1 << (width - 1).bit_length(), C=chunk,
        IS_LOGIT=options.is_logit,
        **plan.constants("MASKED", "INTERPRETED"),
        warps=4,
    )  # fmt: skip
    return result


def _map_gradient(
    plan: Plan, x: Tensor, projected: Tensor, taps: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x [B, T, heads, D], of [W, -W] by head [heads, D, F] and of the filters."""
    shape, inputs = plan.shape, plan.inputs
    heads = projected.shape[2]
    width, features = x.shape[3], shape["F"]
    taps_count = 0 if taps is None else taps.shape[1]
    float32: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    grad_x = allocate((*x.shape[:2], heads, width), dtype=x.dtype, device=x.device)
    grad_map = allocate((plan.all_segments, heads, width, features), **float32)
    grad_taps = None if taps is None else allocate((plan.all_segments, heads * width, taps_count), **float32)
    launch(
        map_gradient_kernel, plan.all_segments * heads,
        x, projected, taps, before, inputs.map_weight, inputs.keep, plan.table, grad_x, grad_map, grad_taps,
        *plan.size,
        X_HEADS=x.shape[2], HEADS=heads, TAPS_P=1 << max(taps_count - 1, 0).bit_length(),
        **plan.constants(
            "N", "D", "F", "DP", "FP", "C", "TAPS", "HAS_BEFORE", "MASKED", "PACKED", "DOT", "PRECISION"
        ),
        **plan.configuration.gradient.options(),
    )  # fmt: skip
    summed = None
    if grad_taps is not None and taps is not None:
        summed = grad_taps.sum(0).to(taps.dtype)
    return grad_x, grad_map.sum(0), summed
