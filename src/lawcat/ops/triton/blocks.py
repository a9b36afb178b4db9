"""What the kernels of this folder share: where a segment lies, the convolution, the feature map, the decays.

Legend: T tokens, C tokens of a chunk, SUB tokens of a sub-block of a chunk, D head width, F feature width,
DP and FP the same rounded up to what a tile can have. In a tile of features the first FP/2 columns hold the
first half of the features and the others the second, each padded by itself.
All decays are in logarithms to the base 2, since ``exp2`` is what the hardware computes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Half of what a chunk or sub-block may decay, a little above e^40 so that 32 tokens of e^-2.5 fit. It is far
# from what float32 and bfloat16 hold, also when it is multiplied with values and summed.
MAX_EXPONENT = tl.constexpr(57.75)


@triton.jit
def locate_segment(segment, tokens, num_segments, segment_tokens, table, PACKED: tl.constexpr):
    """Return the sequence's first row, the segment's start and stop, the sequence, and its length.

    Start and stop are counted from the start of the sequence. ``table`` has a row of these five for each
    segment of a packed batch; else all sequences have the same length and the same segments.
    """
    if PACKED:
        first_row = tl.load(table + segment * 5).to(tl.int64)
        start = tl.load(table + segment * 5 + 1)
        stop = tl.load(table + segment * 5 + 2)
        sequence = tl.load(table + segment * 5 + 3)
        length = tl.load(table + segment * 5 + 4)
    else:
        sequence = segment // num_segments
        start = (segment % num_segments) * segment_tokens
        stop = tl.minimum(start + segment_tokens, tokens)
        first_row = sequence.to(tl.int64) * tokens
        length = tokens
    return first_row, start, stop, sequence, length


@triton.jit
def feature_columns(F: tl.constexpr, FP: tl.constexpr):
    """Return which feature each column of a tile holds, and whether it holds one at all."""
    column = tl.arange(0, FP)
    half: tl.constexpr = FP // 2
    if F == FP:
        feature = column
        is_feature = column < F
    else:
        feature = (column // half) * (F // 2) + column % half
        is_feature = column % half < F // 2
    return feature, is_feature


@triton.jit
def load_map_weight(weight, head, D: tl.constexpr, F: tl.constexpr, DP: tl.constexpr, FP: tl.constexpr):
    """Return [W, -W] of a head as a tile [DP, FP] in float32."""
    column = tl.arange(0, FP)
    within = column % (FP // 2)
    d = tl.arange(0, DP)
    inside = (d[:, None] < D) & (within[None, :] < F // 2)
    tile = tl.load(
        weight + head * (D * (F // 2)) + d[:, None] * (F // 2) + within[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    return tl.where(column[None, :] < FP // 2, tile, -tile)


@triton.jit
def load_rows(
    x, first_row, t0, stop, head, keep,
    HEADS: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, C: tl.constexpr, SHIFT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Return x[t0 - SHIFT : t0 - SHIFT + C, head] as a tile [C, WP], zero outside of the sequence."""
    i = tl.arange(0, C)
    w = tl.arange(0, WP)
    t = t0 + i - SHIFT
    inside = (t >= 0) & (t < stop)
    base = x + (first_row + t0) * (HEADS * W) + head * W
    offset = (i[:, None] - SHIFT) * (HEADS * W) + w[None, :]
    if W == WP:
        tile = tl.load(base + offset, mask=inside[:, None], other=0.0)
    else:
        tile = tl.load(base + offset, mask=inside[:, None] & (w[None, :] < W), other=0.0)
    if MASKED:
        kept = tl.load(keep + (first_row + t0) + (i - SHIFT), mask=inside, other=0)
        tile = tl.where(kept[:, None] != 0, tile, 0.0)
    return tile


