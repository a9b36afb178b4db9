"""The attention of a lawcat model: the teacher's projections, then linear attention or the teacher's softmax.

A window of softmax attention, inside a linear layer or alone, is in ``window.py``.

Legend: B batch, T tokens, H query heads, G kv heads, N state heads (H, or G with ``state_heads="kv"``),
D head width, F feature width, K convolution taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from ..ops.backend import choose_backend, count_call, kernels_or_torch, no_kernel, run_recurrence
from ..ops.fused import linear_attention_mixer
from ..ops.mixer_step import linear_attention_mixer_step
from ..ops.precision import without_autocast
from ..ops.shapes import repeat_heads
from ..ops.step import gated_linear_attention_step
from ..ops.triton import support
from ..ops.window import gated_linear_attention_sums
from .cache import LinearAttentionState, SlidingWindowState
from .configuration_lawcat import FULL, LINEAR, SLIDING, LawcatConfig
from .convolution import CausalConvolution
from .feature_map import FeatureMap
from .gate import DecayGate
from .offload import parameter_of
from .window import Near, SlidingWindow

# What a teacher's attention may have.
_TEACHER_MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}


class LawcatAttention(nn.Module):
    """One layer's attention; ``kind``, a layer type, says which. The model's ``teacher_mode`` switches it.

    Args:
        config: The model's configuration.
        layer_idx: This layer's place, which decides its type by ``config.layer_types``.
    """

    def __init__(self, config: LawcatConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        assert config.feature_dim is not None
        assert config.attention_output_bias is not None
        assert config.layer_types is not None
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.num_state_heads = config.num_state_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout or 0.0
        self.is_causal = True
        self.kind = config.layer_types[layer_idx]

        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden, bias=config.attention_output_bias)
        if config.use_qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.window: SlidingWindow | None = None
        if config.sliding_window is not None and self.kind != FULL:
            self.window = SlidingWindow(config, has_scale=self.is_linear)
        if not self.is_linear:
            return
        if config.use_conv:
            filters = self.head_dim, config.conv_kernel_size, config.conv_init_std
            self.q_conv = CausalConvolution(self.num_heads, *filters)
            self.k_conv = CausalConvolution(self.num_state_heads, *filters)
        if config.feature_map == "tied":
            self.feature_map = FeatureMap(self.num_state_heads, self.head_dim, config.feature_dim)
        else:
            self.q_feature_map = FeatureMap(self.num_heads, self.head_dim, config.feature_dim)
            self.k_feature_map = FeatureMap(self.num_state_heads, self.head_dim, config.feature_dim)
        if config.gate != "none":
            self.decay_gate = DecayGate(
                hidden,
                self.num_kv_heads,
                width=config.feature_dim if config.gate == "channel" else 1,
                rank=config.gate_rank,
                divisor=config.gate_divisor,
                min_log_decay=config.min_log_decay,
                bias_init=config.gate_bias_init,
            )

    def new_modules(self) -> list[str]:
        """Return the names of the modules with parameters that the teacher's attention does not have."""
        names = {name.split(".")[0] for name, _ in self.named_parameters()}
        return sorted(names - _TEACHER_MODULES)

    @property
    def is_linear(self) -> bool:
        """Whether this layer computes linear attention now."""
        return self.kind == LINEAR

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the layer's output [B, T, hidden], and softmax weights where there are any.

        Args:
            hidden_states: [B, T, hidden], normalised.
            position_embeddings: cos and sin of the rotary embedding; used by softmax and by ``linear_rope``.
            attention_mask: Linear and sliding: [B, T], 1 for tokens and 0 for padding. Softmax: as
                transformers makes it.
            past_key_values: The cache, read and updated.
            kwargs: Handed to the softmax attention function.
        """
        q, k, v = self.project(hidden_states)
        weights = None
        state = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        if self.kind == LINEAR:
            output = self.linear_attention(hidden_states, q, k, v, position_embeddings, attention_mask, state)
        elif self.kind == SLIDING:
            output = self.sliding_attention(q, k, v, position_embeddings, attention_mask, state)
        else:
            output, weights = self.softmax_attention(
                q, k, v, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        return self.o_proj(output.flatten(2)), weights

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [B, T, H, D], k and v [B, T, G, D] by the teacher's projections (equation 1) and norms."""
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        q, k, v = q.view(shape), k.view(shape), v.view(shape)
        if self.config.use_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def linear_attention(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        state: LinearAttentionState | None = None,
    ) -> Tensor:
        """Return the output before ``o_proj`` [B, T, H, D]: equations 2 to 6 of the paper, in float32.

        A padded token (mask 0) gives zeros to the convolutions, adds nothing to the state and does not decay
        it.
        """
        config = self.config
        mask = None if mask is None else mask[:, -x.shape[1] :].expand(x.shape[0], -1)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms with float32 weights have widened them
        with without_autocast(x):
            logits = None if config.gate == "none" else self.decay_gate(x)
            if self.window is not None or config.feature_map == "untied":
                return self._composed(q, k, v, logits, position_embeddings, mask, state)
            if state is not None and state.recurrent is not None and x.shape[1] == 1:
                if mask is not None:
                    return self._composed(q, k, v, logits, position_embeddings, mask, state)
                in_place = self._steps_in_place(q, k, v, logits, state)
                return self._step(q, k, v, logits, position_embeddings, state, in_place=in_place)
            if config.linear_rope:
                q, k = self._rotate(q, k, position_embeddings)
            q_taps, k_taps = self._taps()
            output, after, q_inputs, k_inputs = linear_attention_mixer(
                q,  # [B, T, H, D]
                k,  # [B, T, G, D]; (2) k, v and the gate of a head serve N / G state heads
                v,  # [B, T, G, D]
                logits,  # no decay when None
                q_taps=q_taps,  # (3) u_t = sum_i taps[i] q_{t - K + 1 + i}, and the same of k
                k_taps=k_taps,
                map_weight=parameter_of(self.feature_map),  # (4) phi(u) = [softmax(u W) ; softmax(-u W)]
                gate_divisor=config.gate_divisor,  # (5) log a_t = logsigmoid(gate_t) / 16, bounded
                min_log_decay=config.min_log_decay,
                normalize=config.use_normalizer,  # (6) S_t = a_t S_{t-1} + phi(k_t) [v_t, 1]
                eps=config.normalizer_eps,  #         [n_t, z_t] = phi(q_t) S_t;  o_t = n_t / (z_t + eps)
                mask=mask,
                initial_state=None if state is None else state.recurrent,
                q_inputs=None if state is None else state.q_inputs,
                k_inputs=None if state is None else state.k_inputs,
                keep_inputs=state is not None,
            )
            if state is not None:
                state.store(after, q_inputs, k_inputs, num_tokens=x.shape[1])
        return output

    def _composed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        logits: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        state: LinearAttentionState | None,
    ) -> Tensor:
        """The same from its parts, for what the mixer does not do: a window, two maps, a single token."""
        config = self.config
        keep = None if mask is None else mask[:, :, None, None].to(q.dtype)
        if logits is None:
            log_decay = k.new_zeros(*k.shape[:3], 1, dtype=torch.float32)
        else:
            log_decay = self.decay_gate.log_decay(logits)  # (5) [B, T, G, F or 1]
        if keep is not None:
            log_decay = log_decay * keep
        near = None
        if self.window is not None:
            rotated = self._rotate(q, k, position_embeddings)
            near = self.window.read(q, k, v, rotated, mask, state, None if logits is None else log_decay)
            v = near.values  # the state takes in what leaves the window
        if config.linear_rope:
            q, k = self._rotate(q, k, position_embeddings) if near is None else rotated
        if keep is not None:
            q, k = q * keep, k * keep
        q_inputs = k_inputs = None
        if config.use_conv:  # (3)
            q, q_inputs = self.q_conv(q, None if state is None else state.q_inputs)
            k, k_inputs = self.k_conv(k, None if state is None else state.k_inputs)
        k = repeat_heads(k, self.num_state_heads)  # (2) [B, T, N, D]; a convolution has done it
        q, k = self._features(q, k)  # (4) [B, T, H, F], [B, T, N, F]
        if near is not None:
            k = self._leave_window(k, near, state)
        elif keep is not None:
            k = k * keep
        before = None if state is None else state.recurrent
        output, after = self._read_and_update(q, k, v, log_decay, before, near)  # (6)
        if state is not None:
            state.store(after, q_inputs, k_inputs, num_tokens=q.shape[1])
        return output

    def _steps_in_place(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        logits: Tensor | None,
        state: LinearAttentionState,
    ) -> bool:
        """Return whether one token is taken by the kernel, which writes to the state's tensors.

        It has no gradient, and what autograd may still need is not written over.
        """
        if torch.is_grad_enabled():
            return False
        if choose_backend("auto", q.device.type) != "triton":
            return False
        if any(t is not None and t.requires_grad for t in (state.recurrent, state.q_inputs, state.k_inputs)):
            return False
        unsupported = support.unsupported_because(
            q,
            k,
            v,
            q if logits is None else logits,
            feature_dim=2 * self.feature_map.weight.shape[2],
            value_dim=self.head_dim,
        )
        runs: bool = kernels_or_torch("auto", q.device.type, unsupported)
        return runs

    def _step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        logits: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        state: LinearAttentionState,
        *,
        in_place: bool,
    ) -> Tensor:
        """One token without padding: by the kernel, which writes to the state, or in few operations."""
        config = self.config
        if config.linear_rope:
            q, k = self._rotate(q, k, position_embeddings)
        q_taps, k_taps = self._taps()
        options: dict[str, Any] = {
            "gate_divisor": config.gate_divisor,
            "min_log_decay": config.min_log_decay,
            "normalize": config.use_normalizer,
            "eps": config.normalizer_eps,
        }
        weight = parameter_of(self.feature_map)
        count_call("step", "triton" if in_place else "torch")
        if in_place:
            from ..ops.triton.decode_step import decode_step

            state.make_contiguous()
            assert state.recurrent is not None
            inputs = state.q_inputs, state.k_inputs
            output: Tensor = decode_step(
                q, k, v, logits, state.recurrent, *inputs, q_taps, k_taps, weight, **options
            )
            state.count(1)
            return output
        assert state.recurrent is not None
        output, recurrent, q_inputs, k_inputs = linear_attention_mixer_step(
            q, k, v, logits, weight, state.recurrent, q_taps=q_taps, k_taps=k_taps,
            q_inputs=state.q_inputs, k_inputs=state.k_inputs, **options,
        )  # fmt: skip
        state.store(recurrent, q_inputs, k_inputs, num_tokens=1)
        return output

    def _taps(self) -> tuple[Tensor | None, Tensor | None]:
        return (
            (parameter_of(self.q_conv), parameter_of(self.k_conv)) if self.config.use_conv else (None, None)
        )

    def _rotate(
        self, q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        assert position_embeddings is not None
        rotated: tuple[Tensor, Tensor] = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        return rotated

    def _features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.feature_map == "tied":
            return self.feature_map(q), self.feature_map(k)
        return self.q_feature_map(q), self.k_feature_map(k)

    def _leave_window(self, features: Tensor, near: Near, state: LinearAttentionState | None) -> Tensor:
        """Return the features [B, T, N, F] that leave the window as those given come."""
        assert self.window is not None
        if near.enters is not None:
            features = features * near.enters
        leaving = self.window.leave(features, state)
        if near.log_decay is None:
            return leaving
        by_group = leaving.view(*near.log_decay.shape[:3], -1, leaving.shape[3])  # [B, T, G, N / G, F]
        return (by_group * near.log_decay.exp()[:, :, :, None]).view(leaving.shape)

    def _read_and_update(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, near: Near | None
    ) -> tuple[Tensor, Tensor]:
        normalize, eps = self.config.use_normalizer, self.config.normalizer_eps
        if near is not None:
            far, after = gated_linear_attention_sums(
                q, k, v, log_decay, initial_state=state, min_log_decay=self.config.min_log_decay
            )
            output = near.sums.numerator + far.numerator
            if normalize:
                output = output / (near.sums.denominator + far.denominator + eps)
            return output.to(v.dtype), after
        if q.shape[1] == 1 and state is not None:
            is_untied = self.config.feature_map == "untied"
            no_kernel(q.device.type, f"a step with {'untied feature maps' if is_untied else 'padding'}")
            count_call("step", "torch")
            return gated_linear_attention_step(q, k, v, log_decay, state, normalize=normalize, eps=eps)
        return run_recurrence(
            q,
            k,
            v,
            log_decay,
            initial_state=state,
            normalize=normalize,
            eps=eps,
            backend="auto",
            min_log_decay=self.config.min_log_decay,
        )

    def sliding_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        mask: Tensor | None = None,
        state: SlidingWindowState | None = None,
    ) -> Tensor:
        """Return the teacher's softmax attention over window and sinks, before ``o_proj`` [B, T, H, D]."""
        assert self.window is not None
        with without_autocast(q):
            rotated = self._rotate(q, k, position_embeddings)
            sums = self.window.read(q, k, v, rotated, mask, state).sums
            if state is not None:
                state.count(q.shape[1])
            # The largest weight is 1, but for tokens of padding, which see nothing.
            return (sums.numerator / sums.denominator.clamp(min=1.0)).to(v.dtype)

    def softmax_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the teacher's output before ``o_proj`` [B, T, H, D], as its family computes it."""
        assert position_embeddings is not None
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, T, D]
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return output, weights
