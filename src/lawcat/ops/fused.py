"""The whole mixer, from the projections to W_o, in one call: PyTorch operations, or fused kernels.

Legend: see ``shapes.py``; also G heads of k, v and the gate as the projections give them (G divides N).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backend import choose_backend, count_call, gated_linear_attention, kernels_or_torch
from .convolution import causal_conv1d_of_heads, last_inputs
from .decay import log_decay_of
from .feature_map import hedgehog_feature_map
from .mixer_chunked import linear_attention_mixer_chunked
from .precision import at_one_dtype, without_autocast
from .shapes import check_dtypes, check_eps, check_log_decay_range, check_shapes, repeat_heads
from .triton import support

MixerResult = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def linear_attention_mixer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
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
    keep_inputs: bool = True,
    backend: str = "auto",
) -> MixerResult:
    """Return the output of the mixer, its final state, and the inputs that the convolutions need next.

    Equations 2 to 6: group expansion, causal convolution of q and k, feature map, decay, gated recurrence
    and division by the sum of weights.

    Args:
        q: [B, T, H, D], as projected.
        k: [B, T, G, D].
        v: [B, T, G, D].
        gate: Logits [B, T, G, F or 1], or log-decays with ``gate_is_logit=False``; no decay when None.
        map_weight: [N, D, F / 2]; N is H for a state a query head or G for one a kv head.
        q_taps: Filters of q [H * D, K]; no convolution when None.
        k_taps: Filters of k [N * D, K].
        gate_is_logit: ``log a = max(logsigmoid(gate) / gate_divisor, min_log_decay)``, else ``log a = gate``.
        gate_divisor: See above.
        min_log_decay: See above; log-decays that are given must lie between it and 0.
        initial_state: State before the first token [S, N, F, D + 1], S sequences; zeros when None.
        q_inputs: Inputs of q's convolution before the first token [S, H * D, K - 1]; zeros when None.
        k_inputs: The same of k [S, N * D, K - 1].
        mask: [B, T], 0 for padding, which gives zeros to the convolutions, adds nothing to the state and
            does not decay it.
        boundaries: Of a packed batch (B = 1): where its sequences start, and the end, (0, ..., T).
        normalize: Divide by the decayed sum of weights.
        eps: Added to that sum, above 0.
        keep_inputs: Return the convolutions' last inputs; else None, which saves copying them.
        backend: See ``gated_linear_attention``; ``"triton"`` runs the fused kernels.

    Returns:
        The output [B, T, H, D] in v's dtype, the state [S, N, F, D + 1], and the last K - 1 inputs of the two
        convolutions (None without them, or without ``keep_inputs``).

    Raises:
        BackendError: a ``ValueError``, when the backend does not exist.
        ValueError: when shapes, dtypes or devices do not fit together, or a log-decay that is given is above
            0 or below ``min_log_decay`` (not looked for while a CUDA graph is captured, or compiled).

    Source: section 3 of LAWCAT (arXiv 2509.18467).

    Example:
        >>> import torch
        >>> q, k = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8)
        >>> o, state, _, _ = linear_attention_mixer(q, k, k, torch.zeros(1, 5, 2, 8), torch.rand(4, 8, 4))
        >>> o.shape, state.shape
        (torch.Size([1, 5, 4, 8]), torch.Size([1, 4, 8, 9]))
    """
    has_gate = gate is not None
    if gate is None:
        gate, gate_is_logit = q.new_zeros(*k.shape[:3], 1, dtype=torch.float32), False
    _check(
        q, k, v, gate, map_weight, q_taps, k_taps, initial_state, q_inputs, k_inputs, mask, boundaries, eps
    )
    if has_gate and not gate_is_logit:
        check_log_decay_range(gate, min_log_decay, "gate")
    name = choose_backend(backend, q.device.type)
    runs_kernels = False
    operands = q, k, v
    if name == "triton" and q.numel():
        operands = at_one_dtype(q, k, v)
        unsupported = support.unsupported_because(
            *operands, gate, map_weight, q_taps, k_taps, initial_state,
            feature_dim=2 * map_weight.shape[2], value_dim=v.shape[3],
        )  # fmt: skip
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q_inputs, k_inputs)):
            unsupported = "q_inputs or k_inputs requires a gradient, which the kernels do not give"
        runs_kernels = kernels_or_torch(backend, q.device.type, unsupported)
        name = "triton" if runs_kernels else "torch"
    options: dict[str, Any] = {
        "q_taps": q_taps, "k_taps": k_taps, "gate_is_logit": gate_is_logit, "gate_divisor": gate_divisor,
        "min_log_decay": min_log_decay, "normalize": normalize, "eps": eps,
    }  # fmt: skip
    if boundaries is not None and not runs_kernels:
        return _packed_by_sequence(
            q, k, v, gate, map_weight, boundaries, mask, initial_state, q_inputs, k_inputs,
            **options, keep_inputs=keep_inputs, backend=name,
        )  # fmt: skip
    options |= {"initial_state": initial_state, "q_inputs": q_inputs, "k_inputs": k_inputs, "mask": mask}
    if runs_kernels:
        count_call("mixer", "triton")
        output, state = _run_kernels(*operands, gate, map_weight, boundaries=boundaries, **options)
        output = output.to(v.dtype)
    else:
        with without_autocast(q):
            run = _by_the_definition if name == "reference" else linear_attention_mixer_chunked
            if name != "reference":
                count_call("recurrence", "torch")
            output, state = run(q, k, v, gate, map_weight, **options)
    if q_taps is None or not keep_inputs:
        return output, state, None, None
    kept = q_taps.shape[1] - 1
    q_inputs = last_inputs(q, q.shape[2], kept, q_inputs, mask, boundaries)
    k_inputs = last_inputs(k, map_weight.shape[0], kept, k_inputs, mask, boundaries)
    return output, state, q_inputs, k_inputs


def _by_the_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    map_weight: Tensor,
    *,
    q_taps: Tensor | None,
    k_taps: Tensor | None,
    gate_is_logit: bool,
    gate_divisor: float,
    min_log_decay: float,
    initial_state: Tensor | None,
    q_inputs: Tensor | None,
    k_inputs: Tensor | None,
    mask: Tensor | None,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The equations one after the other, and the recurrence token by token."""
    log_decay = log_decay_of(gate, gate_divisor, min_log_decay) if gate_is_logit else gate
    keep = None
    if mask is not None:
        keep = mask[:, :, None, None].to(q.dtype)
        q, k, log_decay = q * keep, k * keep, log_decay * keep
    k = repeat_heads(k, map_weight.shape[0])
    if q_taps is not None:
        assert k_taps is not None
        q, _ = causal_conv1d_of_heads(q, q_taps, q_inputs)
        k, _ = causal_conv1d_of_heads(k, k_taps, k_inputs)
    q, k = hedgehog_feature_map(q, map_weight), hedgehog_feature_map(k, map_weight)
    if keep is not None:
        k = k * keep
    return gated_linear_attention(
        q, k, v, log_decay,
        initial_state=initial_state, normalize=normalize, eps=eps, backend="reference",
    )  # fmt: skip


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    map_weight: Tensor,
    q_taps: Tensor | None,
    k_taps: Tensor | None,
    initial_state: Tensor | None,
    q_inputs: Tensor | None,
    k_inputs: Tensor | None,
    mask: Tensor | None,
    boundaries: tuple[int, ...] | None,
    eps: float,
) -> None:
    """Raise ``ValueError`` where the arguments do not fit together."""
    if q.ndim != 4 or k.ndim != 4 or map_weight.ndim != 3:
        raise ValueError(
            "q and k must have four dimensions [batch, tokens, heads, width] and map_weight three "
            f"[N, D, F / 2]; got {q.ndim}, {k.ndim} and {map_weight.ndim}."
        )
    batch, tokens, heads, width = q.shape
    kv_heads, (state_heads, _, half) = k.shape[2], map_weight.shape
    if not kv_heads or not state_heads or heads % state_heads or state_heads % kv_heads:
        raise ValueError(
            f"q has {heads} heads, map_weight {state_heads} and k {kv_heads}; each must be a multiple of the "
            "next."
        )
    sequences = batch
    if boundaries is not None:
        sequences = len(boundaries) - 1
        rises = all(a < b for a, b in itertools.pairwise(boundaries))
        if batch != 1 or sequences < 1 or boundaries[0] != 0 or boundaries[-1] != tokens or not rises:
            raise ValueError(
                f"boundaries are {boundaries}; for q {tuple(q.shape)} they must rise from 0 to T, with B = 1."
            )
    taps = None if q_taps is None else q_taps.shape[-1]
    features = 2 * half
    check_shapes(q, {
        "k": (k, (batch, tokens, kv_heads, width)),
        "v": (v, (batch, tokens, kv_heads, None)),
        "gate": (gate, (batch, tokens, kv_heads, 1 if gate.shape[-1] == 1 else features)),
        "map_weight": (map_weight, (state_heads, width, half)),
        "q_taps": (q_taps, (heads * width, taps)),
        "k_taps": (k_taps, (state_heads * width, taps)),
        "initial_state": (initial_state, (sequences, state_heads, features, v.shape[-1] + 1)),
        "q_inputs": (q_inputs, (sequences, heads * width, (taps or 1) - 1)),
        "k_inputs": (k_inputs, (sequences, state_heads * width, (taps or 1) - 1)),
        "mask": (mask, (batch, tokens)),
    })  # fmt: skip
    if (q_taps is None) != (k_taps is None):
        raise ValueError("q_taps and k_taps come together: give both or none.")
    if (q_inputs is None) != (k_inputs is None):
        raise ValueError("q_inputs and k_inputs come together: give both or none.")
    check_dtypes({
        "q": q, "k": k, "v": v, "gate": gate, "map_weight": map_weight, "q_taps": q_taps, "k_taps": k_taps,
        "initial_state": initial_state, "q_inputs": q_inputs, "k_inputs": k_inputs,
    })  # fmt: skip
    check_eps(eps)


