"""The forward with features made once: a kernel writes them, decayed, and the others only multiply matrices.

``feature_kernel`` writes of each chunk ``phi(q) 2^(b - r)`` and ``phi(k) 2^(r - b)``, b being the sums of
log-decays since the chunk's start and r half of the chunk's sum, so that the weights are their product. With
``S' = 2^r S``, both what the queries read and the state after the chunk need no factor for each token::

    o = q' S' + weights v        S after = 2^r (S' + k'^T v)

Vectors of F are dear, as each thread of a matrix product holds a quarter of one: so the last factor waits for
the next chunk's, and ``prepared_state_kernel`` writes what the queries of each chunk read of the normaliser:
``z' = a + 2^e z``, z being the normaliser before the segment. The output kernel adds that up, or the scan
where it runs beside the features of q (``Configuration.scan_with_queries``).

The features lie chunk by chunk, [chunks, heads, C, FP], whole tiles without a mask.

Where a channel decays too much in a chunk for these factors (see ``forward.py``), k' is decayed to the
chunk's end instead, which the state needs, and the outputs of that segment come from
``strong_output_kernel``, which makes features itself, in chunks so short that they fit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    LOG2_E,
    MAX_EXPONENT,
    convolved_rows,
    feature_columns,
    load_map_weight,
    load_state,
    load_values,
    locate_segment,
    stay_in_layout,
    store_state,
    without_padding,
)
from .forward import log2_decay, output_chunk, scan, write_output

_UNSPECIALIZED = ["tokens", "num_segments", "segment_tokens", "num_chunks"]


@triton.jit
def chunk_decays(
    gate, first_row, t0, stop, gate_head, keep, divisor, lowest,
    GATE_HEADS: tl.constexpr, GATE_WIDTH: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, C: tl.constexpr,
    IS_LOGIT: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return the sums of log-decays of a chunk up to each token [C, FP], and in all [FP]."""
    feature, is_feature = feature_columns(F, FP)
    if GATE_WIDTH == 1:
        feature = feature * 0
    x = log2_decay(
        gate, first_row, t0, stop, gate_head, keep, divisor, lowest, feature, is_feature,
        GATE_HEADS, GATE_WIDTH, C, IS_LOGIT, MASKED, INTERPRETED,
    )  # fmt: skip
    return tl.cumsum(x, axis=0), tl.sum(x, axis=0)


