"""The chunked form in plain PyTorch: matrix products inside chunks, one state between them.

The default on a CPU and the fallback everywhere; differentiable by autograd. Legend: see ``shapes.py``; also
M chunks of C tokens in a segment.

How it works. With b_t the sum of log-decays from a chunk's start to token t, the weight of token j for query
i of the same chunk is ``sum_f q_if k_jf exp(b_if - b_jf)``. It is computed as one matrix product of
``q exp(b - r)`` and ``k exp(r - b)``, with the reference point ``r`` in the middle of the chunk's range of
b, so that both exponents stay within half that range. A chunk may decay by at most ``exp(-80)`` in all, which
bounds the factors by ``exp(40)``: far from what a float32 holds (``exp(88)``) also for large values,
gradients and their sums, and far from the denormal numbers, which processors are slow at. Where log-decays
are stronger than that allows, a slower form (``_chunk_pairwise``) sums the exponents pair by pair and cannot
overflow: exact for any ``log_decay <= 0``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import state_dtype, without_autocast
from .shapes import check_attention_inputs, check_log_decay

# The largest total log-decay of a chunk in the factored form, and the chunks it may have, best first.
_MAX_CHUNK_DECAY = 80.0
_FACTORED_CHUNK_TOKENS = (32, 16)
# Pairs of tokens cost F numbers each there, so its chunks are small.
_PAIRWISE_CHUNK_TOKENS = 16
# exp(-104) is 0 in float32 and exp(-746) in float64: a stronger decay is the same decay, and bounding it
# keeps the infinite ones (a reset of the state) out of the sums.
_LOG_OF_ZERO = {torch.float32: -110.0, torch.float64: -750.0}
# Longer inputs are taken in segments: the temporaries of about 1,000 tokens still fit in a core's cache.
_SEGMENT_TOKENS = 1024


def gated_linear_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    min_log_decay: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output and final state of normalised gated linear attention, chunk by chunk.

    Args:
        q: Query features [B, T, H, F]; query head h reads state head ``h // (H / N)``.
        k: Key features [B, T, N, F].
        v: Values [B, T, N, D].
        log_decay: Natural logarithm of the decay, at most 0: [B, T, N, F], or [B, T, N, 1] for one a head.
        initial_state: State before the first token [B, N, F, D + 1]; zeros when None.
        normalize: Divide by the decayed sum of weights, else return the plain sum.
        eps: Added to that sum before dividing, above 0.
        min_log_decay: A bound below which no log_decay lies, if the caller knows one. Where it lets the fast
            form run, log_decay is not looked at; else its extremes are, which on a GPU waits for the device.

    Returns:
        ``o`` [B, T, H, D] in v's dtype, and the state [B, N, F, D + 1] in float32 (float64 when an input is).

    Raises:
        ValueError: when shapes or devices do not fit together, or a log_decay that is looked at is above 0.

    Source: equations 5 and 6 of LAWCAT (arXiv 2509.18467); the chunked form of linear attention with decay is
        that of GLA (arXiv 2312.06635), here with the normaliser as one more column of the state.
    """
    check_attention_inputs(q, k, v, log_decay, initial_state, eps)
    batch, tokens, num_query_heads, feature_dim = q.shape
    num_state_heads, value_dim = v.shape[2:]
    dtype = state_dtype(q, k, v, log_decay, initial_state)
    state = v.new_zeros(batch, num_state_heads, feature_dim, value_dim + 1, dtype=dtype)
    if initial_state is not None:
        state = initial_state.to(dtype)
    if log_decay.numel() == 0:
        return v.new_zeros(batch, tokens, num_query_heads, value_dim), state

    chunk = None if min_log_decay is None else _factored_chunk(min_log_decay, tokens)
    # A compiled graph cannot depend on the data: with a bound that is too low for factors it takes pairs.
    if chunk is None and (min_log_decay is None or not torch.compiler.is_compiling()):
        lowest, highest = (bound.item() for bound in torch.aminmax(log_decay.detach()))
        check_log_decay(highest)
        chunk = _factored_chunk(lowest, tokens)
    if chunk is None:
        log_decay = log_decay.to(dtype).clamp(min=_LOG_OF_ZERO[dtype])

    outputs = []
    with without_autocast(v):
        for start in range(0, tokens, _SEGMENT_TOKENS):
            stop = min(start + _SEGMENT_TOKENS, tokens)
            q_part, k_part, v_part, decay_part = (t[:, start:stop].to(dtype) for t in (q, k, v, log_decay))
            output, state = _segment(q_part, k_part, v_part, decay_part, state, chunk, normalize, eps)
            outputs.append(output.to(v.dtype))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state


def _factored_chunk(lowest: float, tokens: int) -> int | None:
    """Return the tokens of a chunk whose log-decays are ``lowest`` or above, None where none holds them."""
    for chunk in _FACTORED_CHUNK_TOKENS:
        if -lowest * min(chunk, tokens) <= _MAX_CHUNK_DECAY:
            return chunk
    return None


