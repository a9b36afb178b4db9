"""The forward kernels: gate, state of each segment, scan over the segments, output. Legend: ``blocks.py``.

States are held transposed, [D, F] with the normaliser [F] beside it: then the features are the right operand
of the product that adds to the state, which goes to shared memory once, in bfloat16.

A sequence is cut into segments and these into chunks of C tokens. What a token of a chunk weighs is
``sum_f q_if k_jf 2^(b_if - b_jf)``, b being the sums of log-decays since the chunk's start. It is a product
of ``q 2^(b - r)`` and ``k 2^(r - b)``, r being half of the chunk's sum: q decayed from the chunk's start and
k decayed to its end differ from these by ``2^r`` alone. Where a channel decays so much in a chunk that a
factor would be too large, the segment takes a slower path: keys come in sub-blocks of SUB tokens, each with
an r of its own. Whether it does is seen from the numbers, segment by segment.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    LOG2_E,
    MAX_EXPONENT,
    features,
    load_decay_sum,
    load_decay_sums,
    load_map_weight,
    load_state,
    load_values,
    locate_segment,
    log2_sigmoid,
    stay_in_layout,
    store_state,
    without_padding,
)

_UNSPECIALIZED = ["tokens", "num_segments", "segment_tokens", "num_chunks"]


@triton.jit
def log2_decay(
    gate, first_row, t0, stop, head, keep, divisor, lowest, column, is_column,
    GATE_HEADS: tl.constexpr, GATE_WIDTH: tl.constexpr, C: tl.constexpr,
    IS_LOGIT: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return the log-decay of each token and the columns given of a chunk, 0 for padding."""
    i = tl.arange(0, C)
    real = t0 + i < stop
    base = gate + (first_row + t0) * (GATE_HEADS * GATE_WIDTH) + head * GATE_WIDTH
    offset = i[:, None] * (GATE_HEADS * GATE_WIDTH) + column[None, :]
    x = tl.load(base + offset, mask=real[:, None] & is_column[None, :], other=0.0)
    x = x.to(tl.float32) * LOG2_E
    if IS_LOGIT:
        x, _ = log2_sigmoid(x, INTERPRETED)
        x *= 1.0 / divisor
    # A NaN must show in the output.
    x = tl.maximum(x, lowest * LOG2_E, propagate_nan=tl.PropagateNan.ALL)
    if MASKED:
        real = real & (tl.load(keep + first_row + t0 + i, mask=real, other=0) != 0)
    return tl.where(real[:, None] & is_column[None, :], x, 0.0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def gate_kernel(
    gate, sums, keep, table, tokens, num_segments, segment_tokens, num_chunks, divisor, lowest,
    GATE_HEADS: tl.constexpr, GATE_WIDTH: tl.constexpr, WP: tl.constexpr, C: tl.constexpr,
    IS_LOGIT: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the sums of log-decays since the start of each chunk. One program a chunk and gate head."""
    program = tl.program_id(0)
    head = program % GATE_HEADS
    segment = program // (GATE_HEADS * num_chunks)
    first_row, start, stop, _, _ = locate_segment(
        segment, tokens, num_segments, segment_tokens, table, PACKED
    )
    t0 = start + (program // GATE_HEADS) % num_chunks * C
    i = tl.arange(0, C)
    w = tl.arange(0, WP)
    x = log2_decay(
        gate, first_row, t0, stop, head, keep, divisor, lowest, w, w < GATE_WIDTH,
        GATE_HEADS, GATE_WIDTH, C, IS_LOGIT, MASKED, INTERPRETED,
    )  # fmt: skip
    base = sums + (first_row + t0) * (GATE_HEADS * GATE_WIDTH) + head * GATE_WIDTH
    offset = i[:, None] * (GATE_HEADS * GATE_WIDTH) + w[None, :]
    tl.store(base + offset, tl.cumsum(x, axis=0), mask=(t0 + i < stop)[:, None] & (w[None, :] < GATE_WIDTH))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def state_kernel(
    k, v, sums, k_taps, k_before, map_weight, keep, table,
    states, normalisers, decays, strongest,
    tokens, num_segments, segment_tokens,
    K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, GATE_HEADS: tl.constexpr, GATE_WIDTH: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, FP: tl.constexpr,
    BV: tl.constexpr, V_BLOCKS: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr,
    HAS_BEFORE: tl.constexpr, HAS_MAP: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write what each segment adds to the state, and its decay. One program a segment, head and BV values."""
    program = tl.program_id(0)
    block = program % V_BLOCKS
    n = (program // V_BLOCKS) % N
    segment = program // (V_BLOCKS * N)
    first_row, start, stop, sequence, _ = locate_segment(
        segment, tokens, num_segments, segment_tokens, table, PACKED
    )
    k_head = n // (N // K_HEADS)
    v_head = n // (N // V_HEADS)
    gate_head = n // (N // GATE_HEADS)
    weight = 0
    if HAS_MAP:
        weight = load_map_weight(map_weight, n, D, F, DP, FP).to(DOT)

    state = tl.zeros([BV, FP], tl.float32)
    # Summed over tokens once at the end: a sum across warps in each chunk would cost more.
    normaliser = tl.zeros([C, FP], tl.float32)
    decay = tl.zeros([FP], tl.float32)
    strongest_decay = tl.zeros([FP], tl.float32)
    for t0 in range(start, stop, C):
        phi = features(
            k, first_row, t0, stop, k_head, keep, k_taps, k_before, sequence, weight, n,
            K_HEADS, N, D, F, DP, FP, C, TAPS, HAS_BEFORE, MASKED, HAS_MAP, PRECISION, INTERPRETED,
        )  # fmt: skip
        phi = without_padding(phi, first_row, t0, stop, keep, C, MASKED)
        b = load_decay_sums(sums, first_row, t0, stop, gate_head, GATE_HEADS, GATE_WIDTH, F, FP, C)
        last = tl.minimum(t0 + C, stop) - 1
        total = load_decay_sum(sums, first_row, last, gate_head, GATE_HEADS, GATE_WIDTH, F, FP)
        values = load_values(v, first_row, t0, stop, v_head, block, V_HEADS, DV, BV, C)
        phi = phi * tl.exp2(total[None, :] - b)
        through = tl.exp2(total)
        state = tl.dot(
            tl.trans(values.to(DOT)), phi.to(DOT), state * through[None, :], input_precision=PRECISION
        )
        normaliser = normaliser * through[None, :] + phi
        decay += total
        strongest_decay = tl.minimum(strongest_decay, total)

    # A sequence has a row more than segments: the state after the last.
    row = (segment + sequence).to(tl.int64) * N + n
    total = tl.sum(normaliser, axis=0)
    store_state(states, normalisers, decays, row, block, state, total, decay, F, DV, FP, BV)
    if block == 0:
        tl.store(strongest + row, tl.min(strongest_decay, axis=0))


@triton.jit
def scan(
    program, states, normalisers, decays, initial, final, ranges, z_added, z_exponents,
    num_segments, num_chunks,
    N: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    F_BLOCKS: tl.constexpr, V_BLOCKS: tl.constexpr, HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr,
    PACKED: tl.constexpr, STAGES: tl.constexpr, FP: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Do what ``scan_kernel`` says of its program with this number.

    With CHUNKS, a power of two that is at least ``num_chunks``, also complete what the queries of each chunk
    read of the normaliser (see ``prepared.py``). A block then holds all values.
    """
    v_block = program % V_BLOCKS
    f_block = (program // V_BLOCKS) % F_BLOCKS
    n = (program // (V_BLOCKS * F_BLOCKS)) % N
    sequence = program // (V_BLOCKS * F_BLOCKS * N)
    if PACKED:
        first = tl.load(ranges + sequence)
        count = tl.load(ranges + sequence + 1) - first
        first += sequence
    else:
        first = sequence * (num_segments + 1)
        count = num_segments
    f = f_block * BF + tl.arange(0, BF)
    column = v_block * BV + tl.arange(0, BV)
    inside = (column[:, None] < DV) & (f[None, :] < F)
    ends = (sequence.to(tl.int64) * N + n) * (F * (DV + 1))
    if HAS_INITIAL:
        state = tl.load(initial + ends + f[None, :] * (DV + 1) + column[:, None], mask=inside, other=0.0).to(
            tl.float32
        )
        normaliser = tl.load(initial + ends + f * (DV + 1) + DV, mask=f < F, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BV, BF], tl.float32)
        normaliser = tl.zeros([BF], tl.float32)
    for index in tl.range(0, count, num_stages=STAGES):
        segment = first + count - 1 - index if REVERSE else first + index
        row = segment.to(tl.int64) * N + n
        pointers = states + row * (F * DV) + column[:, None] * F + f[None, :]
        added = tl.load(pointers, mask=inside, other=0.0)
        decay = tl.exp2(tl.load(decays + row * F + f, mask=f < F, other=0.0))
        tl.store(pointers, state, mask=inside)
        state = state * decay[None, :] + added
        if CHUNKS > 0:
            i = tl.arange(0, CHUNKS)
            tile_column = f // (F // 2) * (FP // 2) + f % (F // 2)
            chunk = (segment - sequence).to(tl.int64) * num_chunks + i
            place = (chunk * N + n)[:, None] * FP + tile_column[None, :]
            mask = (i < num_chunks)[:, None] & (f < F)[None, :]
            z = tl.load(z_added + place, mask=mask, other=0.0)
            z += tl.exp2(tl.load(z_exponents + place, mask=mask, other=0.0)) * normaliser[None, :]
            tl.store(z_added + place, z, mask=mask)
        # Every block of values keeps the normaliser, the first alone writes it: the others must not read it.
        if v_block == 0:
            summed = tl.load(normalisers + row * F + f, mask=f < F, other=0.0)
            tl.store(normalisers + row * F + f, normaliser, mask=f < F)
            normaliser = normaliser * decay + summed
    tl.store(final + ends + f[None, :] * (DV + 1) + column[:, None], state, mask=inside)
    if v_block == 0:
        tl.store(final + ends + f * (DV + 1) + DV, normaliser, mask=f < F)
    if not REVERSE:
        row = (first + count).to(tl.int64) * N + n
        tl.store(states + row * (F * DV) + column[:, None] * F + f[None, :], state, mask=inside)
        if v_block == 0:
            tl.store(normalisers + row * F + f, normaliser, mask=f < F)


@triton.jit(do_not_specialize=["num_segments"])
def scan_kernel(
    states, normalisers, decays, initial, final, ranges, num_segments,
    N: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    F_BLOCKS: tl.constexpr, V_BLOCKS: tl.constexpr, HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr,
    PACKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Turn what each segment adds into the state before it (after it, in REVERSE), in place.

    One program a sequence, head and block of the state. The last state goes to ``final``, and forward also to
    the row after those of the segments.
    """
    scan(
        tl.program_id(0), states, normalisers, decays, initial, final, ranges, None, None, num_segments, 0,
        N, F, DV, BF, BV, F_BLOCKS, V_BLOCKS, HAS_INITIAL, REVERSE, PACKED, STAGES, F, 0,
    )  # fmt: skip


@triton.jit
def by_sub_blocks(
    q, k, b, total, first_row, t0, stop, head, k_head, keep, q_taps, k_taps,
    q_before, k_before, sequence, weight, n,
    H: tl.constexpr, K_HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    DP: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, TAPS: tl.constexpr,
    HAS_BEFORE: tl.constexpr, MASKED: tl.constexpr, HAS_MAP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return q from the chunk's start, k to its end and the weights, of a chunk that decays too much."""
    i = tl.arange(0, C)
    phi_k = features(
        k, first_row, t0, stop, k_head, keep, k_taps, k_before, sequence, weight, n,
        K_HEADS, N, D, F, DP, FP, C, TAPS, HAS_BEFORE, MASKED, HAS_MAP, PRECISION, INTERPRETED,
    )  # fmt: skip
    phi_k = without_padding(phi_k, first_row, t0, stop, keep, C, MASKED)
    phi_q = features(
        q, first_row, t0, stop, head, keep, q_taps, q_before, sequence, weight, head,
        H, H, D, F, DP, FP, C, TAPS, HAS_BEFORE, MASKED, HAS_MAP, PRECISION, INTERPRETED,
    )  # fmt: skip
    weights = tl.zeros([C, C], tl.float32)
    before = tl.zeros([FP], tl.float32)
    for s in range(0, C, SUB):
        after = tl.sum(tl.where((i == s + SUB - 1)[:, None], b, 0.0), axis=0)
        center = 0.5 * (before + after)[None, :]
        k_part = tl.where(((i >= s) & (i < s + SUB))[:, None], phi_k * tl.exp2(center - b), 0.0)
        q_part = tl.where((i >= s)[:, None], phi_q * tl.exp2(b - center), 0.0)
        weights = tl.dot(q_part.to(DOT), tl.trans(k_part.to(DOT)), weights, input_precision=PRECISION)
        before = after
    q_start = (phi_q * tl.exp2(b)).to(DOT)
    k_end = (phi_k * tl.exp2(total[None, :] - b)).to(DOT)
    return q_start, k_end, weights


@triton.jit
def write_output(
    state, sums_of_weights, q_start, weights, v, output, weight_sums, first_row, t0, stop, head, v_head,
    block, eps, H: tl.constexpr, V_HEADS: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    NORMALIZE: tl.constexpr, SAVE_SUMS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the output of a chunk and return its values.

    From queries that read the state, from what they read of the normaliser [C], and from the weights.
    """
    i = tl.arange(0, C)
    column = block * BV + tl.arange(0, BV)
    inside = (t0 + i < stop)[:, None] & (column[None, :] < DV)
    weights = tl.where(i[:, None] >= i[None, :], weights, 0.0)
    read = tl.dot(q_start, tl.trans(state.to(DOT)), input_precision=PRECISION)
    values = load_values(v, first_row, t0, stop, v_head, block, V_HEADS, DV, BV, C).to(DOT)
    read = tl.dot(weights.to(DOT), values, read, input_precision=PRECISION)
    if NORMALIZE:
        sums_of_weights += tl.sum(weights, axis=1)
        read = read * (1.0 / (sums_of_weights + eps))[:, None]
        if SAVE_SUMS and block == 0:
            tl.store(weight_sums + (first_row + t0) * H + head + i * H, sums_of_weights, mask=t0 + i < stop)
    place = output + (first_row + t0) * (H * DV) + head * DV
    place += i[:, None] * (H * DV) + column[None, :]
    tl.store(place, read.to(output.dtype.element_ty), mask=inside)
    return values


@triton.jit
def output_chunk(
    state, normaliser, b, total, q, k, v, q_taps, k_taps, q_before, k_before, weight, keep, output,
    weight_sums, first_row, t0, stop, sequence, head, n, k_head, v_head, block, eps,
    H: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, FP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    SUB: tl.constexpr, TAPS: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_MAP: tl.constexpr,
    MASKED: tl.constexpr, NORMALIZE: tl.constexpr, SAVE_SUMS: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the output of a chunk and return the state and its normaliser after it.

    b and total are the sums of log-decays up to each token and in all. Keys come in sub-blocks of SUB tokens;
    with SUB = C, all at once.
    """
    if SUB < C:
        q_start, k_end, weights = by_sub_blocks(
            q, k, b, total, first_row, t0, stop, head, k_head, keep, q_taps, k_taps,
            q_before, k_before, sequence, weight, n,
            H, K_HEADS, N, D, F, DP, FP, C, SUB, TAPS, HAS_BEFORE, MASKED, HAS_MAP, DOT, PRECISION,
            INTERPRETED,
        )  # fmt: skip
    else:
        b -= 0.5 * total[None, :]
        half = tl.exp2(0.5 * total)

        phi = features(
            k, first_row, t0, stop, k_head, keep, k_taps, k_before, sequence, weight, n,
            K_HEADS, N, D, F, DP, FP, C, TAPS, HAS_BEFORE, MASKED, HAS_MAP, PRECISION, INTERPRETED,
        )  # fmt: skip
        phi = without_padding(phi, first_row, t0, stop, keep, C, MASKED) * tl.exp2(-b)
        k_middle = phi.to(DOT)
        k_end = (phi * half[None, :]).to(DOT)

        phi = features(
            q, first_row, t0, stop, head, keep, q_taps, q_before, sequence, weight, head,
            H, H, D, F, DP, FP, C, TAPS, HAS_BEFORE, MASKED, HAS_MAP, PRECISION, INTERPRETED,
        )  # fmt: skip
        phi = stay_in_layout(phi * tl.exp2(b), INTERPRETED)
        weights = tl.dot(phi.to(DOT), tl.trans(k_middle), input_precision=PRECISION)
        q_start = (phi * half[None, :]).to(DOT)
    values = write_output(
        state, tl.sum(q_start.to(tl.float32) * normaliser[None, :], axis=1), q_start, weights, v, output,
        weight_sums, first_row, t0, stop, head, v_head, block, eps,
        H, V_HEADS, DV, BV, C, NORMALIZE, SAVE_SUMS, DOT, PRECISION,
    )  # fmt: skip
    through = tl.exp2(total)
    state = tl.dot(tl.trans(values), k_end, state * through[None, :], input_precision=PRECISION)
    normaliser = normaliser * through + tl.sum(k_end.to(tl.float32), axis=0)
    return state, normaliser


@triton.jit
def output_segment(
    state, normaliser, q, k, v, sums, q_taps, k_taps, q_before, k_before, weight, keep, output, weight_sums,
    first_row, start, stop, sequence, head, n, k_head, v_head, gate_head, block, eps,
    H: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, GATE_HEADS: tl.constexpr,
    GATE_WIDTH: tl.constexpr, N: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, FP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr,
    TAPS: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_MAP: tl.constexpr,
    MASKED: tl.constexpr, NORMALIZE: tl.constexpr, SAVE_SUMS: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the output of a segment, chunk by chunk."""
    for t0 in range(start, stop, C):
        last = tl.minimum(t0 + C, stop) - 1
        total = load_decay_sum(sums, first_row, last, gate_head, GATE_HEADS, GATE_WIDTH, F, FP)
        b = load_decay_sums(sums, first_row, t0, stop, gate_head, GATE_HEADS, GATE_WIDTH, F, FP, C)
        state, normaliser = output_chunk(
            state, normaliser, b, total, q, k, v, q_taps, k_taps, q_before, k_before, weight, keep, output,
            weight_sums, first_row, t0, stop, sequence, head, n, k_head, v_head, block, eps,
            H, K_HEADS, V_HEADS, N, D, F, DV, DP, FP, BV, C, SUB, TAPS,
            HAS_BEFORE, HAS_MAP, MASKED, NORMALIZE, SAVE_SUMS, DOT, PRECISION, INTERPRETED,
        )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def output_kernel(
    q, k, v, sums, q_taps, k_taps, q_before, k_before, map_weight, keep, table,
    states, normalisers, strongest, output, weight_sums,
    tokens, num_segments, segment_tokens, eps,
    H: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, GATE_HEADS: tl.constexpr,
    GATE_WIDTH: tl.constexpr, N: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, FP: tl.constexpr, BV: tl.constexpr, V_BLOCKS: tl.constexpr, C: tl.constexpr,
    SUB: tl.constexpr, TAPS: tl.constexpr,
    HAS_BEFORE: tl.constexpr, HAS_MAP: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr, SAVE_SUMS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the output. One program a segment, query head and block of BV values."""
    program = tl.program_id(0)
    block = program % V_BLOCKS
    head = (program // V_BLOCKS) % H
    segment = program // (V_BLOCKS * H)
    first_row, start, stop, sequence, _ = locate_segment(
        segment, tokens, num_segments, segment_tokens, table, PACKED
    )
    n = head // (H // N)
    k_head = n // (N // K_HEADS)
    v_head = n // (N // V_HEADS)
    gate_head = n // (N // GATE_HEADS)
    weight = 0
    if HAS_MAP:
        weight = load_map_weight(map_weight, n, D, F, DP, FP).to(DOT)

    row = (segment + sequence).to(tl.int64) * N + n
    state, normaliser = load_state(states, normalisers, row, block, F, DV, FP, BV)
    # A bound of the log-decays under which all of a chunk fits needs no second loop.
    if SUB == C or tl.load(strongest + row) >= -2 * MAX_EXPONENT:
        output_segment(
            state, normaliser, q, k, v, sums, q_taps, k_taps, q_before, k_before, weight, keep, output,
            weight_sums, first_row, start, stop, sequence, head, n, k_head, v_head, gate_head, block, eps,
            H, K_HEADS, V_HEADS, GATE_HEADS, GATE_WIDTH, N, D, F, DV, DP, FP, BV, C, C, TAPS,
            HAS_BEFORE, HAS_MAP, MASKED, NORMALIZE, SAVE_SUMS, DOT, PRECISION, INTERPRETED,
        )  # fmt: skip
    else:
        output_segment(
            state, normaliser, q, k, v, sums, q_taps, k_taps, q_before, k_before, weight, keep, output,
            weight_sums, first_row, start, stop, sequence, head, n, k_head, v_head, gate_head, block, eps,
            H, K_HEADS, V_HEADS, GATE_HEADS, GATE_WIDTH, N, D, F, DV, DP, FP, BV, C, SUB, TAPS,
            HAS_BEFORE, HAS_MAP, MASKED, NORMALIZE, SAVE_SUMS, DOT, PRECISION, INTERPRETED,
        )  # fmt: skip
