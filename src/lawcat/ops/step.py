"""One token: state in, state out. No Python branch on data, so that it exports as a graph.

Legend: see ``shapes.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .shapes import state_dtype


def gated_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    *,
    normalize: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return the output and state after one token.

    Args:
        q: Query features [B, H, F], or [B, 1, H, F] as in the other forms.
        k: Key features [B, N, F], or [B, 1, N, F].
        v: Values [B, N, D], or [B, 1, N, D].
        log_decay: At most 0: [B, N, F] or [B, N, 1], or with a token dimension of 1.
        initial_state: State before the token [B, N, F, D + 1].
        normalize: Divide by the decayed sum of weights.
        eps: Added to that sum before dividing.

    Returns:
        ``o`` [B, H, D] in v's dtype ([B, 1, H, D] where q had four dimensions) and the new state.

    Source: equations 5 and 6 of LAWCAT (arXiv 2509.18467).

    Example:
        >>> import torch
        >>> x = torch.rand(1, 2, 4)
        >>> o, state = gated_linear_attention_step(x, x, x, torch.zeros_like(x), torch.zeros(1, 2, 4, 5))
        >>> o.shape
        torch.Size([1, 2, 4])
    """
    has_token_dim = q.ndim == 4
    if has_token_dim:
        q, k, v, log_decay = q.squeeze(1), k.squeeze(1), v.squeeze(1), log_decay.squeeze(1)
    dtype = state_dtype(v, initial_state)
    batch, num_query_heads, feature_dim = q.shape
    num_state_heads = k.shape[1]
    queries = q.to(dtype).view(batch, num_state_heads, num_query_heads // num_state_heads, feature_dim)
    k, values = k.to(dtype), v.to(dtype)

    state = initial_state.to(dtype) * log_decay.to(dtype).exp()[..., None]  # [B, N, F, D+1]
    # The column of ones is added to the state and not put beside v: one small copy less a token.
    update = k[..., None] * values[..., None, :]  # [B, N, F, D]
    numerator_state = state[..., :-1] + update
    normaliser_state = state[..., -1] + k  # [B, N, F]
    numerator = queries @ numerator_state  # [B, N, R, D]
    if normalize:
        numerator = numerator / (queries @ normaliser_state[..., None] + eps)
    output = numerator.reshape(batch, num_query_heads, v.shape[-1]).to(v.dtype)
    state = torch.cat([numerator_state, normaliser_state[..., None]], dim=-1)
    return (output[:, None] if has_token_dim else output), state
