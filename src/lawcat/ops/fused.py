"""The whole mixer, from the projections to W_o, in one call: PyTorch operations, or fused kernels.

Legend: see ``shapes.py``; also G heads of k, v and the gate as the projections give them (G divides N).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import choose_backend, gated_linear_attention
from .convolution import causal_conv1d
from .feature_map import hedgehog_feature_map
from .precision import at_least_float32, without_autocast

MixerResult = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def linear_attention_mixer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    map_weight: Tensor,
    *,
    q_taps: Tensor | None = None,
    k_taps: Tensor | None = None,
    gate_is_logit: bool = True,
    gate_divisor: float = 16.0,
    min_log_decay: float = -2.5,
    initial_state: Tensor | None = None,
    q_inputs: Tensor | None = None,
    k_inputs: Tensor | None = None,
    mask: Tensor | None = None,
    boundaries: tuple[int, ...] | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    backend: str = "auto",
) -> MixerResult:
    """Return the output of the mixer, its final state, and the inputs that the convolutions need next.

    Equations 2 to 6: group expansion, causal convolution of q and k, feature map, decay, gated recurrence
    and division by the sum of weights.

    Args:
        q: [B, T, H, D], as projected.
        k: [B, T, G, D].
        v: [B, T, G, D].
        gate: Logits [B, T, G, F or 1], or log-decays with ``gate_is_logit=False``.
        map_weight: [N, D, F / 2]; N is H for a state a query head or G for one a kv head.
        q_taps: Filters of q [H * D, K]; no convolution when None.
        k_taps: Filters of k [N * D, K].
        gate_is_logit: ``log a = max(logsigmoid(gate) / gate_divisor, min_log_decay)``, else ``log a = gate``.
        gate_divisor: See above.
        min_log_decay: See above; log-decays that are given must not be below it.
        initial_state: State before the first token [S, N, F, D + 1], S sequences; zeros when None.
        q_inputs: Inputs of q's convolution before the first token [S, H * D, K - 1]; zeros when None.
        k_inputs: The same of k [S, N * D, K - 1].
        mask: [B, T], 0 for padding, which gives zeros to the convolutions, adds nothing to the state and
            does not decay it.
        boundaries: Of a packed batch (B = 1): where its sequences start, and the end, (0, ..., T).
        normalize: Divide by the decayed sum of weights.
        eps: Added to that sum, above 0.
        backend: See ``gated_linear_attention``; ``"triton"`` runs the fused kernels.

    Returns:
        The output [B, T, H, D] in v's dtype, the state [S, N, F, D + 1], and the last K - 1 inputs of the two
        convolutions (None without them).

    Raises:
        BackendError: a ``ValueError``, when the backend does not exist.
        ValueError: when shapes do not fit together.

    Source: section 3 of LAWCAT (arXiv 2509.18467).

    Example:
        >>> import torch
        >>> q, k = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8)
        >>> o, state, _, _ = linear_attention_mixer(q, k, k, torch.zeros(1, 5, 2, 8), torch.rand(4, 8, 4))
        >>> o.shape, state.shape
        (torch.Size([1, 5, 4, 8]), torch.Size([1, 4, 8, 9]))
    """
    name = choose_backend(backend)
    if boundaries is not None:
        return _packed_by_sequence(
            q, k, v, gate, map_weight, boundaries, mask, initial_state, q_inputs, k_inputs,
            q_taps=q_taps, k_taps=k_taps, gate_is_logit=gate_is_logit, gate_divisor=gate_divisor,
            min_log_decay=min_log_decay, normalize=normalize, eps=eps, backend=backend,
        )  # fmt: skip
    with without_autocast(q):
        log_decay = gate
        if gate_is_logit:
            log_decay = (F.logsigmoid(at_least_float32(gate)) / gate_divisor).clamp(min=min_log_decay)
        state_heads = map_weight.shape[0]
        k, v, log_decay = (_repeat_heads(t, state_heads) for t in (k, v, log_decay))
        keep = None
        if mask is not None:
            keep = mask[:, :, None, None].to(q.dtype)
            q, k, log_decay = q * keep, k * keep, log_decay * keep
        if q_taps is not None:
            assert k_taps is not None
            q, q_inputs = _convolve(q, q_taps, q_inputs)
            k, k_inputs = _convolve(k, k_taps, k_inputs)
        else:
            q_inputs = k_inputs = None
        q, k = hedgehog_feature_map(q, map_weight), hedgehog_feature_map(k, map_weight)
        if keep is not None:
            k = k * keep
        output, state = gated_linear_attention(
            q, k, v, log_decay,
            initial_state=initial_state, normalize=normalize, eps=eps, min_log_decay=min_log_decay,
            backend=name,
        )  # fmt: skip
    return output, state, q_inputs, k_inputs


def _convolve(x: Tensor, taps: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    y, inputs = causal_conv1d(x.flatten(2), at_least_float32(taps), before)
    return y.view(x.shape), inputs


def _repeat_heads(t: Tensor, heads: int) -> Tensor:
    """[B, T, G, W] -> [B, T, heads, W], each head repeated in place."""
    repeats = heads // t.shape[2]
    if repeats == 1:
        return t
    return t[:, :, :, None].expand(-1, -1, -1, repeats, -1).flatten(2, 3)


def _packed_by_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    map_weight: Tensor,
    boundaries: tuple[int, ...],
    mask: Tensor | None,
    initial_state: Tensor | None,
    q_inputs: Tensor | None,
    k_inputs: Tensor | None,
    **options: object,
) -> MixerResult:
    """One sequence of a packed batch after the other."""
    results = []
    for index, (start, stop) in enumerate(itertools.pairwise(boundaries)):
        tokens = (t[:, start:stop] for t in (q, k, v, gate))
        before = {
            name: None if t is None else t[index : index + 1]
            for name, t in (("initial_state", initial_state), ("q_inputs", q_inputs), ("k_inputs", k_inputs))
        }
        keep = None if mask is None else mask[:, start:stop]
        results.append(linear_attention_mixer(*tokens, map_weight, mask=keep, **before, **options))  # type: ignore[arg-type]
    outputs, states, q_after, k_after = zip(*results, strict=True)
    q_joined = None if q_after[0] is None else torch.cat(q_after)
    k_joined = None if k_after[0] is None else torch.cat(k_after)
    return torch.cat(outputs, dim=1), torch.cat(states), q_joined, k_joined
