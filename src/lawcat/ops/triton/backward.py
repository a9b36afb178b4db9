"""The backward kernels. Legend: ``blocks.py``; with d for the gradient of the loss by what follows.

With ``z_i`` the sum of weights of query i, ``s_i = 1 / (z_i + eps)`` and ``delta_i = do_i . o_i``, the weight
of token j for query i has the gradient ``s_i (do_i . v_j - delta_i)``: the normaliser's part is ``delta``
alone. Features are computed again from q and k; states at the segments' starts are kept from the forward, the
gradients of the states at their ends come from a pass in reverse like the forward's
(``state_gradient_kernel`` and ``scan_kernel``). The query kernel walks a segment forward and carries the
state, the key kernel walks it backward and carries the state's gradient.

Decays: a log-decay at t adds to the exponent of each later query and takes from that of each later key, so
its gradient is the sum of ``q dq - k dk`` over the tokens from t to the segment's end, and of ``S dS`` there.
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
    features,
    load_conv_inputs,
    load_decay_sum,
    load_decay_sums,
    load_features,
    load_map_weight,
    load_rows,
    load_state,
    locate_segment,
    log2_sigmoid,
    store_features,
    store_rows,
    store_state,
    without_padding,
)

_UNSPECIALIZED = ["tokens", "num_segments", "segment_tokens"]


@triton.jit
def load_scale(
    weight_sums, first_row, t0, stop, head, eps, H: tl.constexpr, C: tl.constexpr, NORMALIZE: tl.constexpr
):
    """Return 1 / (z + eps) of a chunk's queries [C]; ones without a normaliser."""
    i = tl.arange(0, C)
    if NORMALIZE:
        z = tl.load(weight_sums + (first_row + t0 + i) * H + head, mask=t0 + i < stop, other=1.0)
        scale = 1.0 / (z + eps)
    else:
        scale = tl.full([C], 1.0, tl.float32)
    return scale


@triton.jit
def load_delta(deltas, first_row, t0, stop, head, H: tl.constexpr, C: tl.constexpr, NORMALIZE: tl.constexpr):
    """Return delta of a chunk's queries [C]; zeros without a normaliser."""
    i = tl.arange(0, C)
    if NORMALIZE:
        delta = tl.load(deltas + (first_row + t0 + i) * H + head, mask=t0 + i < stop, other=0.0)
    else:
        delta = tl.zeros([C], tl.float32)
    return delta


