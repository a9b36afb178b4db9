"""The chunked form in plain PyTorch: matrix products inside chunks, one state between them.

The default on a CPU and the fallback everywhere; differentiable by autograd. Legend: see ``shapes.py``; also
M chunks of C tokens in a segment.

How it works. With b_t the sum of log-decays from a chunk's start to token t, the weight of token j for query
i of the same chunk is ``sum_f q_if k_jf exp(b_if - b_jf)``. It is computed as one matrix product of
``q exp(b - r)`` and ``k exp(r - b)``, with the reference point ``r`` in the middle of the chunk's range of
b, so that both exponents stay within half that range. A chunk may decay by at most ``exp(-80)`` in all, which
bounds the factors by ``exp(40)``: far from what a float32 holds (``exp(88)``) also for large values,
gradients and their sums, and far from the denormal numbers, which processors are slow at. Where log-decays
are stronger than that allows, a slower form (``_pairwise``) sums the exponents pair by pair and cannot
overflow: exact for any ``log_decay <= 0``.

State heads that share values and decays are taken one after the other, and so are the query heads of a state
head. So values and factors of decay are made once a group and never copied, and what one head needs stays in
a core's cache: on a CPU new memory costs more than the arithmetic on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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
# Longer inputs are taken in segments: what so many tokens need for a head a group fits in a core's cache.
SEGMENT_TOKENS = 512
# Elsewhere an operation takes longer to start than to run: longer segments, of so many rows a head.
_ROWS_OF_SEGMENT = 2**16


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
        v: Values [B, T, G, D]; state head n takes in those of head ``n // (N / G)``.
        log_decay: Natural logarithm of the decay, at most 0: [B, T, G, F], or [B, T, G, 1] for one a head.
        initial_state: State before the first token [B, N, F, D + 1]; zeros when None.
        normalize: Divide by the decayed sum of weights, else return the plain sum.
        eps: Added to that sum before dividing, above 0.
        min_log_decay: A bound below which no log_decay lies, if the caller knows one. Where it lets the fast
            form run, log_decay is not looked at; else its extremes are, which on a GPU waits for the device.

    Returns:
        ``o`` [B, T, H, D] in v's dtype, and the state [B, N, F, D + 1] in float32 (float64 when an input is).

    Raises:
        ValueError: when shapes or devices do not fit together, or, without a bound, a log_decay is above 0.

    Source: equations 5 and 6 of LAWCAT (arXiv 2509.18467); the chunked form of linear attention with decay is
        that of GLA (arXiv 2312.06635), here with the normaliser as one more column of the state.
    """
    check_attention_inputs(q, k, v, log_decay, initial_state, eps)
    dtype = state_dtype(q, k, v, log_decay, initial_state)
    if min_log_decay is None and log_decay.numel():
        min_log_decay, highest = (bound.item() for bound in torch.aminmax(log_decay.detach()))
        check_log_decay(highest)
    batch, tokens, num_query_heads, feature_dim = q.shape
    groups, value_dim = v.shape[2:]
    shape = AttentionShape(batch, tokens, num_query_heads, feature_dim, k.shape[2], groups, value_dim)
    recurrence = ChunkedRecurrence(shape, v, initial_state, dtype, normalize, eps, min_log_decay)
    if not shape.is_empty:
        with without_autocast(v):
            length = shape.segment_tokens(q.device)
            parts = (torch.split(t, length, dim=1) for t in (q, k, v, log_decay))
            for q_part, k_part, v_part, decay_part in zip(*parts, strict=True):
                recurrence.begin(v_part, decay_part)
                by_state_head = zip(shape.by_head(k_part), shape.by_head(q_part), strict=True)
                for (keys,), queries in by_state_head:
                    recurrence.take_in(keys.permute(2, 0, 1, 3))
                    for query in queries:
                        recurrence.read(query.permute(2, 0, 1, 3))
    return recurrence.result()


