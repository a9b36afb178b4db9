"""Host side of the kernels: from tensors to launches. Legend: ``ops/shapes.py``."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configurations import Configuration, choose_configuration, padded_width
from .launch import Launch, compile_together
from .layout import GATE_ROWS, Layout
from .layout import MixerOptions as MixerOptions
from .support import on_device_of

# What replays of a captured graph copy from: it must not be freed when the shape is forgotten.
_captured: list[tuple[Tensor, Tensor]] = []

# Tests put a function here that fills what it allocates with NaN: nothing may be read before it is written.
allocate: Any = torch.empty


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


@dataclass(frozen=True)
class Segments:
    """How calls of one shape are cut up.

    Attributes:
        layout: Their kernels.
        sequences: S.
        of_sequence: Segments of a sequence; of a packed batch, in all.
        count: Segments in all.
        size: Tokens and segments of a sequence, tokens of a segment: what a kernel finds its place by.
        table: Of a packed batch, on the CPU: start, first and last token, sequence and its length, a segment.
        ranges: The first segment of each sequence, and their number.
    """

    layout: Layout
    sequences: int
    of_sequence: int
    count: int
    size: tuple[int, int, int]
    table: Tensor | None
    ranges: Tensor | None


@dataclass
class Plan:
    """One call cut up; see ``Segments``.

    Attributes:
        inputs: Its tensors.
        segments: How it is cut up.
        layout: Its kernels.
        table: That of the segments, on the device.
        ranges: Likewise.
    """

    inputs: MixerInputs
    segments: Segments
    layout: Layout
    table: Tensor | None
    ranges: Tensor | None

    def for_gradient(self) -> Plan:
        """Return the same with the chunks of the backward kernels, in the same segments."""
        return Plan(self.inputs, self.segments, self.layout.of_gradient, self.table, self.ranges)

    def saved_sizes(self, *, with_sums: bool = True) -> list[int]:
        """Return the sizes of the parts of ``Forward.saved``."""
        batch, tokens, heads = self.inputs.q.shape[:3]
        shape, segments = self.layout.shape, self.segments
        sums = batch * tokens * heads if with_sums and self.layout.options.normalize else None
        return _saved_sizes((segments.count + segments.sequences) * shape["N"], shape["F"], shape["DV"], sums)


def dot_dtype(dtype: torch.dtype) -> Any:
    """Return the type of the operands of matrix products for inputs of this dtype.

    bfloat16 also for float16: decay factors reach exp(40).
    """
    if dtype == torch.float32 or triton.knobs.runtime.interpret:  # the interpreter has no bfloat16 products
        return tl.float32
    return tl.bfloat16


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
    q, taps, weight = inputs.q, inputs.q_taps, inputs.map_weight
    segments = _cut_up(
        q.shape, inputs.k.shape[2], inputs.v.shape[2:], inputs.gate.shape[2:],
        inputs.num_state_heads, q.shape[3] if weight is None else 2 * weight.shape[2],
        0 if taps is None else taps.shape[1], inputs.q_before is not None, weight is not None,
        inputs.keep is not None, inputs.boundaries, q.dtype, _precision(q.dtype), q.device, options,
        choose_configuration,
    )  # fmt: skip
    table, ranges = segments.table, segments.ranges
    if table is not None and ranges is not None:
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            _captured.append((table, ranges))
        # Copied for each call: another may run on another stream, or be captured in a graph.
        table, ranges = (t.to(q.device, non_blocking=True) for t in (table, ranges))
    return Plan(inputs, segments, segments.layout, table, ranges)


@functools.lru_cache(maxsize=256)
def _cut_up(
    q_shape: tuple[int, ...],
    k_heads: int,
    v_shape: tuple[int, ...],
    gate_shape: tuple[int, ...],
    n: int,
    feature_dim: int,
    taps: int,
    has_before: bool,
    has_map: bool,
    is_masked: bool,
    boundaries: tuple[int, ...] | None,
    dtype: torch.dtype,
    precision: str,
    device: torch.device,
    options: MixerOptions,
    choose: Callable[..., Configuration],
) -> Segments:
    _, tokens, heads, width = q_shape
    v_heads, value_dim = v_shape
    configuration, sequences, count = _count(
        q_shape, n, feature_dim, value_dim, boundaries, dtype, device, options, choose
    )
    segment = configuration.segment
    table = ranges = None
    of_sequence = count
    if boundaries is None:
        of_sequence = -(-tokens // segment)
    else:
        rows, first = [], [0]
        for index, (start, stop) in enumerate(itertools.pairwise(boundaries)):
            length = stop - start
            rows += [(start, t, min(t + segment, length), index, length) for t in range(0, length, segment)]
            first.append(len(rows))
        table = torch.tensor(rows, dtype=torch.int32).reshape(-1, 5)
        ranges = torch.tensor(first, dtype=torch.int32)
    value_block = min(configuration.value_block, padded_width(value_dim))
    shape = {
        "K_HEADS": k_heads,
        "V_HEADS": v_heads,
        "GATE_HEADS": gate_shape[0],
        "GATE_WIDTH": gate_shape[1],
        "N": n,
        "D": width,
        "F": feature_dim,
        "DV": value_dim,
        "DP": padded_width(width),
        "FP": padded_width(feature_dim),
        "BV": value_block,
        "V_BLOCKS": -(-value_dim // value_block),
        "C": configuration.chunk,
        "TAPS": taps,
        "HAS_BEFORE": has_before,
        "HAS_MAP": has_map,
        "MASKED": is_masked,
        "PACKED": boundaries is not None,
        "DOT": dot_dtype(dtype),
        "PRECISION": precision,
        "INTERPRETED": triton.knobs.runtime.interpret,
    }
    layout = _layout(options, configuration, tuple(shape.items()), heads)
    size = tokens, of_sequence, segment
    return Segments(layout, sequences, of_sequence, count, size, table, ranges)


def _count(
    q_shape: tuple[int, ...],
    n: int,
    feature_dim: int,
    value_dim: int,
    boundaries: tuple[int, ...] | None,
    dtype: torch.dtype,
    device: torch.device,
    options: MixerOptions,
    choose: Callable[..., Configuration],
) -> tuple[Configuration, int, int]:
    """Return the configuration, and how many sequences and segments there are.

    Batch and tokens may be symbols of a compiler. What the choice compares them with becomes its guards.
    """
    batch, tokens = q_shape[:2]
    sequences = batch if boundaries is None else len(boundaries) - 1
    average = tokens if boundaries is None else tokens // sequences
    configuration = options.configuration or choose(
        feature_dim, value_dim, dtype, average, n * sequences, options.min_log_decay, processors(device)
    )
    segment = configuration.segment
    if boundaries is None:
        return configuration, sequences, -(-tokens // segment) * batch
    count = sum(-(-(stop - start) // segment) for start, stop in itertools.pairwise(boundaries))
    return configuration, sequences, count


@functools.lru_cache(maxsize=64)
def _layout(
    options: MixerOptions, configuration: Configuration, shape: tuple[tuple[str, Any], ...], heads: int
) -> Layout:
    """Return the layout, the same for all lengths: what it compiled is found again."""
    return Layout(options, configuration, dict(shape), heads)


def workspace(sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Sequence[Tensor]:
    """Return flat tensors of these many numbers, allocated in one piece, each at a multiple of 256 bytes."""
    padded = _aligned(sizes)
    whole: Tensor = allocate((sum(padded),), dtype=dtype, device=device)
    return whole.split_with_sizes(padded)


def _aligned(sizes: Sequence[int]) -> list[int]:
    return [-(-size // 128) * 128 for size in sizes]


def saved_numbers(inputs: MixerInputs, options: MixerOptions) -> int:
    """Return how long ``Forward.saved`` is with the sums, of a call that may be one of a compiler's."""
    q, n = inputs.q, inputs.num_state_heads
    batch, tokens, heads = q.shape[:3]
    # Widths are compiled in, so that no symbol of a compiler stands for them.
    width = int(q.shape[3] if inputs.map_weight is None else 2 * inputs.map_weight.shape[2])
    values = int(inputs.v.shape[3])
    # Not from its cache, where symbols cannot be looked up.
    choose = getattr(choose_configuration, "__wrapped__", choose_configuration)
    _, sequences, count = _count(
        q.shape, n, width, values, inputs.boundaries, q.dtype, q.device, options, choose
    )
    sums = batch * tokens * heads if options.normalize else None
    return sum(_aligned(_saved_sizes((count + sequences) * n, width, values, sums)))


