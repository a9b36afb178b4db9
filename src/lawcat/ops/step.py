"""One token: state in, state out. No Python branch on data, so that it exports as a graph.

Legend: see ``shapes.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import state_dtype, without_autocast
from .shapes import check_attention_inputs


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
        v: Values [B, G, D], or [B, 1, G, D]; state head n takes in those of head ``n // (N / G)``.
        log_decay: At most 0 (not looked at): [B, G, F] or [B, G, 1], or with a token dimension of 1.
        initial_state: State before the token [B, N, F, D + 1].
        normalize: Divide by the decayed sum of weights.
        eps: Added to that sum before dividing, above 0.

    Returns:
        ``o`` [B, H, D] in v's dtype ([B, 1, H, D] where q had four dimensions) and the new state.

    Raises:
        ValueError: when shapes or devices do not fit together, or there is more than one token.

    Source: equations 5 and 6 of LAWCAT (arXiv 2509.18467).

    Example:
        >>> import torch
        >>> x = torch.rand(1, 2, 4)
        >>> o, state = gated_linear_attention_step(x, x, x, torch.zeros_like(x), torch.zeros(1, 2, 4, 5))
        >>> o.shape
        torch.Size([1, 2, 4])
    """
    has_token_dim = q.ndim == 4
    if not has_token_dim:
        q, k, v, log_decay = (t.unsqueeze(1) for t in (q, k, v, log_decay))
    check_attention_inputs(q, k, v, log_decay, initial_state, eps)
    batch, tokens, num_query_heads, feature_dim = q.shape
    if tokens != 1:
        raise ValueError(f"q has {tokens} tokens; a step takes one. Use gated_linear_attention for more.")
    num_state_heads, (groups, value_dim) = k.shape[2], v.shape[2:]
    copies = num_state_heads // groups

    dtype = state_dtype(q, k, v, log_decay, initial_state)
    queries = q.to(dtype).reshape(batch, num_state_heads, -1, feature_dim)  # [B, N, R, F]
    keys = k[:, 0].to(dtype).reshape(batch, groups, copies, feature_dim, 1)  # [B, G, P, F, 1], P = N / G
    values = v[:, 0].to(dtype)[:, :, None, None]  # [B, G, 1, 1, D]
    decay = log_decay[:, 0].to(dtype).exp()[:, :, None, :, None]  # [B, G, 1, F or 1, 1]
    with without_autocast(v):
        state = (
            initial_state.to(dtype).reshape(batch, groups, copies, feature_dim, value_dim + 1) * decay
        )  # [B, G, P, F, D+1]
        # The column of ones is added to the state and not put beside v: one small copy less a token.
        numerator_state = (state[..., :-1] + keys * values).flatten(1, 2)  # [B, N, F, D]
        normaliser_state = (state[..., -1:] + keys).flatten(1, 2)  # [B, N, F, 1]
        output = queries @ numerator_state  # [B, N, R, D]
        if normalize:
            output = output / (queries @ normaliser_state + eps)
        state = torch.cat([numerator_state, normaliser_state], dim=-1)
    output = output.reshape(batch, 1, num_query_heads, value_dim).to(v.dtype)
    return (output if has_token_dim else output.squeeze(1)), state
