"""Checks of the arguments that every form of the operator shares.

Legend of this package (batch first, one layout everywhere):
    B batch, T tokens, H query heads, N heads of k, v and the state (N divides H), F feature width, D value width,
    C channels of a convolution, K its taps, R = H / N query heads that read one state.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_attention_inputs(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None
) -> None:
    """Raise ``ValueError`` where shapes or devices of a gated linear attention do not fit together.

    Args:
        q: [B, T, H, F].
        k: [B, T, N, F].
        v: [B, T, N, D].
        log_decay: [B, T, N, F], or [B, T, N, 1] for one decay a head.
        initial_state: [B, N, F, D + 1] or None.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or log_decay.ndim != 4:
        raise ValueError(
            "q, k, v and log_decay have four dimensions [batch, tokens, heads, width]; got "
            f"{q.ndim}, {k.ndim}, {v.ndim} and {log_decay.ndim}."
        )
    batch, tokens, num_query_heads, feature_dim = q.shape
    num_state_heads = k.shape[2]
    if tuple(k.shape) != (batch, tokens, num_state_heads, feature_dim):
        raise ValueError(f"k is {tuple(k.shape)}; with q {tuple(q.shape)} it must be [B, T, N, F].")
    if tuple(v.shape[:3]) != (batch, tokens, num_state_heads):
        raise ValueError(f"v is {tuple(v.shape)}; with k {tuple(k.shape)} it must be [B, T, N, D].")
    if num_state_heads == 0 or num_query_heads % num_state_heads:
        raise ValueError(f"q has {num_query_heads} heads, which is not a multiple of the {num_state_heads} of k.")
    if tuple(log_decay.shape[:3]) != tuple(k.shape[:3]) or log_decay.shape[3] not in (1, feature_dim):
        raise ValueError(f"log_decay is {tuple(log_decay.shape)}; it must be like k {tuple(k.shape)} or end in 1.")
    expected_state = (batch, num_state_heads, feature_dim, v.shape[3] + 1)
    if initial_state is not None and tuple(initial_state.shape) != expected_state:
        raise ValueError(
            f"initial_state is {tuple(initial_state.shape)}; it must be [B, N, F, D + 1] = {expected_state}."
        )
    tensors = [q, k, v, log_decay] + ([] if initial_state is None else [initial_state])
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"the tensors are on different devices: {', '.join(sorted(devices))}; move them to one.")


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of the state: float64 if any tensor is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
