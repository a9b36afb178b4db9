"""One token through the whole mixer, in as few PyTorch operations as it takes: starting them is most of it.

No Python branch on data, so that it exports as a graph. Legend: see ``shapes.py``; also G heads of k, v and
the gate as the projections give them (G divides N).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decay import log_decay_of
from .precision import at_least_float32, state_dtype


def linear_attention_mixer_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    map_weight: Tensor,
    initial_state: Tensor,
    *,
    q_taps: Tensor | None = None,
    k_taps: Tensor | None = None,
    q_inputs: Tensor | None = None,
    k_inputs: Tensor | None = None,
    gate_divisor: float = 16.0,
    min_log_decay: float = -2.5,
    normalize: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return what ``linear_attention_mixer`` returns of one token without padding. Shapes are not checked.

    Args:
        q: [B, 1, H, D], as projected.
        k: [B, 1, G, D].
        v: [B, 1, G, D].
        gate: Logits [B, 1, G, F or 1]; no decay when None.
        map_weight: [N, D, F / 2].
        initial_state: State before the token [B, N, F, D + 1].
        q_taps: Filters of q [H * D, K]; no convolution when None.
        k_taps: Filters of k [N * D, K].
        q_inputs: Inputs of q's convolution before the token [B, H * D, K - 1]; given with ``q_taps``.
        k_inputs: The same of k [B, N * D, K - 1].
        gate_divisor: ``log a = max(logsigmoid(gate) / gate_divisor, min_log_decay)``.
        min_log_decay: See above.
        normalize: Divide by the decayed sum of weights.
        eps: Added to that sum, above 0.

    Returns:
        The output [B, 1, H, D] in v's dtype, the state, and the last K - 1 inputs of the two convolutions.

    Source: section 3 of LAWCAT (arXiv 2509.18467).

    Example:
        >>> import torch
        >>> q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 2, 8)
        >>> o, state, _, _ = linear_attention_mixer_step(
        ...     q, k, k, None, torch.rand(4, 8, 4), torch.zeros(1, 4, 8, 9)
        ... )
        >>> o.shape, state.shape
        (torch.Size([1, 1, 4, 8]), torch.Size([1, 4, 8, 9]))
    """
    batch, _, num_query_heads, width = q.shape
    num_kv_heads, value_dim = v.shape[2:]
    num_heads, _, half = map_weight.shape
    repeats = num_heads // num_kv_heads
    dtype = state_dtype(q, k, v, gate, initial_state)
    if repeats > 1:  # each copy has filters and a map of its own
        k = k.transpose(1, 2).expand(batch, num_kv_heads, repeats, width)
    queries = q.reshape(batch, num_query_heads * width, 1)
    keys = k.reshape(batch, num_heads * width, 1)
    if q_taps is None:
        q_inputs = k_inputs = None
    else:
        assert q_inputs is not None
        assert k_inputs is not None
        assert k_taps is not None
        queries, q_inputs = _convolve(queries, q_taps, q_inputs)
        keys, k_inputs = _convolve(keys, k_taps, k_inputs)

    # One product for q and k, which share a map: [N, B * (R + 1), D] @ [N, D, F/2].
    group = num_query_heads // num_heads
    both = torch.cat(
        [queries.view(batch, num_heads, group, width), keys.view(batch, num_heads, 1, width)], dim=2
    )
    grouped = both[0] if batch == 1 else both.transpose(0, 1).reshape(num_heads, -1, width)
    projected = torch.bmm(at_least_float32(grouped), at_least_float32(map_weight))
    features = torch.stack([projected, projected.neg()], dim=2).softmax(-1).to(dtype)
    if batch == 1:
        features = features.view(1, num_heads, group + 1, 2 * half)
    else:
        features = features.view(num_heads, batch, group + 1, 2 * half).transpose(0, 1)

    values = at_least_float32(v).to(dtype).transpose(1, 2)  # [B, G, 1, D]
    values = torch.cat([values, values.new_ones(batch, num_kv_heads, 1, 1)], dim=3)
    by_group = (batch, num_kv_heads, repeats, 2 * half, value_dim + 1)
    state = initial_state.to(dtype).view(by_group)
    if gate is not None:
        decay = log_decay_of(gate, gate_divisor, min_log_decay).to(dtype).exp()
        state = state * decay.view(batch, num_kv_heads, 1, -1, 1)
    new_keys = features[:, :, group:].reshape(batch, num_kv_heads, repeats, 2 * half, 1)
    state = torch.addcmul(state, new_keys, values.unsqueeze(2)).view(initial_state.shape)
    output = features[:, :, :group] @ state  # [B, N, R, D + 1]
    output = output[..., :-1] / (output[..., -1:] + eps) if normalize else output[..., :-1]
    return output.reshape(batch, 1, num_query_heads, value_dim).to(v.dtype), state, q_inputs, k_inputs


def _convolve(x: Tensor, taps: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return the convolution at one token [B, C] of x [B, C, 1], and the inputs that the next one needs."""
    seen = torch.cat([before.to(x.dtype), x], dim=2)  # [B, C, K]
    return (seen * at_least_float32(taps)).sum(2), seen[:, :, 1:]