class AttentionShape(NamedTuple):
    """Sizes, as in the legend; P = N / G state heads share a head of v and the decay.

    Attributes:
        batch: B.
        tokens: T.
        num_query_heads: H.
        feature_dim: F.
        num_state_heads: N.
        groups: G.
        value_dim: D.
    """

    batch: int
    tokens: int
    num_query_heads: int
    feature_dim: int
    num_state_heads: int
    groups: int
    value_dim: int

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return 0 in self

    def segment_tokens(self, device: torch.device) -> int:
        """Return how many tokens are taken at a time."""
        # A compiler may hold a symbol for the batch.
        if device.type == "cpu" or torch.compiler.is_compiling():
            return SEGMENT_TOKENS
        segments = _ROWS_OF_SEGMENT // (self.batch * self.groups * SEGMENT_TOKENS)
        return SEGMENT_TOKENS * max(segments, 1)

    def by_head(self, t: Tensor) -> list[tuple[Tensor, ...]]:
        """Return t [B, T, heads, W] as views [B, T, G, W]: for each of P state heads, those of its heads."""
        copies = self.num_state_heads // self.groups
        by_state_head = t.reshape(*t.shape[:2], self.groups, copies, -1, t.shape[3]).unbind(3)
        return [of_state_head.unbind(3) for of_state_head in by_state_head]