@triton.jit
def map_backward(phi, product, F: tl.constexpr, FP: tl.constexpr, C: tl.constexpr):
    """Return the gradient of what the two softmaxes are taken of, from phi and ``phi dphi`` [C, FP]."""
    half: tl.constexpr = FP // 2
    sums = tl.sum(tl.reshape(product, [C, 2, half]), axis=2)
    spread = tl.reshape(tl.broadcast_to(sums[:, :, None], [C, 2, half]), [C, FP])
    return product - phi * spread


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def state_gradient_kernel(
    q, sums, q_taps, q_before, map_weight, keep, table,
    output, grad_output, weight_sums, deltas, states, normalisers, decays,
    tokens, num_segments, segment_tokens, eps,
    H: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, GATE_HEADS: tl.constexpr,
    GATE_WIDTH: tl.constexpr, N: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, FP: tl.constexpr, BV: tl.constexpr, V_BLOCKS: tl.constexpr, C: tl.constexpr,
    TAPS: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_MAP: tl.constexpr, MASKED: tl.constexpr,
    PACKED: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write what a segment's queries add to the gradient of the state before it, its decay, and delta."""
    program = tl.program_id(0)
    n = program % N
    segment = program // N
    first_row, start, stop, sequence, _ = locate_segment(
        segment, tokens, num_segments, segment_tokens, table, PACKED
    )
    gate_head = n // (N // GATE_HEADS)
    i = tl.arange(0, C)
    weight = 0
    if HAS_MAP:
        weight = load_map_weight(map_weight, n, D, F, DP, FP).to(DOT)
    state = tl.zeros([BV, FP], tl.float32)
    normaliser = tl.zeros([C, FP], tl.float32)
    decay = tl.zeros([FP], tl.float32)
    chunks = tl.cdiv(stop - start, C)
    for index in range(0, chunks):
        t0 = start + (chunks - 1 - index) * C
        last = tl.minimum(t0 + C, stop) - 1
        total = load_decay_sum(sums, first_row, last, gate_head, GATE_HEADS, GATE_WIDTH, F, FP)
        through = tl.exp2(total)
        state *= through[None, :]
        normaliser *= through[None, :]
        decay += total
        for r in range(0, H // N):
            head = n * (H // N) + r
            phi = features(
                q, first_row, t0, stop, head, keep, q_taps, q_before, sequence, weight, head,
                H, H, D, F, DP, FP, C, TAPS, HAS_BEFORE, MASKED, HAS_MAP, PRECISION, INTERPRETED,
            )  # fmt: skip
            b = load_decay_sums(sums, first_row, t0, stop, gate_head, GATE_HEADS, GATE_WIDTH, F, FP, C)
            scale = load_scale(weight_sums, first_row, t0, stop, head, eps, H, C, NORMALIZE)
            phi *= tl.exp2(b) * scale[:, None]
            grad = load_rows(grad_output, first_row, t0, stop, head, keep, H, DV, BV, C, 0, False)
            state = tl.dot(tl.trans(grad.to(DOT)), phi.to(DOT), state, input_precision=PRECISION)
            if NORMALIZE:
                out = load_rows(output, first_row, t0, stop, head, keep, H, DV, BV, C, 0, False)
                delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
                tl.store(deltas + (first_row + t0 + i) * H + head, delta, mask=t0 + i < stop)
                normaliser -= phi * delta[:, None]
    row = (segment + sequence).to(tl.int64) * N + n
    total = tl.sum(normaliser, axis=0)
    store_state(states, normalisers, decays, row, 0, state, total, decay, F, DV, FP, BV)


@triton.jit
def query_gradient_chunk(
    state, normaliser, q, k, v, sums, q_taps, k_taps, q_before, k_before, weight, keep, grad_output,
    weight_sums, deltas, grad_q, products,
    first_row, t0, stop, sequence, head, n, k_head, v_head, gate_head, eps,
    H: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, GATE_HEADS: tl.constexpr,
    GATE_WIDTH: tl.constexpr, N: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, FP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr,
    TAPS: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_MAP: tl.constexpr, MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write a chunk's gradient of q and q dq; return the state and its normaliser after the chunk.

    Keys come in sub-blocks of SUB tokens; with SUB = C, all at once.
    """
    i = tl.arange(0, C)
    last = tl.minimum(t0 + C, stop) - 1
    total = load_decay_sum(sums, first_row, last, gate_head, GATE_HEADS, GATE_WIDTH, F, FP)
    b = load_decay_sums(sums, first_row, t0, stop, gate_head, GATE_HEADS, GATE_WIDTH, F, FP, C)
    phi = features(
        k, first_row, t0, stop, k_head, keep, k_taps, k_before, sequence, weight, n,
        K_HEADS, N, D, F, DP, FP, C, TAPS, HAS_BEFORE, MASKED, HAS_MAP, PRECISION, INTERPRETED,
    )  # fmt: skip
    phi = without_padding(phi, first_row, t0, stop, keep, C, MASKED)
    values = load_rows(v, first_row, t0, stop, v_head, keep, V_HEADS, DV, BV, C, 0, False).to(DOT)
    grad = load_rows(grad_output, first_row, t0, stop, head, keep, H, DV, BV, C, 0, False).to(DOT)
    delta = load_delta(deltas, first_row, t0, stop, head, H, C, NORMALIZE)
    weights = tl.dot(grad, tl.trans(values), input_precision=PRECISION) - delta[:, None]
    weights = tl.where(i[:, None] >= i[None, :], weights, 0.0).to(DOT)
    if SUB == C:
        b -= 0.5 * total[None, :]
        half = tl.exp2(0.5 * total)
        phi *= tl.exp2(-b)
        grad_phi = tl.dot(weights, phi.to(DOT), input_precision=PRECISION)
        k_end = (phi * half[None, :]).to(DOT)
        grad_phi = tl.dot(grad, (state * half[None, :]).to(DOT), grad_phi, input_precision=PRECISION)
        grad_phi -= delta[:, None] * (normaliser * half)[None, :]
        grad_phi *= tl.exp2(b)
    else:
        grad_phi = tl.dot(grad, state.to(DOT), input_precision=PRECISION)
        grad_phi = (grad_phi - delta[:, None] * normaliser[None, :]) * tl.exp2(b)
        before = tl.zeros([FP], tl.float32)
        for s in range(0, C, SUB):
            border = tl.minimum(t0 + s + SUB - 1, last)
            after = load_decay_sum(sums, first_row, border, gate_head, GATE_HEADS, GATE_WIDTH, F, FP)
            center = 0.5 * (before + after)[None, :]
            k_part = tl.where(((i >= s) & (i < s + SUB))[:, None], phi * tl.exp2(center - b), 0.0)
            part = tl.dot(weights, k_part.to(DOT), input_precision=PRECISION)
            grad_phi += tl.where((i >= s)[:, None], part * tl.exp2(b - center), 0.0)
            before = after
        k_end = (phi * tl.exp2(total[None, :] - b)).to(DOT)
    through = tl.exp2(total)
    state = tl.dot(tl.trans(values), k_end, state * through[None, :], input_precision=PRECISION)
    normaliser = normaliser * through + tl.sum(k_end.to(tl.float32), axis=0)

    grad_phi *= load_scale(weight_sums, first_row, t0, stop, head, eps, H, C, NORMALIZE)[:, None]
    phi = features(
        q, first_row, t0, stop, head, keep, q_taps, q_before, sequence, weight, head,
        H, H, D, F, DP, FP, C, TAPS, HAS_BEFORE, MASKED, HAS_MAP, PRECISION, INTERPRETED,
    )  # fmt: skip
    product = phi * grad_phi
    store_features(products, product, first_row, t0, stop, head, H, F, FP, C)
    if HAS_MAP:
        grad_phi = map_backward(phi, product, F, FP, C)
    store_features(grad_q, grad_phi, first_row, t0, stop, head, H, F, FP, C)
    return state, normaliser


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def query_gradient_kernel(
    q, k, v, sums, q_taps, k_taps, q_before, k_before, map_weight, keep, table,
    states, normalisers, strongest, grad_output, weight_sums, deltas, grad_q, products,
    tokens, num_segments, segment_tokens, eps,
    H: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, GATE_HEADS: tl.constexpr,
    GATE_WIDTH: tl.constexpr, N: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, FP: tl.constexpr, BV: tl.constexpr, V_BLOCKS: tl.constexpr, C: tl.constexpr,
    SUB: tl.constexpr, TAPS: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_MAP: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the gradient of q (before the map, if there is one) and q dq. One program a segment and head."""
    program = tl.program_id(0)
    head = program % H
    segment = program // H
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
    state, normaliser = load_state(states, normalisers, row, 0, F, DV, FP, BV)
    if SUB == C or tl.load(strongest + row) >= -2 * MAX_EXPONENT:
        for t0 in range(start, stop, C):
            state, normaliser = query_gradient_chunk(
                state, normaliser, q, k, v, sums, q_taps, k_taps, q_before, k_before, weight, keep,
                grad_output, weight_sums, deltas, grad_q, products,
                first_row, t0, stop, sequence, head, n, k_head, v_head, gate_head, eps,
                H, K_HEADS, V_HEADS, GATE_HEADS, GATE_WIDTH, N, D, F, DV, DP, FP, BV, C, C, TAPS,
                HAS_BEFORE, HAS_MAP, MASKED, NORMALIZE, DOT, PRECISION, INTERPRETED,
            )  # fmt: skip
    else:
        for t0 in range(start, stop, C):
            state, normaliser = query_gradient_chunk(
                state, normaliser, q, k, v, sums, q_taps, k_taps, q_before, k_before, weight, keep,
                grad_output, weight_sums, deltas, grad_q, products,
                first_row, t0, stop, sequence, head, n, k_head, v_head, gate_head, eps,
                H, K_HEADS, V_HEADS, GATE_HEADS, GATE_WIDTH, N, D, F, DV, DP, FP, BV, C, SUB, TAPS,
                HAS_BEFORE, HAS_MAP, MASKED, NORMALIZE, DOT, PRECISION, INTERPRETED,
            )  # fmt: skip


@triton.jit
def key_gradient_chunk(
    state, normaliser, carry, q, k, v, sums, q_taps, k_taps, q_before, k_before, weight, keep, grad_output,
    weight_sums, deltas, grad_k, grad_v, products, grad_decay,
    first_row, t0, stop, sequence, n, k_head, v_head, gate_head, eps,
    H: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, GATE_HEADS: tl.constexpr,
    GATE_WIDTH: tl.constexpr, N: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, FP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr,
    TAPS: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_MAP: tl.constexpr, MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write a chunk's gradients of k, v and log-decay; return the state's gradient before the chunk.

    Keys come in sub-blocks of SUB tokens; with SUB = C, all at once.
    """
    i = tl.arange(0, C)
    last = tl.minimum(t0 + C, stop) - 1
    total = load_decay_sum(sums, first_row, last, gate_head, GATE_HEADS, GATE_WIDTH, F, FP)
    through = tl.exp2(total)
    half = tl.exp2(0.5 * total)
    b = load_decay_sums(sums, first_row, t0, stop, gate_head, GATE_HEADS, GATE_WIDTH, F, FP, C)
    phi = features(
        k, first_row, t0, stop, k_head, keep, k_taps, k_before, sequence, weight, n,
        K_HEADS, N, D, F, DP, FP, C, TAPS, HAS_BEFORE, MASKED, HAS_MAP, PRECISION, INTERPRETED,
    )  # fmt: skip
    phi = without_padding(phi, first_row, t0, stop, keep, C, MASKED)
    values = load_rows(v, first_row, t0, stop, v_head, keep, V_HEADS, DV, BV, C, 0, False).to(DOT)
    if SUB == C:
        b -= 0.5 * total[None, :]
        k_middle = phi * tl.exp2(-b)
        k_end = (k_middle * half[None, :]).to(DOT)
        k_middle = k_middle.to(DOT)
        grad_phi = tl.dot(values, (state * half[None, :]).to(DOT), input_precision=PRECISION)
        grad_phi += (normaliser * half)[None, :]
    else:
        to_end = tl.exp2(total[None, :] - b)
        k_end = (phi * to_end).to(DOT)
        grad_phi = tl.dot(values, state.to(DOT), input_precision=PRECISION)
        grad_phi = (grad_phi + normaliser[None, :]) * to_end
    grad_values = tl.dot(k_end, tl.trans(state.to(DOT)), input_precision=PRECISION)
    state *= through[None, :]
    normaliser *= through
    product = tl.zeros([C, FP], tl.float32)
    for r in range(0, H // N):
        head = n * (H // N) + r
        phi_q = features(
            q, first_row, t0, stop, head, keep, q_taps, q_before, sequence, weight, head,
            H, H, D, F, DP, FP, C, TAPS, HAS_BEFORE, MASKED, HAS_MAP, PRECISION, INTERPRETED,
        )  # fmt: skip
        phi_q *= load_scale(weight_sums, first_row, t0, stop, head, eps, H, C, NORMALIZE)[:, None]
        grad = load_rows(grad_output, first_row, t0, stop, head, keep, H, DV, BV, C, 0, False).to(DOT)
        delta = load_delta(deltas, first_row, t0, stop, head, H, C, NORMALIZE)
        # Both transposed: [key, query].
        grad_weights = tl.dot(values, tl.trans(grad), input_precision=PRECISION) - delta[None, :]
        grad_weights = tl.where(i[:, None] <= i[None, :], grad_weights, 0.0).to(DOT)
        if SUB == C:
            phi_q *= tl.exp2(b)
            q_middle = phi_q.to(DOT)
            weights = tl.dot(k_middle, tl.trans(q_middle), input_precision=PRECISION)
            grad_phi = tl.dot(grad_weights, q_middle, grad_phi, input_precision=PRECISION)
            q_start = phi_q * half[None, :]
        else:
            weights = tl.zeros([C, C], tl.float32)
            before = tl.zeros([FP], tl.float32)
            for s in range(0, C, SUB):
                border = tl.minimum(t0 + s + SUB - 1, last)
                after = load_decay_sum(sums, first_row, border, gate_head, GATE_HEADS, GATE_WIDTH, F, FP)
                center = 0.5 * (before + after)[None, :]
                in_part = ((i >= s) & (i < s + SUB))[:, None]
                k_factor = tl.exp2(center - b)
                k_part = tl.where(in_part, phi * k_factor, 0.0).to(DOT)
                q_part = tl.where((i >= s)[:, None], phi_q * tl.exp2(b - center), 0.0).to(DOT)
                weights = tl.dot(k_part, tl.trans(q_part), weights, input_precision=PRECISION)
                part = tl.dot(grad_weights, q_part, input_precision=PRECISION)
                grad_phi += tl.where(in_part, part * k_factor, 0.0)
                before = after
            q_start = phi_q * tl.exp2(b)
        weights = tl.where(i[:, None] <= i[None, :], weights, 0.0).to(DOT)
        grad_values = tl.dot(weights, grad, grad_values, input_precision=PRECISION)
        state = tl.dot(tl.trans(grad), q_start.to(DOT), state, input_precision=PRECISION)
        if NORMALIZE:
            normaliser -= tl.sum(q_start * delta[:, None], axis=0)
        product += load_features(products, first_row, t0, stop, head, H, F, FP, C, 0)
    store_rows(grad_v, grad_values, first_row, t0, stop, n, N, DV, BV, C)
    if SUB == C:
        key_product = k_middle.to(tl.float32) * grad_phi
        grad_phi *= tl.exp2(-b)
        phi = k_middle.to(tl.float32) * tl.exp2(b)
    else:
        key_product = phi * grad_phi
    product -= key_product
    if HAS_MAP:
        grad_phi = map_backward(phi, key_product, F, FP, C)
    store_features(grad_k, grad_phi, first_row, t0, stop, n, N, F, FP, C)
    decay = tl.cumsum(product, axis=0, reverse=True) + carry[None, :]
    carry += tl.sum(product, axis=0)
    if GATE_WIDTH == 1:
        tl.store(grad_decay + (first_row + t0 + i) * N + n, tl.sum(decay, axis=1), mask=t0 + i < stop)
    else:
        store_features(grad_decay, decay, first_row, t0, stop, n, N, F, FP, C)
    return state, normaliser, carry


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def key_gradient_kernel(
    q, k, v, sums, q_taps, k_taps, q_before, k_before, map_weight, keep, table,
    states, normalisers, strongest, state_gradients, normaliser_gradients,
    grad_output, weight_sums, deltas, grad_k, grad_v, products, grad_decay,
    tokens, num_segments, segment_tokens, eps,
    H: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, GATE_HEADS: tl.constexpr,
    GATE_WIDTH: tl.constexpr, N: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, FP: tl.constexpr, BV: tl.constexpr, V_BLOCKS: tl.constexpr, C: tl.constexpr,
    SUB: tl.constexpr, TAPS: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_MAP: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the gradients of k (before the map), of v and of log-decay, a state head each.

    One program a segment and state head. ``products`` holds q dq.
    """
    program = tl.program_id(0)
    n = program % N
    segment = program // N
    first_row, start, stop, sequence, _ = locate_segment(
        segment, tokens, num_segments, segment_tokens, table, PACKED
    )
    k_head = n // (N // K_HEADS)
    v_head = n // (N // V_HEADS)
    gate_head = n // (N // GATE_HEADS)
    weight = 0
    if HAS_MAP:
        weight = load_map_weight(map_weight, n, D, F, DP, FP).to(DOT)
    row = (segment + sequence).to(tl.int64) * N + n
    state, normaliser = load_state(state_gradients, normaliser_gradients, row, 0, F, DV, FP, BV)
    # The state at the segment's end is that before the next, in the row after this one.
    state_at_end, normaliser_at_end = load_state(states, normalisers, row + N, 0, F, DV, FP, BV)
    carry = tl.sum(state_at_end * state, axis=0) + normaliser * normaliser_at_end
    chunks = tl.cdiv(stop - start, C)
    if SUB == C or tl.load(strongest + row) >= -2 * MAX_EXPONENT:
        for index in range(0, chunks):
            state, normaliser, carry = key_gradient_chunk(
                state, normaliser, carry, q, k, v, sums, q_taps, k_taps, q_before, k_before, weight, keep,
                grad_output, weight_sums, deltas, grad_k, grad_v, products, grad_decay,
                first_row, start + (chunks - 1 - index) * C, stop, sequence, n, k_head, v_head, gate_head,
                eps, H, K_HEADS, V_HEADS, GATE_HEADS, GATE_WIDTH, N, D, F, DV, DP, FP, BV, C, C, TAPS,
                HAS_BEFORE, HAS_MAP, MASKED, NORMALIZE, DOT, PRECISION, INTERPRETED,
            )  # fmt: skip
    else:
        for index in range(0, chunks):
            state, normaliser, carry = key_gradient_chunk(
                state, normaliser, carry, q, k, v, sums, q_taps, k_taps, q_before, k_before, weight, keep,
                grad_output, weight_sums, deltas, grad_k, grad_v, products, grad_decay,
                first_row, start + (chunks - 1 - index) * C, stop, sequence, n, k_head, v_head, gate_head,
                eps, H, K_HEADS, V_HEADS, GATE_HEADS, GATE_WIDTH, N, D, F, DV, DP, FP, BV, C, SUB, TAPS,
                HAS_BEFORE, HAS_MAP, MASKED, NORMALIZE, DOT, PRECISION, INTERPRETED,
            )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def map_gradient_kernel(
    x, projected, taps, before, map_weight, keep, table, grad_x, grad_map, grad_taps,
    tokens, num_segments, segment_tokens,
    X_HEADS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    DP: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr, TAPS_P: tl.constexpr,
    HAS_BEFORE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x, and a segment's part of those of [W, -W] and of the filters.

    ``projected`` is the gradient of ``conv(x) [W, -W]``. One program a segment and head; x may have fewer
    heads than there are filters: then the heads' gradients of x are summed later.
    """
    program = tl.program_id(0)
    head = program % HEADS
    segment = program // HEADS
    first_row, start, stop, sequence, length = locate_segment(
        segment, tokens, num_segments, segment_tokens, table, PACKED
    )
    x_head = head // (HEADS // X_HEADS)
    i = tl.arange(0, C)
    d = tl.arange(0, DP)
    feature, is_feature = feature_columns(F, FP)
    weight = tl.trans(load_map_weight(map_weight, head // (HEADS // N), D, F, DP, FP).to(DOT))
    grad_weight = tl.zeros([DP, FP], tl.float32)
    index = tl.arange(0, TAPS_P)
    grad_filters = tl.zeros([TAPS_P, DP], tl.float32)
    for t0 in range(start, stop, C):
        u = convolved_rows(
            x, first_row, t0, stop, x_head, keep, taps, before, sequence, head,
            X_HEADS, HEADS, D, DP, C, TAPS, HAS_BEFORE, MASKED,
        )  # fmt: skip
        grad = load_features(projected, first_row, t0, length, head, HEADS, F, FP, C, 0).to(DOT)
        grad_weight = tl.dot(tl.trans(u.to(DOT)), grad, grad_weight, input_precision=PRECISION)
        grad_u = tl.dot(grad, weight, input_precision=PRECISION)
        if TAPS == 0:
            total = grad_u
        else:
            total = tl.zeros([C, DP], tl.float32)
            channel = head * D + d
            for tap in tl.static_range(TAPS):
                # Tap TAPS - 1 weighs the present token.
                filter_tap = tl.load(taps + channel * TAPS + tap, mask=d < D, other=0.0).to(tl.float32)
                later = grad_u
                if tap < TAPS - 1:
                    later = load_features(
                        projected, first_row, t0, length, head, HEADS, F, FP, C, TAPS - 1 - tap
                    ).to(DOT)
                    later = tl.dot(later, weight, input_precision=PRECISION)
                total += later * filter_tap[None, :]
                rows = load_conv_inputs(
                    x, first_row, t0, stop, x_head, keep, before, sequence, head,
                    X_HEADS, HEADS, D, DP, C, TAPS, TAPS - 1 - tap, HAS_BEFORE, MASKED,
                ).to(tl.float32)  # fmt: skip
                grad_filters += tl.where(index[:, None] == tap, tl.sum(rows * grad_u, axis=0)[None, :], 0.0)
        if MASKED:
            kept = tl.load(keep + first_row + t0 + i, mask=t0 + i < stop, other=0)
            total = tl.where((kept != 0)[:, None], total, 0.0)
        store_rows(grad_x, total, first_row, t0, stop, head, HEADS, D, DP, C)
    base = grad_map + (segment.to(tl.int64) * HEADS + head) * (D * F)
    tl.store(
        base + d[:, None] * F + feature[None, :], grad_weight, mask=(d[:, None] < D) & is_feature[None, :]
    )
    if TAPS > 0:
        base = grad_taps + (segment.to(tl.int64) * HEADS + head) * (D * TAPS)
        tl.store(
            base + d[None, :] * TAPS + index[:, None],
            grad_filters,
            mask=(d[None, :] < D) & (index[:, None] < TAPS),
        )


@triton.jit(do_not_specialize=["rows"])
def gate_gradient_kernel(
    gate, grad_decay, keep, grad_gate, rows, divisor, lowest,
    GATE_HEADS: tl.constexpr, N: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, C: tl.constexpr,
    IS_LOGIT: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the gate: the sum over its state heads, through the activation."""
    program = tl.program_id(0)
    head = program % GATE_HEADS
    first_row = (program // GATE_HEADS).to(tl.int64) * C
    i = tl.arange(0, C)
    w = tl.arange(0, WP)
    inside = (first_row + i < rows)[:, None] & (w[None, :] < W)
    per_state: tl.constexpr = N // GATE_HEADS
    total = tl.zeros([C, WP], tl.float32)
    for r in range(0, per_state):
        base = grad_decay + first_row * (N * W) + (head * per_state + r) * W
        total += tl.load(base + i[:, None] * (N * W) + w[None, :], mask=inside, other=0.0)
    offset = first_row * (GATE_HEADS * W) + head * W
    place = i[:, None] * (GATE_HEADS * W) + w[None, :]
    if IS_LOGIT:
        x = tl.load(gate + offset + place, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        log_decay, e = log2_sigmoid(x, INTERPRETED)
        log_decay = log_decay / divisor
        # The derivative of logsigmoid is sigmoid(-x).
        slope = tl.where(x > 0, e / (1.0 + e), 1.0 / (1.0 + e)) / divisor
        total = tl.where(log_decay >= lowest * LOG2_E, total * slope, 0.0)
    if MASKED:
        kept = tl.load(keep + first_row + i, mask=first_row + i < rows, other=0)
        total = tl.where((kept != 0)[:, None], total, 0.0)
    tl.store(grad_gate + offset + place, total.to(grad_gate.dtype.element_ty), mask=inside)