def _saved_sizes(states: int, width: int, values: int, sums: int | None) -> list[int]:
    sizes = [states * width * values, states * width, states]
    return sizes if sums is None else [*sizes, sums]


def _write_decay_sums(plan: Plan, sums: Tensor) -> None:
    """Write the sums of log-decays (base 2) since the start of each chunk, in the gate's shape, float32."""
    segments, layout = plan.segments, plan.layout
    layout.decay_sums(
        segments.count * layout.chunks_of_segment,
        (plan.inputs.gate, sums, plan.inputs.keep, plan.table),
        (*segments.size, layout.chunks_of_segment, *layout.activation),
    )


def _scan(
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
    segments = plan.segments
    plan.layout.scans[initial is not None, reverse](
        segments.sequences,
        (states, normalisers, decays, initial, final, plan.ranges),
        (segments.of_sequence,),
    )


@dataclass
class Forward:
    """What the forward gives and the backward needs. All but the first two are flat and in float32.

    Attributes:
        output: [B, T, H, D].
        final: The state after each sequence [S, N, F, D + 1].
        saved: The next four in one piece.
        states: What a segment adds; after the scan, the state before it and after the last [segments + S, N,
            D, F].
        normalisers: The same of the normaliser [segments + S, N, F].
        strongest: The least sum of log-decays of a chunk of each segment [segments + S, N].
        weight_sums: What the output was divided by, less eps [B, T, H], where it was asked for.
    """

    output: Tensor
    final: Tensor
    saved: Tensor
    states: Tensor
    normalisers: Tensor
    strongest: Tensor
    weight_sums: Tensor | None

    @staticmethod
    def of(output: Tensor, final: Tensor, saved: Tensor, sizes: Sequence[int]) -> Forward:
        """Return the same with ``saved`` in its parts, of these many numbers each."""
        states, normalisers, strongest, *sums = saved.split_with_sizes(_aligned(sizes))
        return Forward(output, final, saved, states, normalisers, strongest, sums[0] if sums else None)


def forward(plan: Plan, *, save_sums: bool = False) -> Forward:
    """Run the forward kernels; ``save_sums`` keeps what the backward needs of the normaliser."""
    variant = plan.inputs.q.device, save_sums, plan.inputs.initial_state is not None
    if variant not in plan.layout.compiled and not plan.layout.shape["INTERPRETED"] and not _is_capturing():
        plan.layout.compiled.add(variant)
        compile_together(lambda: _launch_all(plan, save_sums))
    return _launch_forward(plan, save_sums)


def _launch_all(plan: Plan, save_sums: bool) -> None:
    result = _launch_forward(plan, save_sums)
    # Who saves for the backward will call it. Where there is no room for both yet, its kernels wait.
    if save_sums:
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            backward(plan, result, torch.empty_like(result.output), None)


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _launch_forward(plan: Plan, save_sums: bool) -> Forward:
    v, layout, segments = plan.inputs.v, plan.layout, plan.segments
    batch, tokens, heads = plan.inputs.q.shape[:3]
    n, width, values = layout.shape["N"], layout.shape["F"], layout.shape["DV"]
    output = allocate((batch, tokens, heads, values), dtype=v.dtype, device=v.device)
    final = allocate((segments.sequences, n, width, values + 1), dtype=torch.float32, device=v.device)
    sizes = plan.saved_sizes(with_sums=save_sums)
    saved = allocate((sum(_aligned(sizes)),), dtype=torch.float32, device=v.device)
    result = Forward.of(output, final, saved, sizes)
    run = _forward_prepared if layout.configuration.is_prepared else _forward
    run(plan, result, sizes[1])
    return result


def _forward(plan: Plan, result: Forward, decays_size: int) -> None:
    """Run the kernels that make features wherever they need them."""
    inputs, layout, segments = plan.inputs, plan.layout, plan.segments
    q, k, v = inputs.q, inputs.k, inputs.v
    sums, decays = workspace((inputs.gate.numel(), decays_size), torch.float32, q.device)
    _write_decay_sums(plan, sums)
    layout.states(
        segments.count,
        (k, v, sums, inputs.k_taps, inputs.k_before, inputs.map_weight, inputs.keep, plan.table,
         result.states, result.normalisers, decays, result.strongest),
        segments.size,
    )  # fmt: skip
    _scan_forward(plan, result, decays)
    layout.outputs[result.weight_sums is not None](
        segments.count,
        (q, k, v, sums, inputs.q_taps, inputs.k_taps, inputs.q_before, inputs.k_before, inputs.map_weight,
         inputs.keep, plan.table, result.states, result.normalisers, result.strongest, result.output,
         result.weight_sums),
        (*segments.size, layout.eps),
    )  # fmt: skip


def _scan_forward(plan: Plan, result: Forward, decays: Tensor) -> None:
    _scan(
        plan, result.states, result.normalisers, decays, plan.inputs.initial_state, result.final,
        reverse=False,
    )  # fmt: skip


def _forward_prepared(plan: Plan, result: Forward, decays_size: int) -> None:
    """Run the kernels of ``prepared.py``."""
    inputs, layout, segments, shape = plan.inputs, plan.layout, plan.segments, plan.layout.shape
    q, k, v, weight, keep, table = inputs.q, inputs.k, inputs.v, inputs.map_weight, inputs.keep, plan.table
    save = result.weight_sums is not None
    chunks = segments.count * layout.chunks_of_segment
    heads, n, gate_heads, width = layout.heads, shape["N"], shape["GATE_HEADS"], shape["FP"]
    vectors = chunks * n * width
    with_scan = layout.configuration.scan_with_queries
    segment_decays, z_added, z_exponents, k_sums, exponents, factors = workspace(
        (
            decays_size, vectors, vectors, vectors, 2 * chunks * gate_heads * width,
            vectors if with_scan else 0,
        ),
        torch.float32, q.device,
    )  # fmt: skip
    scales = factors if with_scan else None
    tile = chunks * shape["C"] * width
    decays, q_features, k_features = workspace(
        (gate_heads * tile, heads * tile, n * tile), layout.feature_dtype, q.device
    )
    size = (*segments.size, layout.chunks_of_segment)
    layout.exponents(chunks, (inputs.gate, keep, table, decays, exponents), (*size, *layout.activation))
    runs = segments.count * -(-layout.chunks_of_segment // layout.configuration.feature_chunks)
    of_queries = q, inputs.q_taps, inputs.q_before, weight, keep, table, decays, q_features
    if not with_scan:
        layout.query_features(runs, (*of_queries, None), size)
    layout.key_features(
        runs, (k, inputs.k_taps, inputs.k_before, weight, keep, table, decays, k_features, k_sums), size
    )
    layout.prepared_states(
        segments.count,
        (v, table, k_features, k_sums, exponents, result.states, result.normalisers, segment_decays,
         result.strongest, z_added, z_exponents, scales),
        size,
    )  # fmt: skip
    if with_scan:
        scans = segments.sequences * layout.scan_programs
        layout.query_features_and_scan[inputs.initial_state is not None](
            scans + runs * layout.query_programs,
            (*of_queries, result.states, result.normalisers, segment_decays, inputs.initial_state,
             result.final, plan.ranges, z_added, z_exponents),
            (*size, scans),
        )  # fmt: skip
    else:
        _scan_forward(plan, result, segment_decays)
    layout.prepared_outputs[save](
        segments.count,
        (v, table, q_features, k_features, exponents, scales, z_added, z_exponents, result.states,
         result.normalisers, result.strongest, result.output, result.weight_sums),
        (*size, layout.eps),
    )  # fmt: skip
    if layout.may_be_strong:
        layout.strong_outputs[save](
            segments.count,
            (q, k, v, inputs.gate, inputs.q_taps, inputs.k_taps, inputs.q_before, inputs.k_before, weight,
             keep, table, result.states, result.normalisers, result.strongest, result.output,
             result.weight_sums),
            (*segments.size, *layout.activation, layout.eps),
        )  # fmt: skip


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


def gradients_of(
    inputs: MixerInputs,
    options: MixerOptions,
    output: Tensor,
    saved: Tensor,
    grad_output: Tensor | None,
    grad_final: Tensor | None,
) -> Gradients:
    """Return the gradients of a call, from what its forward gave and saved; None stands for zeros."""
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    if grad_final is not None:
        grad_final = grad_final.float().contiguous()
    with on_device_of(output):
        plan = make_plan(inputs, options)
        # The final state is not looked at.
        result = Forward.of(output, output, saved, plan.saved_sizes())
        return backward(plan, result, grad_output.contiguous(), grad_final)


def backward(plan: Plan, saved: Forward, grad_output: Tensor, grad_final: Tensor | None) -> Gradients:
    """Run the backward kernels.

    Args:
        plan: Of the forward.
        saved: What the forward gave.
        grad_output: The output's gradient, contiguous.
        grad_final: The final state's, contiguous and float32, or None for zeros.
    """
    plan = plan.for_gradient()
    inputs, segments, layout, shape = plan.inputs, plan.segments, plan.layout, plan.layout.shape
    q, k, v, weight = inputs.q, inputs.k, inputs.v, inputs.map_weight
    batch, tokens, heads = q.shape[:3]
    n, width, values, gate_width = shape["N"], shape["F"], shape["DV"], shape["GATE_WIDTH"]
    rows = batch * tokens
    # q dq is read before the decay's gradient is written where both have one place.
    share_place = n == heads and gate_width != 1
    sums, state_gradients, normaliser_gradients, decays, products, deltas, grad_decay = workspace(
        (
            inputs.gate.numel(), saved.states.numel(), saved.normalisers.numel(), saved.normalisers.numel(),
            rows * heads * width, rows * heads if layout.options.normalize else 0,
            0 if share_place else rows * n * gate_width,
        ),
        torch.float32, q.device,
    )  # fmt: skip
    if share_place:
        grad_decay = products
    _write_decay_sums(plan, sums)
    convolutions = inputs.q_taps, inputs.k_taps, inputs.q_before, inputs.k_before
    numbers = (*segments.size, layout.eps)
    of_normaliser = saved.weight_sums, deltas if layout.options.normalize else None
    layout.state_gradients(
        segments.count,
        (q, sums, inputs.q_taps, inputs.q_before, weight, inputs.keep, plan.table, saved.output, grad_output,
         *of_normaliser, state_gradients, normaliser_gradients, decays),
        numbers,
    )  # fmt: skip
    grad_initial = allocate((segments.sequences, n, width, values + 1), dtype=torch.float32, device=q.device)
    _scan(plan, state_gradients, normaliser_gradients, decays, grad_final, grad_initial, reverse=True)

    # Of the map's argument where there is a map, else of the features.
    before_map = q.dtype
    if weight is not None and q.dtype == torch.float16:
        before_map = torch.bfloat16  # float16 would lose the small ones
    grad_q = allocate((batch, tokens, heads, width), dtype=before_map, device=q.device)
    grad_k = allocate((batch, tokens, n, width), dtype=before_map, device=q.device)
    grad_v = allocate((batch, tokens, n, values), dtype=v.dtype, device=q.device)
    common = (
        q, k, v, sums, *convolutions, weight, inputs.keep, plan.table, saved.states, saved.normalisers,
        saved.strongest,
    )  # fmt: skip
    layout.query_gradients(segments.count, (*common, grad_output, *of_normaliser, grad_q, products), numbers)
    layout.key_gradients(
        segments.count,
        (*common, state_gradients, normaliser_gradients, grad_output, *of_normaliser, grad_k, grad_v,
         products, grad_decay),
        numbers,
    )  # fmt: skip
    grad_gate = allocate(inputs.gate.shape, dtype=inputs.gate.dtype, device=q.device)
    layout.gate_gradients(
        -(-rows // GATE_ROWS),
        (inputs.gate, grad_decay, inputs.keep, grad_gate),
        (rows, layout.activation[0], float(layout.options.min_log_decay)),
    )
    q_taps = k_taps = map_weight = None
    if weight is not None:
        grad_q, q_map, q_taps = _map_gradient(
            plan, layout.query_map_gradients, q, grad_q, inputs.q_taps, inputs.q_before
        )
        grad_k, k_map, k_taps = _map_gradient(
            plan, layout.key_map_gradients, k, grad_k, inputs.k_taps, inputs.k_before
        )
        if heads != n:
            q_map = q_map.view(n, -1, *q_map.shape[1:]).sum(1)
        map_weight = q_map + k_map
        map_weight = (map_weight[..., : width // 2] - map_weight[..., width // 2 :]).to(weight.dtype)
    return Gradients(
        grad_q, _sum_heads(grad_k, k), _sum_heads(grad_v, v), grad_gate, q_taps, k_taps, map_weight,
        grad_initial,
    )  # fmt: skip


def _sum_heads(gradient: Tensor, like: Tensor) -> Tensor:
    """Sum the gradients of the state heads [B, T, N, W] that read one head [B, T, G, W]."""
    if gradient.shape[2] == like.shape[2]:
        return gradient.to(like.dtype)
    grouped = gradient.view(*gradient.shape[:2], like.shape[2], -1, gradient.shape[3])
    return grouped.sum(3).to(like.dtype)  # added up in float32, whatever their dtype


def _map_gradient(
    plan: Plan, launch: Launch, x: Tensor, projected: Tensor, taps: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x [B, T, heads, D], of [W, -W] by head [heads, D, F] and of the filters."""
    segments, inputs = plan.segments, plan.inputs
    heads, width, features = projected.shape[2], x.shape[3], plan.layout.shape["F"]
    grad_x = allocate((*x.shape[:2], heads, width), dtype=x.dtype, device=x.device)
    grad_map = allocate((segments.count, heads, width, features), dtype=torch.float32, device=x.device)
    grad_taps = None
    if taps is not None:
        grad_taps = allocate((segments.count, *taps.shape), dtype=torch.float32, device=x.device)
    launch(
        segments.count,
        (x, projected, taps, before, inputs.map_weight, inputs.keep, plan.table, grad_x, grad_map, grad_taps),
        segments.size,
    )
    summed = None
    if grad_taps is not None and taps is not None:
        summed = grad_taps.sum(0).to(taps.dtype)
    return grad_x, grad_map.sum(0), summed