@triton.jit
def store_rows(
    x, tile, first_row, t0, stop, head,
    HEADS: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write a tile [C, WP] to x[t0 : t0 + C, head], but for tokens at ``stop`` or after."""
    i = tl.arange(0, C)
    w = tl.arange(0, WP)
    base = x + (first_row + t0) * (HEADS * W) + head * W
    tl.store(
        base + i[:, None] * (HEADS * W) + w[None, :],
        tile.to(x.dtype.element_ty),
        mask=(t0 + i < stop)[:, None] & (w[None, :] < W),
    )


@triton.jit
def load_conv_inputs(
    x, first_row, t0, stop, head, keep, before, sequence, weight_head,
    HEADS: tl.constexpr, WEIGHT_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr,
    TAPS: tl.constexpr, SHIFT: tl.constexpr, HAS_BEFORE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the inputs that lie SHIFT tokens before those of a chunk, a tile [C, DP].

    ``before`` holds the TAPS - 1 inputs before the sequence.
    """
    rows = load_rows(x, first_row, t0, stop, head, keep, HEADS, D, DP, C, SHIFT, MASKED)
    if HAS_BEFORE and SHIFT > 0:
        d = tl.arange(0, DP)
        i = TAPS - 1 + t0 + tl.arange(0, C) - SHIFT
        base = before + sequence.to(tl.int64) * (WEIGHT_HEADS * D * (TAPS - 1)) + weight_head * D * (TAPS - 1)
        rows += tl.load(
            base + d[None, :] * (TAPS - 1) + i[:, None],
            mask=((i >= 0) & (i < TAPS - 1))[:, None] & (d[None, :] < D),
            other=0.0,
        ).to(rows.dtype)
    return rows


@triton.jit
def convolved_rows(
    x, first_row, t0, stop, head, keep, taps, before, sequence, weight_head,
    HEADS: tl.constexpr, WEIGHT_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr,
    TAPS: tl.constexpr, HAS_BEFORE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the causal convolution of x[t0 : t0 + C, head] with a head's taps as a tile [C, DP] in float32.

    TAPS of 0: x itself.
    """
    if TAPS == 0:
        y = load_rows(x, first_row, t0, stop, head, keep, HEADS, D, DP, C, 0, MASKED).to(tl.float32)
    else:
        d = tl.arange(0, DP)
        channel = weight_head * D + d
        y = tl.zeros([C, DP], tl.float32)
        for tap in tl.static_range(TAPS):
            rows = load_conv_inputs(
                x, first_row, t0, stop, head, keep, before, sequence, weight_head,
                HEADS, WEIGHT_HEADS, D, DP, C, TAPS, TAPS - 1 - tap, HAS_BEFORE, MASKED,
            ).to(tl.float32)  # fmt: skip
            filter_tap = tl.load(taps + channel * TAPS + tap, mask=d < D, other=0.0).to(tl.float32)
            y += rows * filter_tap[None, :]
    return y


@triton.jit
def stay_in_layout(x, INTERPRETED: tl.constexpr):
    """Return x. The compiler does not carry the layout that a matrix product wants for x up through this.

    It would otherwise compute what makes x in that layout, where each thread holds more columns: more filters
    and more trips through shared memory.
    """
    if not INTERPRETED:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)
    return x


@triton.jit
def halves_softmax(x, F: tl.constexpr, FP: tl.constexpr, C: tl.constexpr):
    """Return the softmax of each half of the columns of x [C, FP]."""
    half: tl.constexpr = FP // 2
    x = x * LOG2_E
    if F != FP:
        _, is_feature = feature_columns(F, FP)
        x = tl.where(is_feature[None, :], x, float("-inf"))
    x = tl.reshape(x, [C, 2, half])
    e = tl.exp2(x - tl.max(x, axis=2)[:, :, None])
    e = e * (1.0 / tl.sum(e, axis=2))[:, :, None]
    return tl.reshape(e, [C, FP])


@triton.jit
def load_features(
    x, first_row, t0, stop, head,
    HEADS: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Return x[t0 + SHIFT : t0 + SHIFT + C, head] as a tile of features [C, FP], zero from ``stop`` on."""
    i = tl.arange(0, C) + SHIFT
    feature, is_feature = feature_columns(F, FP)
    base = x + (first_row + t0) * (HEADS * F) + head * F
    return tl.load(
        base + i[:, None] * (HEADS * F) + feature[None, :],
        mask=(t0 + i < stop)[:, None] & is_feature[None, :],
        other=0.0,
    )


@triton.jit
def store_features(
    x, tile, first_row, t0, stop, head,
    HEADS: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write a tile of features [C, FP] to x[t0 : t0 + C, head], but for tokens at ``stop`` or after."""
    i = tl.arange(0, C)
    feature, is_feature = feature_columns(F, FP)
    base = x + (first_row + t0) * (HEADS * F) + head * F
    tl.store(
        base + i[:, None] * (HEADS * F) + feature[None, :],
        tile.to(x.dtype.element_ty),
        mask=(t0 + i < stop)[:, None] & is_feature[None, :],
    )


@triton.jit
def features(
    x, first_row, t0, stop, head, keep, taps, before, sequence, map_weight, weight_head,
    HEADS: tl.constexpr, WEIGHT_HEADS: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DP: tl.constexpr,
    FP: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr,
    HAS_BEFORE: tl.constexpr, MASKED: tl.constexpr,
    HAS_MAP: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return phi(conv(x)) of a chunk as a tile [C, FP] in float32; without a map, x holds the features."""
    if HAS_MAP:
        u = convolved_rows(
            x, first_row, t0, stop, head, keep, taps, before, sequence, weight_head,
            HEADS, WEIGHT_HEADS, D, DP, C, TAPS, HAS_BEFORE, MASKED,
        )  # fmt: skip
        u = stay_in_layout(u, INTERPRETED)
        projected = tl.dot(u.to(map_weight.dtype), map_weight, input_precision=PRECISION)
        phi = halves_softmax(projected, F, FP, C)
    else:
        phi = load_features(x, first_row, t0, stop, head, HEADS, F, FP, C, 0).to(tl.float32)
    return phi


@triton.jit
def without_padding(phi, first_row, t0, stop, keep, C: tl.constexpr, MASKED: tl.constexpr):
    """Return key features with those of padded tokens, and of tokens at ``stop`` or after, set to zero."""
    t = t0 + tl.arange(0, C)
    real = t < stop
    if MASKED:
        real = real & (tl.load(keep + first_row + t, mask=real, other=0) != 0)
    return tl.where(real[:, None], phi, 0.0)


@triton.jit
def load_decay_sums(
    sums, first_row, t0, stop, gate_head,
    GATE_HEADS: tl.constexpr, GATE_WIDTH: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Return the sums of log-decays from the chunk's start up to each token, a tile [C, FP].

    Rows of tokens at ``stop`` or after repeat the last one.
    """
    i = tl.minimum(tl.arange(0, C), stop - 1 - t0)
    feature, is_feature = feature_columns(F, FP)
    if GATE_WIDTH == 1:
        feature = feature * 0
    base = sums + (first_row + t0) * (GATE_HEADS * GATE_WIDTH) + gate_head * GATE_WIDTH
    offset = i[:, None] * (GATE_HEADS * GATE_WIDTH) + feature[None, :]
    return tl.load(base + offset, mask=is_feature[None, :], other=0.0)


@triton.jit
def load_decay_sum(
    sums, first_row, t, gate_head,
    GATE_HEADS: tl.constexpr, GATE_WIDTH: tl.constexpr, F: tl.constexpr, FP: tl.constexpr,
):  # fmt: skip
    """Return one token's row of ``load_decay_sums``, a vector [FP]."""
    feature, is_feature = feature_columns(F, FP)
    if GATE_WIDTH == 1:
        feature = feature * 0
    base = sums + (first_row + t) * (GATE_HEADS * GATE_WIDTH) + gate_head * GATE_WIDTH
    return tl.load(base + feature, mask=is_feature, other=0.0)


@triton.jit
def load_values(
    v, first_row, t0, stop, head, block,
    HEADS: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Return a block of columns of v[t0 : t0 + C, head] as a tile [C, BV], zero from ``stop`` on."""
    i = tl.arange(0, C)
    column = block * BV + tl.arange(0, BV)
    base = v + (first_row + t0) * (HEADS * DV) + head * DV
    return tl.load(
        base + i[:, None] * (HEADS * DV) + column[None, :],
        mask=(t0 + i < stop)[:, None] & (column[None, :] < DV),
        other=0.0,
    )


@triton.jit
def load_state(
    states, normalisers, row, block,
    F: tl.constexpr, DV: tl.constexpr, FP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Return a block of a state [BV, FP] and its normaliser [FP]."""
    column = block * BV + tl.arange(0, BV)
    feature, is_feature = feature_columns(F, FP)
    state = tl.load(
        states + row * (F * DV) + column[:, None] * F + feature[None, :],
        mask=(column[:, None] < DV) & is_feature[None, :],
        other=0.0,
    )
    return state, tl.load(normalisers + row * F + feature, mask=is_feature, other=0.0)


@triton.jit
def store_state(
    states, normalisers, decays, row, block, state, normaliser, decay,
    F: tl.constexpr, DV: tl.constexpr, FP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write a block of a state [BV, FP]; the first block writes normaliser and decay [FP] too."""
    column = block * BV + tl.arange(0, BV)
    feature, is_feature = feature_columns(F, FP)
    tl.store(
        states + row * (F * DV) + column[:, None] * F + feature[None, :],
        state,
        mask=(column[:, None] < DV) & is_feature[None, :],
    )
    if block == 0:
        tl.store(normalisers + row * F + feature, normaliser, mask=is_feature)
        tl.store(decays + row * F + feature, decay, mask=is_feature)


@triton.jit
def log2_sigmoid(x, INTERPRETED: tl.constexpr):
    """Return log2(sigmoid) of logits that are given times log2(e), and ``e = 2^-|x|``.

    To 3e-7, and for small e to one part in 200,000: sums over many tokens keep the slow channels.
    """
    e = tl.exp2(-tl.abs(x))
    # The hardware's logarithm is one instruction, tl.log2 some twenty; but 1 + e in float32 has no digits
    # left for the slow channels, where e is small.
    if INTERPRETED:
        logarithm = tl.log2(1.0 + e)
    else:
        logarithm = tl.inline_asm_elementwise(
            "lg2.approx.f32 $0, $1;", "=r,r", [1.0 + e], dtype=tl.float32, is_pure=True, pack=1
        )
    series = e * (1.0 - e * (0.5 - e * (0.3333333333333333 - 0.25 * e))) * LOG2_E
    return tl.minimum(x, 0.0) - tl.where(e < 0.03125, series, logarithm), e
