"""The forward kernels: gate, state of each segment, scan over the segments, output. Legend: ``blocks.py``.

States are held transposed, [D, F] with the normaliser [F] beside it: then the features are the right operand
of the product that adds to the state, which goes to shared memory once, in bfloat16.

A sequence is cut into segments and these into chunks of C tokens. What a token of a chunk weighs is
``sum_f q_if k_jf 2^(b_if - b_jf)``, b being the sums of log-decays since the chunk's start. Inside a
sub-block of SUB tokens it is a product of ``q 2^(b - r)`` and ``k 2^(r - b)`` around the middle r of the
sub-block's range; between sub-blocks q's factor is taken around the earlier one's middle, so that it is below
1. No exponent is larger than half of what a sub-block can decay.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    LOG2_E,
    by_part,
    feature_columns,
    features,
    load_decay_sum,
    load_decay_sums,
    load_map_weight,
    locate_segment,
    sub_block_centers,
    without_padding,
)

_UNSPECIALIZED = ["tokens", "num_segments", "segment_tokens", "num_chunks"]


@triton.jit
def log2_decay(
    gate, first_row, t0, stop, head, keep, divisor, lowest,
    GATE_HEADS: tl.constexpr, GATE_WIDTH: tl.constexpr, WP: tl.constexpr, C: tl.constexpr,
    IS_LOGIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the log-decay of each token and channel of a chunk [C, WP], 0 for padding."""
    i = tl.arange(0, C)
    w = tl.arange(0, WP)
    real = t0 + i < stop
    base = gate + (first_row + t0) * (GATE_HEADS * GATE_WIDTH) + head * GATE_WIDTH
    offset = i[:, None] * (GATE_HEADS * GATE_WIDTH) + w[None, :]
    x = tl.load(base + offset, mask=real[:, None] & (w[None, :] < GATE_WIDTH), other=0.0)
    x = x.to(tl.float32) * LOG2_E
    if IS_LOGIT:
        e = tl.exp2(-tl.abs(x))
        # log2(1 + e) in float32 has no digits left for the slow channels, where e is small.
        soft = tl.where(e < 0.0009765625, e * (1.0 - 0.5 * e) * LOG2_E, tl.log2(1.0 + e))
        x = tl.maximum((tl.minimum(x, 0.0) - soft) / divisor, lowest * LOG2_E)
    if MASKED:
        real = real & (tl.load(keep + first_row + t0 + i, mask=real, other=0) != 0)
    return tl.where(real[:, None], x, 0.0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def gate_kernel(
    gate, sums, keep, table, tokens, num_segments, segment_tokens, num_chunks, divisor, lowest,
    GATE_HEADS: tl.constexpr, GATE_WIDTH: tl.constexpr, WP: tl.constexpr, C: tl.constexpr,
    IS_LOGIT: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write the sums of log-decays since the start of each chunk. One program a chunk and gate head."""
    program = tl.program_id(0)
    head = program % GATE_HEADS
    segment = program // (GATE_HEADS * num_chunks)
    first_row, start, stop, _ = locate_segment(segment, tokens, num_segments, segment_tokens, table, PACKED)
    t0 = start + (program // GATE_HEADS) % num_chunks * C
    x = log2_decay(
        gate, first_row, t0, stop, head, keep, divisor, lowest,
        GATE_HEADS, GATE_WIDTH, WP, C, IS_LOGIT, MASKED,
    )  # fmt: skip
    i = tl.arange(0, C)
    w = tl.arange(0, WP)
    base = sums + (first_row + t0) * (GATE_HEADS * GATE_WIDTH) + head * GATE_WIDTH
    offset = i[:, None] * (GATE_HEADS * GATE_WIDTH) + w[None, :]
    tl.store(base + offset, tl.cumsum(x, axis=0), mask=(t0 + i < stop)[:, None] & (w[None, :] < GATE_WIDTH))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def state_kernel(
    k, v, sums, k_taps, k_before, map_weight, keep, table,
    states, normalisers, decays,
    tokens, num_segments, segment_tokens,
    K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, GATE_HEADS: tl.constexpr, GATE_WIDTH: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, FP: tl.constexpr,
    BV: tl.constexpr, V_BLOCKS: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr, TAPS_P: tl.constexpr,
    HAS_BEFORE: tl.constexpr, HAS_MAP: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write what each segment adds to the state, and its decay. One program a segment, head and BV values."""
    program = tl.program_id(0)
    block = program % V_BLOCKS
    n = (program // V_BLOCKS) % N
    segment = program // (V_BLOCKS * N)
    first_row, start, stop, sequence = locate_segment(
        segment, tokens, num_segments, segment_tokens, table, PACKED
    )
    k_head = n // (N // K_HEADS)
    v_head = n // (N // V_HEADS)
    gate_head = n // (N // GATE_HEADS)
    i = tl.arange(0, C)
    column = block * BV + tl.arange(0, BV)
    feature, is_feature = feature_columns(F, FP)
    weight = 0
    if HAS_MAP:
        weight = load_map_weight(map_weight, n, D, F, DP, FP).to(DOT)

    state = tl.zeros([BV, FP], tl.float32)
    # Summed over tokens once at the end: a sum across warps in each chunk would cost more.
    normaliser = tl.zeros([C, FP], tl.float32)
    decay = tl.zeros([FP], tl.float32)
    for t0 in range(start, stop, C):
        phi = features(
            k, first_row, t0, stop, k_head, keep, k_taps, k_before, sequence, weight, n,
            K_HEADS, N, D, F, DP, FP, C, TAPS, TAPS_P, HAS_BEFORE, MASKED, HAS_MAP, PRECISION, INTERPRETED,
        )  # fmt: skip
        phi = without_padding(phi, first_row, t0, stop, keep, C, MASKED)
        b = load_decay_sums(sums, first_row, t0, stop, gate_head, GATE_HEADS, GATE_WIDTH, F, FP, C)
        last = tl.minimum(t0 + C, stop) - 1
        total = load_decay_sum(sums, first_row, last, gate_head, GATE_HEADS, GATE_WIDTH, F, FP)
        v_rows = (first_row + t0) * (V_HEADS * DV) + v_head * DV
        values = tl.load(
            v + v_rows + i[:, None] * (V_HEADS * DV) + column[None, :],
            mask=(t0 + i < stop)[:, None] & (column[None, :] < DV),
            other=0.0,
        )
        phi = phi * tl.exp2(tl.minimum(total[None, :] - b, 0.0))
        through = tl.exp2(total)
        state = tl.dot(
            tl.trans(values.to(DOT)), phi.to(DOT), state * through[None, :], input_precision=PRECISION
        )
        normaliser = normaliser * through[None, :] + phi
        decay += total

    row = segment.to(tl.int64) * N + n
    tl.store(
        states + row * (F * DV) + column[:, None] * F + feature[None, :],
        state,
        mask=(column[:, None] < DV) & is_feature[None, :],
    )
    if block == 0:
        tl.store(normalisers + row * F + feature, tl.sum(normaliser, axis=0), mask=is_feature)
        tl.store(decays + row * F + feature, decay, mask=is_feature)


@triton.jit(do_not_specialize=["num_segments"])
def scan_kernel(
    states, normalisers, decays, initial, final, ranges, num_segments,
    N: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    F_BLOCKS: tl.constexpr, V_BLOCKS: tl.constexpr, HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr,
    PACKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Turn what each segment adds into the state before it (after it, in REVERSE), in place.

    One program a sequence, head and block of the state. The last state goes to ``final``.
    """
    program = tl.program_id(0)
    v_block = program % V_BLOCKS
    f_block = (program // V_BLOCKS) % F_BLOCKS
    n = (program // (V_BLOCKS * F_BLOCKS)) % N
    sequence = program // (V_BLOCKS * F_BLOCKS * N)
    if PACKED:
        first = tl.load(ranges + sequence)
        count = tl.load(ranges + sequence + 1) - first
    else:
        first = sequence * num_segments
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
        # Every block of values keeps the normaliser, the first alone writes it: the others must not read it.
        if v_block == 0:
            summed = tl.load(normalisers + row * F + f, mask=f < F, other=0.0)
            tl.store(normalisers + row * F + f, normaliser, mask=f < F)
            normaliser = normaliser * decay + summed
    tl.store(final + ends + f[None, :] * (DV + 1) + column[:, None], state, mask=inside)
    if v_block == 0:
        tl.store(final + ends + f * (DV + 1) + DV, normaliser, mask=f < F)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def output_kernel(
    q, k, v, sums, q_taps, k_taps, q_before, k_before, map_weight, keep, table,
    states, normalisers, output, weight_sums,
    tokens, num_segments, segment_tokens, eps,
    H: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, GATE_HEADS: tl.constexpr,
    GATE_WIDTH: tl.constexpr, N: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, FP: tl.constexpr, BV: tl.constexpr, V_BLOCKS: tl.constexpr, C: tl.constexpr,
    SUB: tl.constexpr, TAPS: tl.constexpr, TAPS_P: tl.constexpr,
    HAS_BEFORE: tl.constexpr, HAS_MAP: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr, SAVE_SUMS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the output. One program a segment, query head and block of BV values."""
    program = tl.program_id(0)
    block = program % V_BLOCKS
    head = (program // V_BLOCKS) % H
    segment = program // (V_BLOCKS * H)
    first_row, start, stop, sequence = locate_segment(
        segment, tokens, num_segments, segment_tokens, table, PACKED
    )
    n = head // (H // N)
    k_head = n // (N // K_HEADS)
    v_head = n // (N // V_HEADS)
    gate_head = n // (N // GATE_HEADS)
    i = tl.arange(0, C)
    part = i // SUB
    tl.static_assert(C // SUB <= 4)
    column = block * BV + tl.arange(0, BV)
    feature, is_feature = feature_columns(F, FP)
    weight = 0
    if HAS_MAP:
        weight = load_map_weight(map_weight, n, D, F, DP, FP).to(DOT)

    row = segment.to(tl.int64) * N + n
    state = tl.load(
        states + row * (F * DV) + column[:, None] * F + feature[None, :],
        mask=(column[:, None] < DV) & is_feature[None, :],
        other=0.0,
    )
    normaliser = tl.load(normalisers + row * F + feature, mask=is_feature, other=0.0)
    for t0 in range(start, stop, C):
        last = tl.minimum(t0 + C, stop) - 1
        total = load_decay_sum(sums, first_row, last, gate_head, GATE_HEADS, GATE_WIDTH, F, FP)
        b = load_decay_sums(sums, first_row, t0, stop, gate_head, GATE_HEADS, GATE_WIDTH, F, FP, C)
        center_0, center_1, center_2, center_3 = sub_block_centers(
            sums, first_row, t0, last, gate_head, GATE_HEADS, GATE_WIDTH, F, FP, C, SUB
        )
        b -= by_part(center_0, center_1, center_2, center_3, part, C // SUB)

        phi = features(
            k, first_row, t0, stop, k_head, keep, k_taps, k_before, sequence, weight, n,
            K_HEADS, N, D, F, DP, FP, C, TAPS, TAPS_P, HAS_BEFORE, MASKED, HAS_MAP, PRECISION, INTERPRETED,
        )  # fmt: skip
        phi = without_padding(phi, first_row, t0, stop, keep, C, MASKED) * tl.exp2(-b)
        k_middle = tl.trans(phi.to(DOT))
        phi *= by_part(
            tl.exp2(total - center_0), tl.exp2(total - center_1),
            tl.exp2(total - center_2), tl.exp2(total - center_3), part, C // SUB,
        )  # fmt: skip
        k_sum = tl.sum(phi, axis=0)
        k_end = phi.to(DOT)

        phi = features(
            q, first_row, t0, stop, head, keep, q_taps, q_before, sequence, weight, head,
            H, H, D, F, DP, FP, C, TAPS, TAPS_P, HAS_BEFORE, MASKED, HAS_MAP, PRECISION, INTERPRETED,
        )  # fmt: skip
        phi *= tl.exp2(b)
        weights = tl.dot(phi.to(DOT), k_middle, input_precision=PRECISION)
        weights = tl.where((part[:, None] == part[None, :]) & (i[:, None] >= i[None, :]), weights, 0.0)
        # Earlier sub-blocks: the factor of q is taken around their middle.
        if C // SUB > 1:
            between = tl.dot(
                (phi * by_part(
                    center_0, tl.exp2(center_1 - center_0),
                    tl.exp2(center_2 - center_0), tl.exp2(center_3 - center_0), part, C // SUB, 1,
                )).to(DOT), k_middle, input_precision=PRECISION,
            )  # fmt: skip
            weights = tl.where((part[:, None] > 0) & (part[None, :] == 0), between, weights)
        if C // SUB > 2:
            between = tl.dot(
                (phi * by_part(
                    center_0, center_0,
                    tl.exp2(center_2 - center_1), tl.exp2(center_3 - center_1), part, C // SUB, 2,
                )).to(DOT), k_middle, input_precision=PRECISION,
            )  # fmt: skip
            weights = tl.where((part[:, None] > 1) & (part[None, :] == 1), between, weights)
        if C // SUB > 3:
            between = tl.dot(
                (phi * tl.exp2(center_3 - center_2)[None, :]).to(DOT), k_middle, input_precision=PRECISION
            )
            weights = tl.where((part[:, None] > 2) & (part[None, :] == 2), between, weights)

        phi *= by_part(
            tl.exp2(center_0), tl.exp2(center_1), tl.exp2(center_2), tl.exp2(center_3), part, C // SUB
        )
        read = tl.dot(phi.to(DOT), tl.trans(state.to(DOT)), input_precision=PRECISION)
        v_rows = (first_row + t0) * (V_HEADS * DV) + v_head * DV
        values = tl.load(
            v + v_rows + i[:, None] * (V_HEADS * DV) + column[None, :],
            mask=(t0 + i < stop)[:, None] & (column[None, :] < DV),
            other=0.0,
        ).to(DOT)
        read = tl.dot(weights.to(DOT), values, read, input_precision=PRECISION)
        if NORMALIZE:
            sums_of_weights = tl.sum(weights, axis=1) + tl.sum(phi * normaliser[None, :], axis=1)
            read = read * (1.0 / (sums_of_weights + eps))[:, None]
            if SAVE_SUMS and block == 0:
                tl.store(
                    weight_sums + (first_row + t0) * H + head + i * H, sums_of_weights, mask=t0 + i < stop
                )
        tl.store(
            output
            + (first_row + t0) * (H * DV) + head * DV
            + i[:, None] * (H * DV) + column[None, :],
            read.to(output.dtype.element_ty),
            mask=(t0 + i < stop)[:, None] & (column[None, :] < DV),
        )  # fmt: skip

        through = tl.exp2(total)
        state = tl.dot(tl.trans(values), k_end, state * through[None, :], input_precision=PRECISION)
        normaliser = normaliser * through + k_sum
