"""The window of a layer: softmax over its last tokens and its first, and what becomes of those that leave it.

Legend: see ``attention.py``; also w tokens of the window, S sinks, W values a head of the gate (F or 1).

What is computed is in ``docs/method.md``, "The window". Everything that a later token needs is kept in the
layer's cache as the last w entries of a stream: oldest first, zeros before the first token. They are shifted
and not written over in a ring, since reading them costs as much as copying them, and a tensor that is never
written to can be shared, forked and differentiated through.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ..ops.precision import at_least_float32
from ..ops.window import Sinks, Sums, sliding_sum, sliding_window_sums
from .cache import SlidingWindowState
from .configuration_lawcat import LawcatConfig
from .offload import parameter_of

# Its sigmoid is 0.1, with which LoLCATs starts.
INITIAL_SCALE = -2.1972245773362196


class Near(NamedTuple):
    """What a window gives for T tokens.

    Attributes:
        sums: Over the window's tokens and the sinks.
        values: Those that leave the window as each token comes [B, T, G, D].
        enters: Which of the T tokens enter the state when they leave [B, T, 1, 1], 1 or 0: neither padding
            nor sinks. None where all do.
        log_decay: What decays them on their way through the window [B, T, G, W]; None without a gate.
    """

    sums: Sums
    values: Tensor
    enters: Tensor | None
    log_decay: Tensor | None


class SlidingWindow(nn.Module):
    """Softmax attention over the last w tokens and the S sinks, by the teacher's queries and keys.

    Positions are StreamingLLM's: among the tokens of the window they are relative, as everywhere; of a sink
    a query is never farther than if sinks and window were all there is. Query t meets sink j as position
    ``min(t, S + w - 1)`` meets position j, t and j counted over a row's tokens without its padding.

    Args:
        config: The model's configuration, with ``sliding_window`` set.
        has_scale: Whether the weights are scaled by a learned factor a head, ``sigmoid(scale)``: where they
            share a denominator with those of a state.

    Source: LoLCATs (arXiv 2410.10254) for window and factor; StreamingLLM (arXiv 2309.17453) for sinks.
    """

    def __init__(self, config: LawcatConfig, *, has_scale: bool) -> None:
        super().__init__()
        assert config.sliding_window is not None
        assert config.head_dim is not None
        self.window, self.num_sinks = config.sliding_window, config.num_sinks
        self.scaling = config.head_dim**-0.5
        if self.num_sinks:
            self.rotary_emb = LlamaRotaryEmbedding(config)
        self.scale: nn.Parameter | None = None
        if has_scale:
            self.scale = nn.Parameter(at_least_float32(torch.empty(config.num_attention_heads)))
            self.reset_parameters()

    def initial_value(self) -> Tensor:
        """Return the starting scale [H]."""
        assert self.scale is not None
        return torch.full_like(self.scale, INITIAL_SCALE)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the starting values."""
        if self.scale is not None:
            self.scale.copy_(self.initial_value())

    def read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotated: tuple[Tensor, Tensor],
        mask: Tensor | None,
        state: SlidingWindowState | None,
        log_decay: Tensor | None = None,
    ) -> Near:
        """Return the sums over window and sinks, and what leaves the window; the cache is brought up to date.

        Args:
            q: The teacher's queries [B, T, H, D], without rotary embedding.
            k: Its keys [B, T, G, D].
            v: Its values [B, T, G, D].
            rotated: q and k with rotary embedding.
            mask: [B, past + T] or [B, T], 1 for tokens and 0 for padding; None without padding.
            state: What came before, or None.
            log_decay: Of the gate [B, T, G, W], where there is one and a state that it decays.
        """
        batch, tokens = q.shape[:2]
        is_real = torch.ones(batch, tokens, dtype=torch.bool, device=q.device)
        if mask is not None:
            is_real = mask[:, -tokens:].to(torch.bool).expand(batch, -1)
        enters, sinks = is_real, None
        if self.num_sinks:
            enters, sinks = self._sinks(q * self.scaling, k, v, is_real, state)
        q, k = rotated
        held: tuple[Tensor | None, ...] = (None, None, None)
        if state is not None:
            held = (state.window_keys, state.window_values, state.window_is_visible)
        keys, values, is_visible = (
            after(before, new, self.window) for before, new in zip(held, (k, v, enters), strict=True)
        )
        if state is not None:
            state.window_keys, state.window_values = last(keys, self.window), last(values, self.window)
            state.window_is_visible = last(is_visible, self.window)
        sums = sliding_window_sums(
            q * self.scaling, keys, values, is_visible, window=self.window, sinks=sinks
        )
        if self.scale is not None:
            factor = at_least_float32(parameter_of(self, "scale")).sigmoid()[:, None]
            sums = Sums(sums.numerator * factor, sums.denominator * factor)
        decay = None if log_decay is None else self._decay(log_decay, state)
        enters_state = None
        if mask is not None or sinks is not None:
            enters_state = enters[:, :, None, None].to(sums.numerator.dtype)
        return Near(sums, values[:, :tokens], enters_state, decay)

    def _sinks(
        self, q: Tensor, k: Tensor, v: Tensor, is_real: Tensor, state: SlidingWindowState | None
    ) -> tuple[Tensor, Sinks]:
        """Return which tokens are no sinks [B, T], and the sinks as these queries see them."""
        batch, tokens = is_real.shape
        number = torch.arange(self.num_sinks, device=q.device)
        seen = torch.zeros(batch, 1, dtype=torch.long, device=q.device)
        if state is not None and state.num_real is not None:
            seen = state.num_real[:, None]
        index = seen + is_real.cumsum(1) - 1  # of each token among its row's [B, T]
        # No longer than there are tokens: a "dynamic" rotary embedding looks at the largest position.
        past = 0 if state is None else state.num_tokens
        table = torch.arange(min(self.num_sinks + self.window, past + tokens), device=q.device)
        cos, sin = (t[0] for t in self.rotary_emb(q, table[None]))  # [S + w, D]
        bounded = index.clamp(0, len(table) - 1)
        rotated_q, rotated_k = apply_rotary_pos_emb(q, k, cos[bounded], sin[bounded], unsqueeze_dim=2)
        is_sink = is_real[..., None] & (index[..., None] == number)  # [B, T, S]

        def gathered(new: Tensor, before: Tensor | None) -> Tensor:
            found = torch.einsum("bts,btgd->bsgd", is_sink.to(new.dtype), new)
            return found if before is None else before + found

        keys = gathered(rotated_k, None if state is None else state.sink_keys)
        values = gathered(v, None if state is None else state.sink_values)
        if state is not None:
            state.sink_keys, state.sink_values = keys, values
            state.num_real = (seen + is_real.sum(1, keepdim=True))[:, 0]
        return is_real & ~is_sink.any(-1), Sinks(rotated_q, keys, values, index[..., None] >= number)

    def _decay(self, log_decay: Tensor, state: SlidingWindowState | None) -> Tensor:
        """Return the logarithm of the last w decays' product [B, T, G, W]."""
        decays = after(None if state is None else state.window_log_decay, log_decay, self.window)
        if state is not None:
            state.window_log_decay = last(decays, self.window)
        return sliding_sum(decays, self.window)

    def leave(self, features: Tensor, state: SlidingWindowState | None) -> Tensor:
        """Return the features of the keys that leave the window as each token comes [B, T, N, F].

        Args:
            features: Of the keys that come [B, T, N, F]; 0 for those that never enter the state.
            state: What came before, or None; it is brought up to date.
        """
        held = after(None if state is None else state.window_features, features, self.window)
        if state is not None:
            state.window_features = last(held, self.window)
        return held[:, : features.shape[1]]


def after(before: Tensor | None, new: Tensor, window: int) -> Tensor:
    """Return the ``window`` entries before and the new ones [B, w + T, ...]; zeros where there are none."""
    if before is None:
        before = new.new_zeros(new.shape[0], window, *new.shape[2:])
    return torch.cat([before, new], dim=1)


def last(stream: Tensor, window: int) -> Tensor:
    """Return the last entries of a stream [B, w, ...], in memory of their own."""
    return stream[:, stream.shape[1] - window :].clone()