def _run_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    map_weight: Tensor,
    *,
    q_taps: Tensor | None,
    k_taps: Tensor | None,
    gate_is_logit: bool,
    gate_divisor: float,
    min_log_decay: float,
    initial_state: Tensor | None,
    q_inputs: Tensor | None,
    k_inputs: Tensor | None,
    mask: Tensor | None,
    boundaries: tuple[int, ...] | None,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    from .triton.function import run
    from .triton.mixer import MixerInputs, MixerOptions

    if q_taps is None:
        q_inputs = k_inputs = None
    inputs = MixerInputs(
        q=q, k=k, v=v, gate=gate, q_taps=q_taps, k_taps=k_taps, map_weight=map_weight,
        initial_state=initial_state, q_before=q_inputs, k_before=k_inputs,
        keep=None if mask is None else mask != 0, boundaries=boundaries, num_state_heads=map_weight.shape[0],
    )  # fmt: skip
    # Floats, since the kernels are compiled anew for integers.
    options = MixerOptions(
        is_logit=gate_is_logit, gate_divisor=float(gate_divisor), min_log_decay=float(min_log_decay),
        normalize=normalize, eps=float(eps),
    )  # fmt: skip
    return run(inputs, options)


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
    mixer: Callable[..., MixerResult] = linear_attention_mixer
    results = []
    for index, (start, stop) in enumerate(itertools.pairwise(boundaries)):
        tokens = (t[:, start:stop] for t in (q, k, v, gate))
        before = {
            name: None if t is None else t[index : index + 1]
            for name, t in (("initial_state", initial_state), ("q_inputs", q_inputs), ("k_inputs", k_inputs))
        }
        keep = None if mask is None else mask[:, start:stop]
        results.append(mixer(*tokens, map_weight, mask=keep, **before, **options))
    outputs, states, q_after, k_after = zip(*results, strict=True)
    q_joined = None if q_after[0] is None else torch.cat(q_after)
    k_joined = None if k_after[0] is None else torch.cat(k_after)
    return torch.cat(outputs, dim=1), torch.cat(states), q_joined, k_joined