class ChunkedRecurrence:
    """Outputs and states of a sequence that comes segment by segment, and of each head by head.

    Of each segment: ``begin``, then for each of the P state heads of a group ``take_in`` and, for each of its
    R query heads, ``read``.

    Args:
        shape: Of the whole.
        v: Values, for their device and dtype.
        initial_state: [B, N, F, D + 1]; zeros when None.
        dtype: Of all arithmetic.
        normalize: As in ``gated_linear_attention_chunked``.
        eps: As there.
        min_log_decay: As there.
    """

    def __init__(
        self,
        shape: AttentionShape,
        v: Tensor,
        initial_state: Tensor | None,
        dtype: torch.dtype,
        normalize: bool,
        eps: float,
        min_log_decay: float | None,
    ) -> None:
        self.shape, self.dtype, self.output_dtype = shape, dtype, v.dtype
        self.normalize, self.eps, self.min_log_decay = normalize, eps, min_log_decay
        if initial_state is None:
            size = (shape.batch, shape.num_state_heads, shape.feature_dim, shape.value_dim + 1)
            initial_state = v.new_zeros(size, dtype=dtype)
        self._initial_state = initial_state.to(dtype)
        self._states: list[Tensor] = []  # of each of P state heads [G, B, F, D+1]
        if not shape.is_empty:
            state = self._initial_state
            by_group = state.view(shape.batch, shape.groups, -1, *state.shape[2:])
            self._states = list(by_group.transpose(0, 1).unbind(2))
        # Outputs are written to their place where no gradient needs them: new memory costs a CPU most.
        self._output: Tensor | None = None
        if not _needs_new_tensors():
            size = (shape.batch, shape.tokens, shape.groups, shape.num_query_heads // shape.groups)
            self._output = v.new_empty(*size, shape.value_dim)
        self._segments: list[list[Tensor]] = []  # else by head [B, T, G, D]
        self._tokens = range(0)

    def begin(self, v: Tensor, log_decay: Tensor, keep: Tensor | None = None) -> None:
        """Start with the next T tokens.

        Args:
            v: [B, T, G, D].
            log_decay: [B, T, G, F or 1].
            keep: [B, T], 0 for keys that are not taken in; None where all are.
        """
        self._tokens = range(self._tokens.stop, self._tokens.stop + v.shape[1])
        v, log_decay = (t.permute(2, 0, 1, 3).to(self.dtype) for t in (v, log_decay))  # [G, B, T, .]
        if keep is not None:
            keep = keep.to(self.dtype)[None, :, :, None]
        self._chunks = _chunks(v, log_decay, keep, self.min_log_decay)
        self._num_taken_in = self._num_read = 0
        self._segments.append([])

    def take_in(self, keys: Tensor) -> None:
        """Bring the next state head of each group up to date by its key features [G, B, T, F]."""
        index = self._num_taken_in
        self._read, self._states[index] = self._chunks.take_in(keys, self._states[index])
        self._num_taken_in += 1

    def read(self, queries: Tensor) -> None:
        """Note the output of the next query head of that state head, by its features [G, B, T, F]."""
        sums = self._read(queries)  # [M, G, B, C, D+1]
        output = sums[..., :-1]
        if self.normalize:
            output = output / (sums[..., -1:] + self.eps)
        output = output.permute(2, 0, 3, 1, 4)  # [B, M, C, G, D]
        length = len(self._tokens)
        if self._output is None:
            self._segments[-1].append(output.to(self.output_dtype).flatten(1, 2)[:, :length])
            return
        place = self._output[:, self._tokens.start : self._tokens.stop, :, self._num_read]
        if output.shape[1] * output.shape[2] == length:
            place.view(output.shape).copy_(output)
        else:
            place.copy_(output.flatten(1, 2)[:, :length])
        self._num_read += 1

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the output [B, T, H, D] in v's dtype, and the state [B, N, F, D + 1]."""
        if self.shape.is_empty:
            return self._initial_state.new_zeros(
                *self.shape[:3], self.shape.value_dim, dtype=self.output_dtype
            ), self._initial_state
        state = torch.stack([state.transpose(0, 1) for state in self._states], dim=2).flatten(1, 2)
        if self._output is not None:
            return self._output.flatten(2, 3), state
        outputs = [torch.stack(heads, dim=3).flatten(2, 3) for heads in self._segments]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state


def _needs_new_tensors() -> bool:
    """Return whether results may not be written over others: for autograd's sake, or a compiler's."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


# Takes features of queries [G, B, T, F] and returns the sums [M, G, B, C, D + 1].
Read = Callable[[Tensor], Tensor]


def _chunks(
    v: Tensor, log_decay: Tensor, keep: Tensor | None, min_log_decay: float | None
) -> _Factored | _Pairwise:
    """Cut a segment into the longest chunks that its decays allow.

    Args:
        v: [G, B, T, D].
        log_decay: [G, B, T, F or 1].
        keep: [1, B, T, 1], 0 for keys that are not taken in.
        min_log_decay: As in the public function.
    """
    tokens = v.shape[2]
    size = _factored_chunk(-torch.inf if min_log_decay is None else min_log_decay, tokens)
    # A compiled graph cannot depend on the data: with a bound that is too low for factors it takes pairs.
    if size is None and not (torch.compiler.is_compiling() or v.is_meta):
        size = _factored_chunk(log_decay.detach().min().item(), tokens)
    if size is not None:
        return _Factored(v, torch.cumsum(_by_chunk(log_decay, size), dim=-2), keep)
    log_decay = _by_chunk(log_decay.clamp(min=_LOG_OF_ZERO[v.dtype]), min(_PAIRWISE_CHUNK_TOKENS, tokens))
    return _Pairwise(v, log_decay, keep)


def _factored_chunk(lowest: float, tokens: int) -> int | None:
    """Return the tokens of a chunk whose log-decays are ``lowest`` or above, None where none holds them."""
    for chunk in _FACTORED_CHUNK_TOKENS:
        size = min(chunk, tokens)
        if -lowest * size <= _MAX_CHUNK_DECAY:
            return size
    return None


def _by_chunk(t: Tensor, size: int) -> Tensor:
    """Return t [G, B, T, W] as chunks [M, G, B, C, W], filled up with zeros.

    As keys they add nothing, and as log-decays they keep the state. Chunks come first, so what is made
    of one chunk for all heads lies together.
    """
    if padding := -t.shape[2] % size:
        t = F.pad(t, (0, 0, 0, padding))
    groups, batch, _, width = t.shape
    return t.reshape(groups, batch, -1, size, width).permute(2, 0, 1, 3, 4)


def _values(v: Tensor, size: int) -> Tensor:
    """Return v [G, B, T, D] by chunk with its column of ones [M * G * B, C, D + 1]."""
    v = _by_chunk(v, size)
    return torch.cat([v, v.new_ones(()).expand(*v.shape[:-1], 1)], dim=-1).flatten(0, 2)


def _carry(keys: Tensor, values: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states before each chunk [M * G * B, F, D + 1], and the last.

    Args:
        keys: Decayed to the chunk's end [M * G * B, C, F].
        values: [M * G * B, C, D + 1].
        decay: Over each chunk [M, G, B, F or 1, 1].
        state: Before the first [G, B, F, D + 1].
    """
    keys = keys.transpose(1, 2)
    if _needs_new_tensors():
        before = []
        # unbind, not indexing: the gradient of each index would be zeros of the size of all chunks.
        updates = torch.bmm(keys, values).view(-1, *state.shape).unbind()
        for update, chunk_decay in zip(updates, decay.unbind(), strict=True):
            before.append(state)
            state = torch.addcmul(update, state, chunk_decay)
        return torch.stack(before).flatten(0, 2), state
    states = state.new_empty(len(decay) + 1, *state.shape)
    states[0] = state
    torch.bmm(keys, values, out=states[1:].flatten(0, 2))
    for earlier, later, chunk_decay in zip(states[:-1], states[1:], decay, strict=True):
        later.addcmul_(earlier, chunk_decay)
    return states[:-1].flatten(0, 2), states[-1]


class _Factored:
    """Chunks whose weights are one matrix product of factors around the middle of the decay.

    Args:
        v: [G, B, T, D].
        total: Log-decays summed from a chunk's start [M, G, B, C, F or 1].
        keep: [1, B, T, 1], 0 for keys that are not taken in.
    """

    def __init__(self, v: Tensor, total: Tensor, keep: Tensor | None) -> None:
        self.size = total.shape[3]
        self.values = _values(v, self.size)
        end = total[..., -1:, :]
        # The weights are the same for any reference point: what reaches it of the gradient is rounding noise.
        reference = end.detach() / 2
        self.growth = torch.exp(total - reference)
        self.shrink = self.growth.reciprocal()
        if keep is not None:
            self.shrink = self.shrink * _by_chunk(keep, self.size)
        self.to_reference, self.to_end = (
            torch.exp(reference),
            torch.exp(end - reference),
        )  # [M, G, B, 1, F or 1]
        self.decay = (self.to_reference * self.to_end).transpose(-1, -2)

    def take_in(self, keys: Tensor, state: Tensor) -> tuple[Read, Tensor]:
        """Return what reads keys [G, B, T, F] and the state [G, B, F, D + 1], and the state after them."""
        # The order of the operands matters: a product is laid out as the first is, so nothing is copied.
        k = self.shrink * _by_chunk(keys, self.size)
        values = self.values
        states, state = _carry((k * self.to_end).flatten(0, 2), values, self.decay, state)

        def read(queries: Tensor) -> Tensor:
            q = self.growth * _by_chunk(queries, self.size)
            # Not a product with a 0/1 mask: weights of later tokens may be infinite, and 0 * inf is NaN.
            weights = torch.bmm(q.flatten(0, 2), k.flatten(0, 2).transpose(1, 2)).tril_()
            sums = torch.bmm((q * self.to_reference).flatten(0, 2), states).baddbmm_(weights, values)
            return sums.view(*q.shape[:-1], -1)

        return read, state


class _Pairwise:
    """The same from exponents of pairs, none above 0: for decays that the factors cannot hold.

    Args:
        v: [G, B, T, D].
        log_decay: [M, G, B, C, F or 1], finite.
        keep: [1, B, T, 1], 0 for keys that are not taken in.
    """

    def __init__(self, v: Tensor, log_decay: Tensor, keep: Tensor | None) -> None:
        self.size = size = log_decay.shape[3]
        self.values = _values(v, size)
        self.keep = None if keep is None else _by_chunk(keep, size)
        # Sums over the tokens after j up to i, each computed by itself: differences of one running sum would
        # lose the small decays beside the large.
        later = torch.ones(size, size, dtype=torch.bool, device=v.device).tril(-1)  # [t, j]: t after j
        spread = torch.where(later[..., None], log_decay[..., :, None, :], 0.0)  # [M, G, B, t, j, F]
        between = torch.cumsum(spread, dim=-3)  # [M, G, B, i, j, F]
        self.reach = torch.where(later.T.logical_not()[..., None], between.exp(), 0.0)  # i at or after j
        self.from_start = torch.cumsum(log_decay, dim=-2).exp()  # [M, G, B, C, F]
        self.to_end = between[..., -1, :, :].exp()

    def take_in(self, keys: Tensor, state: Tensor) -> tuple[Read, Tensor]:
        """Return what reads keys [G, B, T, F] and the state [G, B, F, D + 1], and the state after them."""
        k = _by_chunk(keys.to(self.values.dtype), self.size)
        if self.keep is not None:
            k = k * self.keep
        decay = self.from_start[..., -1, :, None]
        states, state = _carry((k * self.to_end).flatten(0, 2), self.values, decay, state)

        def read(queries: Tensor) -> Tensor:
            q = _by_chunk(queries.to(self.values.dtype), self.size)
            reach = self.reach.expand(*self.reach.shape[:-1], q.shape[-1])
            weights = torch.einsum("mgbif,mgbijf,mgbjf->mgbij", q, reach, k).flatten(0, 2)
            sums = weights @ self.values + (q * self.from_start).flatten(0, 2) @ states
            return sums.view(*q.shape[:-1], -1)

        return read, state
