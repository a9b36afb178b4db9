"""The operator's definition, token by token: the ground truth of every test. Slow on purpose.

Equation numbers follow ``docs/method.md``; source: LAWCAT, Findings of EMNLP 2025 (arXiv 2509.18467).
Legend: see ``shapes.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import state_dtype, without_autocast
from .shapes import check_attention_inputs, check_log_decay, repeat_heads


def gated_linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return the output and final state of normalised gated linear attention, computed one token at a time.

    Args:
        q: Query features [B, T, H, F]; query head h reads state head ``h // (H / N)``.
        k: Key features [B, T, N, F].
        v: Values [B, T, G, D]; state head n takes in those of head ``n // (N / G)``.
        log_decay: Natural logarithm of the decay, at most 0: [B, T, G, F], or [B, T, G, 1] for one a head.
        initial_state: State before the first token [B, N, F, D + 1]; zeros when None.
        normalize: Divide by the decayed sum of weights (equation 6), else return the plain sum.
        eps: Added to that sum before dividing, above 0.

    Returns:
        ``o`` [B, T, H, D] in v's dtype and the state [B, N, F, D + 1], whose last column is the normaliser,
        in float32, or float64 when an input is float64. All arithmetic is in that dtype.

    Raises:
        ValueError: when shapes or devices do not fit together, or a log_decay is above 0.

    Source: equations 5 and 6 of LAWCAT (arXiv 2509.18467).

    Example:
        >>> import torch
        >>> x = torch.rand(1, 5, 2, 4)
        >>> o, state = gated_linear_attention_reference(x, x, x, torch.zeros_like(x))
        >>> o.shape, state.shape
        (torch.Size([1, 5, 2, 4]), torch.Size([1, 2, 4, 5]))
    """
    check_attention_inputs(q, k, v, log_decay, initial_state, eps)
    if log_decay.numel():
        check_log_decay(log_decay.detach().max().item())
    batch, tokens, num_query_heads, feature_dim = q.shape
    num_state_heads, value_dim = k.shape[2], v.shape[3]
    group = num_query_heads // num_state_heads

    dtype = state_dtype(q, k, v, log_decay, initial_state)
    state = v.new_zeros(batch, num_state_heads, feature_dim, value_dim + 1, dtype=dtype)
    if initial_state is not None:
        state = initial_state.to(dtype)
    output_dtype = v.dtype
    v, log_decay = (repeat_heads(t, num_state_heads) for t in (v, log_decay))
    q, k, v, decay = q.to(dtype), k.to(dtype), v.to(dtype), log_decay.to(dtype).exp()
    values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # [B, T, N, D+1]
    output = [v.new_zeros(batch, 0, num_query_heads, value_dim)]
    with without_autocast(v):
        for t in range(tokens):
            update = k[:, t, :, :, None] * values[:, t, :, None, :]  # [B, N, F, D+1]
            state = decay[:, t, :, :, None] * state + update  # S_t = diag(a_t) S_{t-1} + phi(k_t)^T [v_t, 1]
            state_by_query_head = state.repeat_interleave(group, dim=1)  # [B, H, F, D+1]
            read = (q[:, t, :, None, :] @ state_by_query_head)[..., 0, :]  # [n_t, z_t], [B, H, D+1]
            numerator, normaliser = read[..., :-1], read[..., -1:]
            output.append((numerator / (normaliser + eps) if normalize else numerator)[:, None])
    return torch.cat(output, dim=1).to(output_dtype), state


def windowed_linear_attention_reference(
    scores: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    window: int,
    num_sinks: int = 0,
    factor: Tensor | None = None,
    is_real: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Return softmax over the last tokens and linear attention over the rest, from a dense matrix of weights.

    Each past token is counted once. That of token t for token s of its past is::

        factor * exp(scores_ts - max over near tokens)    where s is near: s > t - window, or a sink
        phi(q_t) . (a_{s+1} ... a_t) . phi(k_s)           where it is far

    Args:
        scores: Logits of the softmax [B, H, T, T].
        q: Query features [B, T, H, F]; query head h reads state head ``h // (H / N)``.
        k: Key features [B, T, N, F].
        v: Values [B, T, N, D].
        log_decay: Natural logarithm of the decay a, at most 0: [B, T, N, F], or [B, T, N, 1] for one a head.
        window: Tokens that are near, the present one among them.
        num_sinks: First tokens of each row that are near for ever.
        factor: Of the near weights, one a query head [H]; 1 when None.
        is_real: Which tokens are no padding [B, T], bool; all when None. Padding is in no sum, and takes up
            its place in the window.
        normalize: Divide by the sum of all weights, else return the plain sum.
        eps: Added to that sum before dividing, above 0.

    Returns:
        [B, T, H, D] in the dtype of the arguments.

    Source: LoLCATs (arXiv 2410.10254), equation 6, with decay; sinks as in StreamingLLM (arXiv 2309.17453).
    """
    batch, tokens, num_query_heads, _ = q.shape
    group = num_query_heads // k.shape[2]
    k, v, log_decay = (t.repeat_interleave(group, dim=2) for t in (k, v, log_decay))  # [B, T, H, .]
    if is_real is None:
        is_real = torch.ones(batch, tokens, dtype=torch.bool, device=q.device)
    token = torch.arange(tokens, device=q.device)
    is_past = (token[None, :] <= token[:, None]) & is_real[:, None, :]  # [B, t, s]
    is_sink = is_real & (is_real.cumsum(1) <= num_sinks)
    is_near = is_past & ((token[None, :] > token[:, None] - window) | is_sink[:, None, :])
    is_far = is_past & ~is_near

    largest = scores.masked_fill(~is_near[:, None], -torch.inf).amax(-1, keepdim=True)
    largest = largest.clamp(min=torch.finfo(scores.dtype).min)  # rows of padding
    near = (scores - largest).masked_fill(~is_near[:, None], -torch.inf).exp()
    if factor is not None:
        near = near * factor[:, None, None]
    total = log_decay.cumsum(1)
    between = total[:, :, None] - total[:, None]  # [B, t, s, H, F]
    between = between.masked_fill(~is_far[..., None, None], 0.0).exp()
    far = torch.einsum("bthf,btshf,bshf->bhts", q, between.expand(-1, -1, -1, -1, q.shape[-1]), k)
    weights = near + far.masked_fill(~is_far[:, None], 0.0)  # [B, H, t, s]
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return torch.einsum("bhts,bshd->bthd", weights, v)
