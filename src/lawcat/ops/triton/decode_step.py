"""One token of a layer between its projections and ``W_o``, in one launch.

A program serves one state head of one sequence, with all query heads that read it: convolution, feature map,
gate, update of the state and read-out. The state and the convolutions' inputs are updated in place, so that a
CUDA graph of the call can be replayed token after token. All arithmetic is in float32.

What bounds it is memory: the state is read and written once, all else is small. So there is no matrix
product here; sums over a tile are taken element by element.

Legend: B batch, H query heads, G kv heads, N state heads (H or G), R = H / N, D head width, F feature width,
K convolution taps. A tile's rows or columns beyond F / 2, D or R are padding up to a power of two.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import BackendError
from ..shapes import check_eps, check_shapes
from . import support

MAX_WIDTH = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Numbers of a tile of the state that a program holds at a time: 64 a thread of 8 warps.
_TILE_NUMBERS = 8192
# The three-dimensional products, of the maps of R heads, take a register a number.
_PRODUCT_NUMBERS = 8192


@triton.jit
def _softmax(x, is_inside):
    """Softmax over the last dimension, padding left out."""
    x = tl.where(is_inside, x, -float("inf"))
    e = tl.exp(x - tl.max(x, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit
def _log_sigmoid(x):
    """log(sigmoid(x)), exact where sigmoid(x) is nearly 1."""
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    # log(1 + y): the quotient makes up for what 1 + y lost in rounding.
    is_lost = u == 1.0
    log_1p = tl.where(is_lost, y, tl.log(u) * (y / tl.where(is_lost, 1.0, u - 1.0)))
    return tl.minimum(x, 0.0) - log_1p


@triton.jit
def _convolved(x_ptr, inputs_ptr, conv_ptr, channel, is_inside, TAPS: tl.constexpr):
    """The convolution at this token of the channels given; TAPS of 0 is none."""
    x = tl.load(x_ptr, mask=is_inside, other=0.0).to(tl.float32)
    if TAPS > 0:
        x *= tl.load(conv_ptr + channel * TAPS + TAPS - 1, mask=is_inside, other=0.0).to(tl.float32)
        for tap in tl.static_range(TAPS - 1):
            before = tl.load(inputs_ptr + channel * (TAPS - 1) + tap, mask=is_inside, other=0.0)
            weight = tl.load(conv_ptr + channel * TAPS + tap, mask=is_inside, other=0.0)
            x += before.to(tl.float32) * weight.to(tl.float32)
    return x


@triton.jit
def _shift(x_ptr, inputs_ptr, channel, is_inside, TAPS: tl.constexpr):
    """Forget the oldest input of the channels given and append the present one."""
    x = tl.load(x_ptr, mask=is_inside, other=0.0)
    place = inputs_ptr + channel * (TAPS - 1)
    for tap in tl.static_range(TAPS - 2):
        later = tl.load(place + tap + 1, mask=is_inside, other=0.0)
        # Threads that hold the same channel would else read what another has written.
        tl.debug_barrier()
        tl.store(place + tap, later, mask=is_inside)
    tl.debug_barrier()
    tl.store(place + TAPS - 2, x.to(inputs_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def _decode_step(
    q_ptr,
    k_ptr,
    v_ptr,
    gate_ptr,
    state_ptr,
    q_inputs_ptr,
    k_inputs_ptr,
    q_conv_ptr,
    k_conv_ptr,
    map_ptr,
    out_ptr,
    q_stride_b,
    q_stride_h,
    k_stride_b,
    k_stride_h,
    v_stride_b,
    v_stride_h,
    gate_stride_b,
    gate_stride_h,
    gate_divisor,
    min_log_decay,
    eps,
    N: tl.constexpr,
    R: tl.constexpr,
    REPEATS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    TAPS: tl.constexpr,
    GATE_WIDTH: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_MAP: tl.constexpr,
    IS_SHARED: tl.constexpr,
):
    program = tl.program_id(0)
    b = (program // N).to(tl.int64)
    n = program % N
    g = n // REPEATS

    half = tl.arange(0, BLOCK_H)
    is_feature = half < HALF
    head = tl.arange(0, BLOCK_R)
    is_head = head < R

    # (3) and (4): convolution, then the map's two softmaxes, of k and of the R heads of q.
    q_projected = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    k_projected = tl.zeros([BLOCK_H], tl.float32)
    q_head = n * R + head
    if TAPS > 0:
        q_inputs_ptr += b * (N * R * D * (TAPS - 1))
        k_inputs_ptr += b * (N * D * (TAPS - 1))
    for start in range(0, D, BLOCK_MAP):
        d = start + tl.arange(0, BLOCK_MAP)
        is_d = d < D
        weight = tl.load(
            map_ptr + n * (D * HALF) + d[:, None] * HALF + half[None, :],
            mask=is_d[:, None] & is_feature[None, :],
            other=0.0,
        ).to(tl.float32)  # [BLOCK_MAP, BLOCK_H]
        k = _convolved(
            k_ptr + b * k_stride_b + g * k_stride_h + d, k_inputs_ptr, k_conv_ptr, n * D + d, is_d, TAPS
        )
        k_projected += tl.sum(k[:, None] * weight, axis=0)
        is_q = is_head[:, None] & is_d[None, :]
        q = _convolved(
            q_ptr + b * q_stride_b + q_head[:, None] * q_stride_h + d[None, :],
            q_inputs_ptr,
            q_conv_ptr,
            q_head[:, None] * D + d[None, :],
            is_q,
            TAPS,
        )  # [BLOCK_R, BLOCK_MAP]
        if R == 1:
            q_projected += tl.sum(tl.sum(q, axis=0)[:, None] * weight, axis=0)[None, :]
        else:
            q_projected += tl.sum(q[:, :, None] * weight[None, :, :], axis=1)
    q_upper = _softmax(q_projected, is_feature[None, :])
    q_lower = _softmax(-q_projected, is_feature[None, :])
    k_upper = tl.sum(_softmax(k_projected[None, :], is_feature[None, :]), axis=0)
    k_lower = tl.sum(_softmax(-k_projected[None, :], is_feature[None, :]), axis=0)

    # (5)
    if GATE_WIDTH == 0:
        decay_upper = tl.full([BLOCK_H], 1.0, tl.float32)
        decay_lower = decay_upper
    else:
        place = gate_ptr + b * gate_stride_b + g * gate_stride_h
        upper_index = half if GATE_WIDTH > 1 else half * 0
        lower_index = half + HALF if GATE_WIDTH > 1 else half * 0
        logit_upper = tl.load(place + upper_index, mask=is_feature, other=0.0).to(tl.float32)
        logit_lower = tl.load(place + lower_index, mask=is_feature, other=0.0).to(tl.float32)
        log_upper = _log_sigmoid(logit_upper) / gate_divisor
        decay_upper = tl.exp(tl.maximum(log_upper, min_log_decay, propagate_nan=tl.PropagateNan.ALL))
        log_lower = _log_sigmoid(logit_lower) / gate_divisor
        decay_lower = tl.exp(tl.maximum(log_lower, min_log_decay, propagate_nan=tl.PropagateNan.ALL))

    # (6): the normaliser, which is the last column of the state, then D columns, a tile at a time.
    state_ptr += (b * N + n) * (2 * HALF * (D + 1))
    upper_row = state_ptr + half * (D + 1)
    lower_row = upper_row + HALF * (D + 1)
    z_upper = tl.load(upper_row + D, mask=is_feature, other=0.0) * decay_upper + k_upper
    z_lower = tl.load(lower_row + D, mask=is_feature, other=0.0) * decay_lower + k_lower
    scale = tl.full([BLOCK_R], 1.0, tl.float32)
    if NORMALIZE:
        scale = 1.0 / (tl.sum(q_upper * z_upper[None, :] + q_lower * z_lower[None, :], axis=1) + eps)
    # All of the inputs are read, by every thread, before one is written: several may hold the same number.
    tl.debug_barrier()
    tl.store(upper_row + D, z_upper, mask=is_feature)
    tl.store(lower_row + D, z_lower, mask=is_feature)
    if TAPS > 0:
        for start in range(0, D, BLOCK_MAP):
            d = start + tl.arange(0, BLOCK_MAP)
            is_d = d < D
            _shift(k_ptr + b * k_stride_b + g * k_stride_h + d, k_inputs_ptr, n * D + d, is_d, TAPS)
            _shift(
                q_ptr + b * q_stride_b + q_head[:, None] * q_stride_h + d[None, :],
                q_inputs_ptr,
                q_head[:, None] * D + d[None, :],
                is_head[:, None] & is_d[None, :],
                TAPS,
            )
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        is_d = d < D
        is_tile = is_feature[:, None] & is_d[None, :]
        v = tl.load(v_ptr + b * v_stride_b + g * v_stride_h + d, mask=is_d, other=0.0).to(tl.float32)
        upper = tl.load(upper_row[:, None] + d[None, :], mask=is_tile, other=0.0)
        lower = tl.load(lower_row[:, None] + d[None, :], mask=is_tile, other=0.0)
        upper = upper * decay_upper[:, None] + k_upper[:, None] * v[None, :]
        lower = lower * decay_lower[:, None] + k_lower[:, None] * v[None, :]
        if IS_SHARED:
            tl.debug_barrier()
        tl.store(upper_row[:, None] + d[None, :], upper, mask=is_tile)
        tl.store(lower_row[:, None] + d[None, :], lower, mask=is_tile)
        if R == 1:
            qu = tl.sum(q_upper, axis=0)
            ql = tl.sum(q_lower, axis=0)
            read = tl.sum(qu[:, None] * upper + ql[:, None] * lower, axis=0)[None, :]
        else:
            read = tl.sum(
                q_upper[:, :, None] * upper[None, :, :] + q_lower[:, :, None] * lower[None, :, :], axis=1
            )
        tl.store(
            out_ptr + (b * N * R + q_head[:, None]) * D + d[None, :],
            (read * scale[:, None]).to(out_ptr.dtype.element_ty),
            mask=is_head[:, None] & is_d[None, :],
        )


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor | None,
    state: Tensor,
    q_inputs: Tensor | None,
    k_inputs: Tensor | None,
    q_conv: Tensor | None,
    k_conv: Tensor | None,
    feature_weight: Tensor,
    *,
    gate_divisor: float = 16.0,
    min_log_decay: float = -2.5,
    normalize: bool = True,
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> Tensor:
    """Return the output of one token, and update the state and the convolutions' inputs in place.

    One launch; it allocates the output and nothing else, and asks nothing of the GPU, so that it can be
    captured in a CUDA graph.

    Args:
        q: The projections' outputs [B, H, D], or [B, 1, H, D] as in the other forms; its last dimension
            contiguous. So k and v.
        k: [B, G, D].
        v: [B, G, D].
        gate_logits: Before the activation [B, G, F], or [B, G, 1] for one a head; None for no decay.
        state: [B, N, F, D + 1] float32, contiguous, N of H or G; its last column is the normaliser.
        q_inputs: The K - 1 inputs of q's convolution before this token, oldest first [B, H * D, K - 1],
            contiguous; None without convolution, as the next three.
        k_inputs: The same of k's [B, N * D, K - 1].
        q_conv: Filters [H * D, K], contiguous.
        k_conv: Filters [N * D, K], contiguous.
        feature_weight: Matrices of the feature map [N, D, F / 2], contiguous.
        gate_divisor: ``log a = logsigmoid(logit) / gate_divisor``.
        min_log_decay: The least log a, below 0.
        normalize: Divide by the decayed sum of weights.
        eps: Added to that sum, above 0.
        out: Where to write the output [B, H, D], contiguous; new when None.

    Returns:
        [B, H, D] in v's dtype ([B, 1, H, D] where q had four dimensions).

    Raises:
        ValueError: when shapes or devices do not fit together.
        BackendError: a ``ValueError``, for what the kernel does not do: see ``unavailable_because``; also
            gradients, and tensors that are not laid out as above. Nothing has been written then.

    Source: equations 3 to 6 of LAWCAT (arXiv 2509.18467).

    Example:
        >>> from lawcat.ops.triton.decode_step import decode_step
        >>> o = decode_step(q, k, v, gate_logits, state, *inputs, *filters, matrices)  # doctest: +SKIP
    """
    if torch.compiler.is_compiling():
        from .custom_ops import traced_decode_step

        output = traced_decode_step(
            q, k, v, gate_logits, state, q_inputs, k_inputs, q_conv, k_conv, feature_weight,
            gate_divisor, min_log_decay, normalize, eps,
        )  # fmt: skip
        return output if out is None else out.copy_(output)
    has_token_dim = q.ndim == 4
    if has_token_dim:
        tokens = {t.shape[1] for t in (q, k, v, *(() if gate_logits is None else (gate_logits,)))}
        if tokens != {1}:
            raise ValueError(f"a step takes one token; got {sorted(tokens)}.")
        q, k, v = q[:, 0], k[:, 0], v[:, 0]
        gate_logits = None if gate_logits is None else gate_logits[:, 0]
        out = out[:, 0] if out is not None and out.ndim == 4 else out
    convolutions = (q_inputs, k_inputs, q_conv, k_conv)
    _check_shapes(q, k, v, gate_logits, state, convolutions, feature_weight, eps, out)
    _check_supported(q, k, v, gate_logits, state, convolutions, feature_weight, out)

    batch, num_heads, head_dim = q.shape
    num_state_heads, features = state.shape[1:3]
    if out is None:
        out = torch.empty(batch, num_heads, head_dim, dtype=v.dtype, device=v.device)
    if batch:
        half, group = features // 2, num_heads // num_state_heads
        blocks = _blocks(group, half, head_dim)
        launch = _decode_step[(batch * num_state_heads,)]
        with support.on_device_of(q):
            launch(
                q,
                k,
                v,
                gate_logits,
                state,
                q_inputs,
                k_inputs,
                q_conv,
                k_conv,
                feature_weight,
                out,
                q.stride(0),
                q.stride(1),
                k.stride(0),
                k.stride(1),
                v.stride(0),
                v.stride(1),
                0 if gate_logits is None else gate_logits.stride(0),
                0 if gate_logits is None else gate_logits.stride(1),
                gate_divisor,
                min_log_decay,
                eps,
                N=num_state_heads,
                R=group,
                REPEATS=num_state_heads // k.shape[1],
                D=head_dim,
                HALF=half,
                TAPS=0 if q_conv is None else q_conv.shape[1],
                GATE_WIDTH=0 if gate_logits is None else gate_logits.shape[2],
                NORMALIZE=normalize,
                **blocks,
            )
    return out[:, None] if has_token_dim else out


def _blocks(group: int, half: int, head_dim: int) -> dict[str, int]:
    """Return tile sizes and warps by shape: chosen, not searched for."""
    block_r, block_h = triton.next_power_of_2(group), triton.next_power_of_2(half)
    whole = triton.next_power_of_2(head_dim)
    block_d = min(whole, max(_TILE_NUMBERS // (2 * block_h * block_r), 16))
    block_map = min(whole, max(_PRODUCT_NUMBERS // (block_h * block_r), 16))
    num_warps = 8 if 2 * block_h * block_d * block_r > 4096 else 4
    return {
        "BLOCK_R": block_r,
        "BLOCK_H": block_h,
        "BLOCK_D": block_d,
        "BLOCK_MAP": block_map,
        # A tile of fewer numbers than threads: several hold the same number.
        "IS_SHARED": block_h * block_d < 32 * num_warps,
        "num_warps": num_warps,
    }


def unavailable_because(
    device: torch.device, dtype: torch.dtype, *, head_dim: int, feature_dim: int
) -> str | None:
    """Return why the kernel cannot run here, None when it can.

    Args:
        device: Where the tensors are.
        dtype: Of q, k and v.
        head_dim: Width D.
        feature_dim: Width F.
    """
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"the kernel runs on a GPU, and the tensors are on {device}"
    if dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        return f"the kernel takes {names}, not {str(dtype).removeprefix('torch.')}"
    if max(head_dim, feature_dim) > MAX_WIDTH:
        return f"the kernel takes widths up to {MAX_WIDTH}; head_dim is {head_dim}, feature_dim {feature_dim}"
    return None


_Convolutions = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor | None,
    state: Tensor,
    convolutions: _Convolutions,
    feature_weight: Tensor,
    eps: float,
    out: Tensor | None,
) -> None:
    if q.ndim != 3 or k.ndim != 3 or state.ndim != 4:
        raise ValueError(
            f"q and k must be [B, heads, D] and state [B, N, F, D + 1]; got {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(state.shape)}."
        )
    batch, num_heads, width = q.shape
    num_kv_heads, num_state_heads, features = k.shape[1], state.shape[1], state.shape[2]
    if num_kv_heads == 0 or num_heads % num_kv_heads or num_state_heads not in (num_heads, num_kv_heads):
        raise ValueError(
            f"q has {num_heads} heads, k {num_kv_heads} and the state {num_state_heads}: q's must be a "
            "multiple of k's, and the state's be the same as one of them."
        )
    if features < 2 or features % 2:
        raise ValueError(f"state has {features} features; their number must be even and at least 2.")
    check_eps(eps)
    given = [tensor is not None for tensor in convolutions]
    if any(given) and not all(given):
        raise ValueError("give all of q_inputs, k_inputs, q_conv and k_conv, or none for no convolution.")
    q_inputs, k_inputs, q_conv, k_conv = convolutions
    taps = 0 if q_conv is None else q_conv.shape[-1]
    if q_conv is not None and taps < 2:
        raise ValueError(f"q_conv has {taps} taps; it must have at least 2.")
    q_channels, k_channels = num_heads * width, num_state_heads * width
    gate_width = 1 if gate_logits is not None and gate_logits.shape[-1] == 1 else features
    check_shapes(q, {
        "k": (k, (batch, num_kv_heads, width)),
        "v": (v, (batch, num_kv_heads, width)),
        "gate_logits": (gate_logits, (batch, num_kv_heads, gate_width)),
        "state": (state, (batch, num_state_heads, features, width + 1)),
        "q_inputs": (q_inputs, (batch, q_channels, taps - 1)),
        "k_inputs": (k_inputs, (batch, k_channels, taps - 1)),
        "q_conv": (q_conv, (q_channels, taps)),
        "k_conv": (k_conv, (k_channels, taps)),
        "feature_weight": (feature_weight, (num_state_heads, width, features // 2)),
        "out": (out, (batch, num_heads, width)),
    })  # fmt: skip


def _check_supported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor | None,
    state: Tensor,
    convolutions: _Convolutions,
    feature_weight: Tensor,
    out: Tensor | None,
) -> None:
    remedy = 'Use backend="torch".'
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "gate_logits": gate_logits,
        "state": state,
        **dict(zip(("q_inputs", "k_inputs", "q_conv", "k_conv"), convolutions, strict=True)),
        "feature_weight": feature_weight,
        "out": out,
    }
    there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in there.items():
        reason = unavailable_because(
            tensor.device, tensor.dtype, head_dim=q.shape[2], feature_dim=state.shape[2]
        )
        if reason is not None:
            raise BackendError(f"{name}: {reason}. {remedy}")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise BackendError(f"{name} requires a gradient, and the kernel has none. {remedy}")
        is_read_by_stride = name in ("q", "k", "v", "gate_logits")
        if is_read_by_stride and tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            raise BackendError(f"{name} must be contiguous in its last dimension. {remedy}")
        if not is_read_by_stride and not tensor.is_contiguous():
            raise BackendError(f"{name} must be contiguous; its strides are {tensor.stride()}. {remedy}")
    if state.dtype != torch.float32:
        raise BackendError(f"state is {state.dtype}; the kernel keeps it in float32. {remedy}")