def _segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    factored_chunk: int | None,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """One segment, whose tokens are cut into chunks; shapes as in the public function."""
    batch, tokens, num_query_heads, feature_dim = q.shape
    num_state_heads, value_dim = v.shape[2:]
    group = num_query_heads // num_state_heads
    chunk = min(factored_chunk or _PAIRWISE_CHUNK_TOKENS, tokens)
    num_chunks = -(-tokens // chunk)
    padding = num_chunks * chunk - tokens
    if padding:  # k = 0 adds nothing and log_decay = 0 keeps the state
        q, k, v, log_decay = (
            torch.nn.functional.pad(t, (0, 0, 0, 0, 0, padding)) for t in (q, k, v, log_decay)
        )

    def by_chunk(t: Tensor) -> Tensor:
        return t.reshape(batch, num_chunks, chunk, num_state_heads, t.shape[-1]).permute(0, 3, 1, 2, 4)

    k, log_decay = by_chunk(k), by_chunk(log_decay)  # [B, N, M, C, F]
    ones = v.new_ones(()).expand(*v.shape[:-1], 1)
    values = by_chunk(torch.cat([v, ones], dim=-1)).contiguous()  # [B, N, M, C, D+1]
    q = q.reshape(batch, num_chunks, chunk, num_state_heads, group, feature_dim)
    q = q.permute(0, 3, 1, 4, 2, 5)  # [B, N, M, R, C, F]

    form = _chunk_factored if factored_chunk else _chunk_pairwise
    weights, q_of_state, k_to_state, decay = form(q, k, log_decay)
    updates = k_to_state.transpose(-1, -2) @ values  # [B, N, M, F, D+1]
    # unbind, not indexing: the gradient of each index would be zeros of the size of all chunks.
    states = []  # before each chunk, [B, N, F, D+1]
    for update, chunk_decay in zip(updates.unbind(2), decay[..., None].unbind(2), strict=True):
        states.append(state)
        state = torch.addcmul(update, state, chunk_decay)
    read = weights.flatten(3, 4) @ values  # [B, N, M, R*C, D+1]
    read = read + q_of_state.flatten(3, 4) @ torch.stack(states, dim=2)
    output = read[..., :-1]
    if normalize:
        output = output / (read[..., -1:] + eps)
    output = output.reshape(batch, num_state_heads, num_chunks, group, chunk, value_dim)
    output = output.permute(0, 2, 4, 1, 3, 5).reshape(batch, num_chunks * chunk, num_query_heads, value_dim)
    return output[:, :tokens], state


ChunkForm = tuple[Tensor, Tensor, Tensor, Tensor]


def _chunk_factored(q: Tensor, k: Tensor, log_decay: Tensor) -> ChunkForm:
    """Weights by one matrix product of factors around the middle of the decay.

    Args:
        q: [B, N, M, R, C, F].
        k: [B, N, M, C, F].
        log_decay: [B, N, M, C, F] or [B, N, M, C, 1].

    Returns:
        The lower-triangular weights [B, N, M, R, C, C]; q decayed since the chunk's start, for reading the
        state; k decayed to the chunk's end, for adding to it; and the decay over the chunk [B, N, M, F or 1].
    """
    total = torch.cumsum(log_decay, dim=-2)  # [B, N, M, C, F]
    end = total[..., -1:, :]
    # The weights are the same for any reference point: what reaches it of the gradient is rounding noise.
    reference = end.detach() / 2
    from_reference = total - reference
    q = q * torch.exp(from_reference)[:, :, :, None]  # [B, N, M, R, C, F]
    k = k * torch.exp(-from_reference)
    weights = _lower_triangle((q.flatten(3, 4) @ k.transpose(-1, -2)).reshape(*q.shape[:-1], -1))
    first_half, second_half = torch.exp(reference), torch.exp(end - reference)  # [B, N, M, 1, F]
    return weights, q * first_half[:, :, :, None], k * second_half, (first_half * second_half)[..., 0, :]


def _chunk_pairwise(q: Tensor, k: Tensor, log_decay: Tensor) -> ChunkForm:
    """The same from exponents of pairs, none above 0: for decays that the factors cannot hold."""
    chunk = q.shape[-2]
    # Sums over the tokens after j up to i, each computed by itself: differences of one running sum would lose
    # the small decays beside the large.
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril(-1)  # [t, j]: t after j
    spread = torch.where(later[..., None], log_decay[..., :, None, :], 0.0)  # [B, N, M, t, j, F]
    between = torch.cumsum(spread, dim=-3)  # [B, N, M, i, j, F]
    reach = torch.where(later.T.logical_not()[..., None], between.exp(), 0.0)  # i at or after j
    weights = torch.einsum("bnmrif,bnmijf,bnmjf->bnmrij", q, reach.expand(*reach.shape[:-1], q.shape[-1]), k)
    from_start = torch.cumsum(log_decay, dim=-2).exp()  # [B, N, M, C, F]
    to_end = between[..., -1, :, :].exp()  # [B, N, M, C, F]
    return weights, q * from_start[:, :, :, None], k * to_end, from_start[..., -1, :]


def _lower_triangle(weights: Tensor) -> Tensor:
    """Zero the weights [..., C, C] of later tokens."""
    chunk = weights.shape[-1]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=weights.device).triu(1)
    # Not a product with a 0/1 mask: weights of later tokens may be infinite, and 0 * inf is NaN.
    return weights.masked_fill(later, 0.0)