@triton.jit
def load_tile(x, index, C: tl.constexpr, FP: tl.constexpr):
    """Return the tile [C, FP] with this index of x [tiles, C, FP]."""
    place = x + index.to(tl.int64) * (C * FP) + tl.arange(0, C)[:, None] * FP + tl.arange(0, FP)[None, :]
    return tl.load(place)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def exponent_kernel(
    gate, keep, table, decays, exponents,
    tokens, num_segments, segment_tokens, num_chunks, divisor, lowest,
    GATE_HEADS: tl.constexpr, GATE_WIDTH: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, C: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, IS_LOGIT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write ``2^(b - r)`` and two exponents. One program a chunk and gate head.

    The state before a chunk times 2^(first exponent), plus what the keys add, times 2^(second) is that after.
    """
    program = tl.program_id(0)
    head = program % GATE_HEADS
    chunk = program // GATE_HEADS
    first_row, start, stop, _, _ = locate_segment(
        chunk // num_chunks, tokens, num_segments, segment_tokens, table, PACKED
    )
    t0 = start + chunk % num_chunks * C
    if t0 < stop:
        b, total = chunk_decays(
            gate, first_row, t0, stop, head, keep, divisor, lowest,
            GATE_HEADS, GATE_WIDTH, F, FP, C, IS_LOGIT, MASKED, INTERPRETED,
        )  # fmt: skip
        is_strong = tl.min(total, axis=0) < -2 * MAX_EXPONENT
        before = tl.where(is_strong, total, 0.5 * total)
        column = tl.arange(0, FP)
        place = exponents + program.to(tl.int64) * (2 * FP)
        tl.store(place + column, before)
        tl.store(place + FP + column, total - before)
        i = tl.arange(0, C)
        place = decays + program.to(tl.int64) * (C * FP) + i[:, None] * FP + column[None, :]
        # Every head reads these: in the features' own precision, as reading them in float32 costs a third of
        # the feature kernel's time. A segment that decays too much has no use for those of q, which are cut
        # off at the range of a float; 1 / d must not be of a d that has become 0.
        decay = tl.exp2(tl.minimum(tl.maximum(b - before[None, :], -126.0), 126.0))
        tl.store(place, decay.to(decays.dtype.element_ty))


@triton.jit
def load_tap_weights(
    map_weight, taps, head, weight_head, first_tap,
    D: tl.constexpr, F: tl.constexpr, DP: tl.constexpr, FP: tl.constexpr, TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Return W of a head times each of BLOCK taps, for exponents to the base 2 [BLOCK DP, FP/2].

    Convolution and W are one product of the inputs at several tokens with these.
    """
    row = tl.arange(0, BLOCK * DP)
    tap = first_tap + row // DP
    d = row % DP
    f = tl.arange(0, FP // 2)
    inside = d < D
    tile = tl.load(
        map_weight + weight_head * (D * (F // 2)) + d[:, None] * (F // 2) + f[None, :],
        mask=inside[:, None] & (f < F // 2)[None, :],
        other=0.0,
    ).to(tl.float32)
    if TAPS > 0:
        filter_taps = tl.load(taps + (head * D + d) * TAPS + tap, mask=inside & (tap < TAPS), other=0.0)
        tile *= filter_taps.to(tl.float32)[:, None]
    return tile * LOG2_E


@triton.jit
def load_tap_inputs(
    x, first_row, t0, stop, x_head, keep, before, sequence, head, first_tap,
    X_HEADS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr,
    TAPS: tl.constexpr, BLOCK: tl.constexpr, HAS_BEFORE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the inputs that BLOCK taps weigh, side by side [C, BLOCK DP]."""
    i = tl.arange(0, C)
    column = tl.arange(0, BLOCK * DP)
    d = column % DP
    shift = first_tap + column // DP
    if TAPS > 0:
        shift -= TAPS - 1
    t = t0 + i[:, None] + shift[None, :]
    is_tap = (d < D) & (shift <= 0)
    inside = (t >= 0) & (t < stop) & is_tap[None, :]
    base = x + (first_row + t0) * (X_HEADS * D) + x_head * D
    tile = tl.load(base + (i[:, None] + shift[None, :]) * (X_HEADS * D) + d[None, :], mask=inside, other=0.0)
    if MASKED:
        kept = tl.load(keep + first_row + t, mask=inside, other=0)
        tile = tl.where(kept != 0, tile, 0.0)
    if HAS_BEFORE:
        base = before + (sequence.to(tl.int64) * HEADS + head) * (D * (TAPS - 1))
        tile += tl.load(
            base + d[None, :] * (TAPS - 1) + (t + TAPS - 1),
            mask=(t < 0) & (t > -TAPS) & is_tap[None, :],
            other=0.0,
        ).to(tile.dtype)
    return tile


@triton.jit
def softmax_half(p, F: tl.constexpr, FP: tl.constexpr):
    """Return the softmax of rows of FP/2 exponents to the base 2."""
    if F != FP:
        p = tl.where((tl.arange(0, FP // 2) < F // 2)[None, :], p, float("-inf"))
    e = tl.exp2(p - tl.max(p, axis=1)[:, None])
    return e * (1.0 / tl.sum(e, axis=1))[:, None]


@triton.jit
def reciprocal(x, INTERPRETED: tl.constexpr):
    """Return 1 / x, in one instruction instead of a division's six.

    The last of its 24 bits may be wrong: decays have 8, those of bfloat16, and so have features times these.
    They lie between 2^-126 and 2^126, so that no reciprocal overflows or is flushed to zero.
    """
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def load_decay_half(
    decays, index, half, t0, stop, first_row, keep,
    C: tl.constexpr, FP: tl.constexpr, IS_KEY: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return 2^(b - r) of a half [C, FP/2] of the tile with this index; of keys 2^(r - b), 0 for padding."""
    column = half * (FP // 2) + tl.arange(0, FP // 2)
    place = decays + index.to(tl.int64) * (C * FP) + tl.arange(0, C)[:, None] * FP + column[None, :]
    decay = tl.load(place).to(tl.float32)
    if IS_KEY:
        decay = without_padding(reciprocal(decay, INTERPRETED), first_row, t0, stop, keep, C, MASKED)
    return decay


@triton.jit
def store_half(x, sums, tile, index, half, C: tl.constexpr, FP: tl.constexpr, SUM: tl.constexpr):
    """Write a half [C, FP/2] of the tile with this index of x [tiles, C, FP], and the sum of its rows."""
    column = half * (FP // 2) + tl.arange(0, FP // 2)
    tile = tile.to(x.dtype.element_ty)
    place = x + index.to(tl.int64) * (C * FP)
    tl.store(place + tl.arange(0, C)[:, None] * FP + column[None, :], tile)
    if SUM:
        tl.store(sums + index.to(tl.int64) * FP + column, tl.sum(tile.to(tl.float32), axis=0))


@triton.jit
def make_features(
    program, x, taps, before, map_weight, keep, table, decays, features, sums,
    tokens, num_segments, segment_tokens, num_chunks,
    X_HEADS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, GATE_HEADS: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, DP: tl.constexpr, FP: tl.constexpr, C: tl.constexpr,
    TAPS: tl.constexpr, TAPS_P: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr,
    IS_KEY: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_MAP: tl.constexpr, MASKED: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Do what ``feature_kernel`` says of its program with this number."""
    first_head = program % (HEADS // GROUP) * GROUP
    runs = tl.cdiv(num_chunks, RUN)
    segment = program // (HEADS // GROUP * runs)
    first_chunk = (program // (HEADS // GROUP)) % runs * RUN
    first_row, start, stop, sequence, _ = locate_segment(
        segment, tokens, num_segments, segment_tokens, table, PACKED
    )
    gate_head = first_head // (HEADS // GATE_HEADS)
    half: tl.constexpr = FP // 2
    # With BLOCK = 0 the convolution is not part of the product.
    parts: tl.constexpr = 1 if BLOCK == 0 else TAPS_P // BLOCK
    i = tl.arange(0, C)
    f = tl.arange(0, half)
    chunks = tl.minimum(tl.cdiv(stop - start, C), num_chunks)
    operand: tl.constexpr = DOT if DOT.is_fp32() else x.dtype.element_ty
    if HAS_MAP:
        weights = ()
        for part in tl.static_range(0, GROUP * parts):
            head = first_head + part // parts
            if BLOCK == 0:
                weight = load_tap_weights(map_weight, taps, head, head // (HEADS // N), 0, D, F, DP, FP, 0, 1)
            else:
                first_tap = part % parts * BLOCK
                weight = load_tap_weights(
                    map_weight, taps, head, head // (HEADS // N), first_tap, D, F, DP, FP, TAPS, BLOCK
                )
            weights = weights + (weight.to(operand),)  # type: ignore[assignment]  # noqa: RUF005
    for index in range(first_chunk, tl.minimum(first_chunk + RUN, chunks)):
        t0 = start + index * C
        chunk = segment * num_chunks + index
        gate_tile = chunk * GATE_HEADS + gate_head
        if GROUP > 1:  # alone, a head loads them when it needs them, and registers stay free
            first_decay = load_decay_half(
                decays, gate_tile, 0, t0, stop, first_row, keep, C, FP, IS_KEY, MASKED, INTERPRETED
            )
            second_decay = load_decay_half(
                decays, gate_tile, 1, t0, stop, first_row, keep, C, FP, IS_KEY, MASKED, INTERPRETED
            )
        inputs = ()
        for j in tl.static_range(0, GROUP):
            head = first_head + j
            x_head = head // (HEADS // X_HEADS)
            if HAS_MAP:
                p = tl.zeros([C, half], tl.float32)
                for part in tl.static_range(0, parts):
                    if BLOCK == 0:
                        tile = convolved_rows(
                            x, first_row, t0, stop, x_head, keep, taps, before, sequence, head,
                            X_HEADS, HEADS, D, DP, C, TAPS, HAS_BEFORE, MASKED,
                        )  # fmt: skip
                        tile = stay_in_layout(tile, INTERPRETED).to(operand)
                    elif IS_KEY and j > 0:
                        tile = inputs[part]
                    else:
                        tile = load_tap_inputs(
                            x, first_row, t0, stop, x_head, keep, before, sequence, head, part * BLOCK,
                            X_HEADS, HEADS, D, DP, C, TAPS, BLOCK, HAS_BEFORE, MASKED,
                        ).to(operand)  # fmt: skip
                        inputs = inputs + (tile,)  # type: ignore[assignment]  # noqa: RUF005
                    p = tl.dot(tile, weights[j * parts + part], p, input_precision=PRECISION)
                first = softmax_half(p, F, FP)
                second = softmax_half(-p, F, FP)
            else:
                base = x + (first_row + t0) * (X_HEADS * F) + x_head * F
                base += i[:, None] * (X_HEADS * F) + f[None, :]
                inside = (t0 + i < stop)[:, None] & (f < F // 2)[None, :]
                first = tl.load(base, mask=inside, other=0.0)
                second = tl.load(base + F // 2, mask=inside, other=0.0)
            if GROUP == 1:
                first_decay = load_decay_half(
                    decays, gate_tile, 0, t0, stop, first_row, keep, C, FP, IS_KEY, MASKED, INTERPRETED
                )
                second_decay = load_decay_half(
                    decays, gate_tile, 1, t0, stop, first_row, keep, C, FP, IS_KEY, MASKED, INTERPRETED
                )
            tile = chunk * HEADS + head
            store_half(features, sums, first * first_decay, tile, 0, C, FP, IS_KEY)
            store_half(features, sums, second * second_decay, tile, 1, C, FP, IS_KEY)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def feature_kernel(
    x, taps, before, map_weight, keep, table, decays, features, sums,
    tokens, num_segments, segment_tokens, num_chunks,
    X_HEADS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, GATE_HEADS: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, DP: tl.constexpr, FP: tl.constexpr, C: tl.constexpr,
    TAPS: tl.constexpr, TAPS_P: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr,
    IS_KEY: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_MAP: tl.constexpr, MASKED: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the decayed features of q, or of k and their sums. One program RUN chunks and GROUP heads.

    Keys are decayed by 2^(r - b) and zero where there is padding, queries by 2^(b - r). The heads of a group
    share a gate, and those of keys their inputs.
    """
    make_features(
        tl.program_id(0), x, taps, before, map_weight, keep, table, decays, features, sums,
        tokens, num_segments, segment_tokens, num_chunks,
        X_HEADS, HEADS, N, GATE_HEADS, D, F, DP, FP, C, TAPS, TAPS_P, BLOCK, GROUP, RUN,
        IS_KEY, HAS_BEFORE, HAS_MAP, MASKED, PACKED, DOT, PRECISION, INTERPRETED,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*_UNSPECIALIZED, "scans"])
def query_feature_scan_kernel(
    q, taps, before, map_weight, keep, table, decays, features,
    states, normalisers, segment_decays, initial, final, ranges, z_added, z_exponents,
    tokens, num_segments, segment_tokens, num_chunks, scans,
    HEADS: tl.constexpr, N: tl.constexpr, GATE_HEADS: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    DV: tl.constexpr, DP: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr,
    TAPS_P: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr,
    HAS_BEFORE: tl.constexpr, HAS_MAP: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BF: tl.constexpr, BV: tl.constexpr, F_BLOCKS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    STAGES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The features of q, and beside them the scan, which alone leaves most of the device idle.

    The first ``scans`` programs are the scan's.
    """
    program = tl.program_id(0)
    if program < scans:
        scan(
            program, states, normalisers, segment_decays, initial, final, ranges, z_added, z_exponents,
            num_segments, num_chunks,
            N, F, DV, BF, BV, F_BLOCKS, 1, HAS_INITIAL, False, PACKED, STAGES, FP, CHUNKS,
        )  # fmt: skip
    else:
        make_features(
            program - scans, q, taps, before, map_weight, keep, table, decays, features, None,
            tokens, num_segments, segment_tokens, num_chunks,
            HEADS, HEADS, N, GATE_HEADS, D, F, DP, FP, C, TAPS, TAPS_P, BLOCK, GROUP, RUN,
            False, HAS_BEFORE, HAS_MAP, MASKED, PACKED, DOT, PRECISION, INTERPRETED,
        )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def prepared_state_kernel(
    v, table, k_features, k_sums, exponents, states, normalisers, decays, strongest, z_added, z_exponents,
    scales, tokens, num_segments, segment_tokens, num_chunks,
    V_HEADS: tl.constexpr, GATE_HEADS: tl.constexpr, N: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    FP: tl.constexpr, BV: tl.constexpr, V_BLOCKS: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As ``state_kernel``, from prepared keys.

    Where the scan completes what queries read, ``scales`` are what the state decays by from chunk to chunk.
    """
    program = tl.program_id(0)
    block = program % V_BLOCKS
    n = (program // V_BLOCKS) % N
    segment = program // (V_BLOCKS * N)
    first_row, start, stop, sequence, _ = locate_segment(
        segment, tokens, num_segments, segment_tokens, table, PACKED
    )
    v_head = n // (N // V_HEADS)
    gate_head = n // (N // GATE_HEADS)
    column = tl.arange(0, FP)
    state = tl.zeros([BV, FP], tl.float32)
    normaliser = tl.zeros([FP], tl.float32)
    decay = tl.zeros([FP], tl.float32)
    strongest_decay = tl.zeros([FP], tl.float32)
    waiting = tl.zeros([FP], tl.float32)
    for index in range(0, tl.cdiv(stop - start, C)):
        t0 = start + index * C
        chunk = segment * num_chunks + index
        keys = load_tile(k_features, chunk * N + n, C, FP)
        values = load_values(v, first_row, t0, stop, v_head, block, V_HEADS, DV, BV, C).to(DOT)
        place = exponents + (chunk * GATE_HEADS + gate_head).to(tl.int64) * (2 * FP) + column
        before, after = tl.load(place), tl.load(place + FP)
        added = tl.load(k_sums + (chunk * N + n).to(tl.int64) * FP + column)
        scale, scale_after = tl.exp2(before), tl.exp2(after)
        state = tl.dot(tl.trans(values), keys, state * scale[None, :], input_precision=PRECISION)
        state *= scale_after[None, :]
        normaliser *= scale
        if block == 0:
            vector = (chunk * N + n).to(tl.int64) * FP + column
            tl.store(z_added + vector, normaliser)
            tl.store(z_exponents + vector, decay + before)
            if scales is not None:
                tl.store(scales + vector, tl.exp2(waiting + before))
        normaliser = (normaliser + added) * scale_after
        decay += before + after
        waiting = after
        strongest_decay = tl.minimum(strongest_decay, before + after)

    row = (segment + sequence).to(tl.int64) * N + n
    store_state(states, normalisers, decays, row, block, state, normaliser, decay, F, DV, FP, BV)
    if block == 0:
        tl.store(strongest + row, tl.min(strongest_decay, axis=0))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def prepared_output_kernel(
    v, table, q_features, k_features, exponents, scales, z_added, z_exponents, states, normalisers,
    strongest, output, weight_sums, tokens, num_segments, segment_tokens, num_chunks, eps,
    H: tl.constexpr, V_HEADS: tl.constexpr, GATE_HEADS: tl.constexpr, N: tl.constexpr, F: tl.constexpr,
    DV: tl.constexpr, FP: tl.constexpr, BV: tl.constexpr, V_BLOCKS: tl.constexpr, C: tl.constexpr,
    MAY_BE_STRONG: tl.constexpr, PACKED: tl.constexpr, NORMALIZE: tl.constexpr, SAVE_SUMS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As ``output_kernel``, from prepared features, but for segments that decay too much.

    With ``scales``, the scan has completed ``z_added``: two vectors a chunk to read instead of five.
    """
    program = tl.program_id(0)
    block = program % V_BLOCKS
    head = (program // V_BLOCKS) % H
    segment = program // (V_BLOCKS * H)
    first_row, start, stop, sequence, _ = locate_segment(
        segment, tokens, num_segments, segment_tokens, table, PACKED
    )
    n = head // (H // N)
    v_head = n // (N // V_HEADS)
    gate_head = n // (N // GATE_HEADS)
    column = tl.arange(0, FP)
    row = (segment + sequence).to(tl.int64) * N + n
    if MAY_BE_STRONG and tl.load(strongest + row) < -2 * MAX_EXPONENT:
        return
    feature, is_feature = feature_columns(F, FP)
    state, _ = load_state(states, normalisers, row, block, F, DV, FP, BV)
    for index in range(0, tl.cdiv(stop - start, C)):
        chunk = segment * num_chunks + index
        vector = (chunk * N + n).to(tl.int64) * FP + column
        if scales is None:
            # Read again for each chunk: held, it would take a register in eight.
            z = tl.load(normalisers + row * F + feature, mask=is_feature & (index >= 0), other=0.0)
            z = tl.load(z_added + vector) + tl.exp2(tl.load(z_exponents + vector)) * z
        else:
            z = tl.load(z_added + vector)
        queries = load_tile(q_features, chunk * H + head, C, FP)
        keys = load_tile(k_features, chunk * N + n, C, FP)
        sums_of_weights = tl.sum(queries.to(tl.float32) * z[None, :], axis=1)
        if scales is None:
            place = exponents + (chunk * GATE_HEADS + gate_head).to(tl.int64) * (2 * FP) + column
            waiting = tl.load(place - GATE_HEADS * (2 * FP) + FP, mask=(column >= 0) & (index > 0), other=0.0)
            scale = tl.exp2(waiting + tl.load(place))
        else:
            scale = tl.load(scales + vector)
        state *= scale[None, :]
        weights = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        values = write_output(
            state, sums_of_weights, queries, weights, v, output, weight_sums, first_row, start + index * C,
            stop, head, v_head, block, eps, H, V_HEADS, DV, BV, C, NORMALIZE, SAVE_SUMS, DOT, PRECISION,
        )  # fmt: skip
        state = tl.dot(tl.trans(values), keys, state, input_precision=PRECISION)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def strong_output_kernel(
    q, k, v, gate, q_taps, k_taps, q_before, k_before, map_weight, keep, table,
    states, normalisers, strongest, output, weight_sums,
    tokens, num_segments, segment_tokens, divisor, lowest, eps,
    H: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, GATE_HEADS: tl.constexpr,
    GATE_WIDTH: tl.constexpr, N: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, FP: tl.constexpr, BV: tl.constexpr, V_BLOCKS: tl.constexpr, C: tl.constexpr,
    SUB: tl.constexpr, TAPS: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_MAP: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, IS_LOGIT: tl.constexpr, NORMALIZE: tl.constexpr,
    SAVE_SUMS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the output of the segments that decay too much for ``prepared_output_kernel``, from q and k."""
    program = tl.program_id(0)
    block = program % V_BLOCKS
    head = (program // V_BLOCKS) % H
    segment = program // (V_BLOCKS * H)
    first_row, start, stop, sequence, _ = locate_segment(
        segment, tokens, num_segments, segment_tokens, table, PACKED
    )
    n = head // (H // N)
    row = (segment + sequence).to(tl.int64) * N + n
    if tl.load(strongest + row) >= -2 * MAX_EXPONENT:
        return
    k_head = n // (N // K_HEADS)
    v_head = n // (N // V_HEADS)
    gate_head = n // (N // GATE_HEADS)
    weight = 0
    if HAS_MAP:
        weight = load_map_weight(map_weight, n, D, F, DP, FP).to(DOT)
    state, normaliser = load_state(states, normalisers, row, block, F, DV, FP, BV)
    for t0 in range(start, stop, C):
        b, total = chunk_decays(
            gate, first_row, t0, stop, gate_head, keep, divisor, lowest,
            GATE_HEADS, GATE_WIDTH, F, FP, C, IS_LOGIT, MASKED, INTERPRETED,
        )  # fmt: skip
        state, normaliser = output_chunk(
            state, normaliser, b, total, q, k, v, q_taps, k_taps, q_before, k_before, weight, keep, output,
            weight_sums, first_row, t0, stop, sequence, head, n, k_head, v_head, block, eps,
            H, K_HEADS, V_HEADS, N, D, F, DV, DP, FP, BV, C, SUB, TAPS,
            HAS_BEFORE, HAS_MAP, MASKED, NORMALIZE, SAVE_SUMS, DOT, PRECISION, INTERPRETED,
        )  # fmt: skip
