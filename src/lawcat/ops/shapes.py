"""What every form of the operator shares: checks of its arguments, and heads that stand for several.

Legend of this package (batch first, one layout everywhere):
    B batch, T tokens, H query heads, N heads of k's features and of the state (N divides H), G heads of v and
    the decay (G divides N), F feature width, D value width, C channels of a convolution, K its taps,
    R = H / N query heads that read one state.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_attention_inputs(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None, eps: float
) -> None:
    """Raise ``ValueError`` where the arguments of a gated linear attention do not fit together.

    Args:
        q: [B, T, H, F].
        k: [B, T, N, F].
        v: [B, T, G, D].
        log_decay: [B, T, G, F], or [B, T, G, 1] for one decay a head.
        initial_state: [B, N, F, D + 1] or None.
        eps: Above 0.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or log_decay.ndim != 4:
        raise ValueError(
            "q, k, v and log_decay must have four dimensions [batch, tokens, heads, width]; got "
            f"{q.ndim}, {k.ndim}, {v.ndim} and {log_decay.ndim}."
        )
    batch, tokens, num_query_heads, feature_dim = q.shape
    num_state_heads = k.shape[2]
    if k.shape != (batch, tokens, num_state_heads, feature_dim):
        raise ValueError(f"k is {tuple(k.shape)}; with q {tuple(q.shape)} it must be [B, T, N, F].")
    groups = v.shape[2]
    is_multiple = num_state_heads % groups == 0 if groups else num_state_heads == 0
    if v.shape[:2] != k.shape[:2] or not is_multiple:
        raise ValueError(
            f"v is {tuple(v.shape)}; with k {tuple(k.shape)} it must be [B, T, G, D], and the heads of k a "
            "multiple of G."
        )
    if num_state_heads == 0 or num_query_heads % num_state_heads:
        raise ValueError(
            f"q has {num_query_heads} heads, which must be a multiple of the {num_state_heads} of k."
        )
    if log_decay.shape[:3] != v.shape[:3] or log_decay.shape[3] not in (1, feature_dim):
        wanted = (*v.shape[:3], feature_dim)
        raise ValueError(f"log_decay is {tuple(log_decay.shape)}; it must be {wanted} or end in 1.")
    state_shape = (batch, num_state_heads, feature_dim, v.shape[3] + 1)
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(
            f"initial_state is {tuple(initial_state.shape)}; it must be [B, N, F, D + 1] = {state_shape}."
        )
    devices = {t.device for t in (q, k, v, log_decay, initial_state) if t is not None}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the tensors are on different devices: {names}; move them to one.")
    check_dtypes({"q": q, "k": k, "v": v, "log_decay": log_decay, "initial_state": initial_state})
    check_eps(eps)


def check_eps(eps: float) -> None:
    """Raise ``ValueError`` if what is added to the normaliser is not above 0."""
    if eps <= 0:
        raise ValueError(f"eps={eps} must be above 0: the normaliser it is added to may be 0.")


def check_dtypes(tensors: Mapping[str, Tensor | None]) -> None:
    """Raise ``ValueError`` where a tensor's dtype is none to calculate in: integers would be cut off."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _DTYPES:
            allowed = ", ".join(str(dtype) for dtype in _DTYPES)
            raise ValueError(f"{name} is {tensor.dtype}; it must be one of {allowed}.")


def check_shapes(q: Tensor, expected: Mapping[str, tuple[Tensor | None, tuple[int | None, ...]]]) -> None:
    """Raise ``ValueError`` where a tensor has not the shape expected, or is not where q is.

    Args:
        q: What the shapes are expected with.
        expected: Tensors by name, None for those that are not there, and shapes, with None for any size.
    """
    device = q.device
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape and not _fits(tensor.shape, shape):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}; with q {tuple(q.shape)} it must be [{wanted}]."
            )
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and q on {device}; move them to one device.")


def _fits(sizes: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    return len(sizes) == len(shape) and all(w in (None, s) for s, w in zip(sizes, shape, strict=True))


def check_log_decay(highest: float) -> None:
    """Raise ``ValueError`` if the highest log-decay is above 0."""
    if highest > 0:
        raise ValueError(
            f"log_decay holds {highest:.3g}; it is the logarithm of a decay, so it must be at most 0."
        )


def check_log_decay_range(log_decay: Tensor, min_log_decay: float, name: str = "log_decay") -> None:
    """Raise ``ValueError`` where log-decays are not between their bound and 0.

    Not looked for while a CUDA graph is captured, or compiled, or without data. Elsewhere a GPU is
    waited for.

    Args:
        log_decay: Of any shape.
        min_log_decay: The bound.
        name: What the caller's argument is called.
    """
    if torch.compiler.is_compiling() or not log_decay.numel():
        return
    if log_decay.is_meta or isinstance(log_decay, FakeTensor):
        return
    if log_decay.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    lowest, highest = (bound.item() for bound in torch.aminmax(log_decay.detach()))
    check_log_decay(highest)
    # A bound that the dtype cannot hold may have been rounded down.
    if lowest < min_log_decay * (1 + torch.finfo(log_decay.dtype).eps):
        raise ValueError(
            f"{name} holds log-decays down to {lowest:.3g}, below min_log_decay={min_log_decay:.3g}; clamp "
            "them or give a lower bound."
        )


def repeat_heads(t: Tensor, heads: int) -> Tensor:
    """Return t [B, T, G, W] as [B, T, heads, W]: head h is that of group ``h // (heads / G)``."""
    repeats = heads // t.shape[2]
    if repeats == 1:
        return t
    return t[:, :, :, None].expand(-1, -1, -1, repeats, -1).flatten(2, 3)
