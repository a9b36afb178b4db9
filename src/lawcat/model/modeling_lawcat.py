"""The transformers model: the Llama family's decoder with lawcat's attention in each layer.

Everything but the attention is transformers' own (norm, MLP, rotary embedding), so that a teacher's weights
keep their names and a layer left as softmax computes what the teacher computes, bit for bit.
"""

# mypy is told to leave transformers out.
# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..ops.backend import choose_backend
from .attention import LawcatAttention
from .cache import LawcatCache
from .causal_mask import causal_mask
from .configuration_lawcat import FULL, LINEAR, LawcatConfig
from .convolution import CausalConvolution
from .feature_map import FeatureMap
from .gate import DecayGate
from .window import SlidingWindow

# The parameters that lawcat adds to a teacher, by the attention module's attribute.
NEW_MODULES = ("q_conv", "k_conv", "feature_map", "q_feature_map", "k_feature_map", "decay_gate", "window")


class LawcatDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each with its norm before and its residual after."""

    def __init__(self, config: LawcatConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LawcatAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the layer's output [B, T, hidden]."""
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            **kwargs,
        )
        return self.add_mlp(hidden_states + attended)

    def add_mlp(self, hidden_states: Tensor) -> Tensor:
        """Return the residual stream [B, T, hidden] after the MLP; distillation, too, goes on from here."""
        added: Tensor = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + added


class LawcatPreTrainedModel(PreTrainedModel):
    """What the model classes share: loading, initialisation, and what transformers may do with them."""

    config: LawcatConfig
    config_class = LawcatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LawcatDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    # The state cannot be taken back to an earlier token, which assisted generation would need.
    _is_stateful = True
    _can_record_outputs = {"hidden_states": LawcatDecoderLayer, "attentions": LawcatAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers' init functions leave alone what was loaded from a checkpoint.
        if isinstance(module, (CausalConvolution, FeatureMap)):
            init.copy_(module.weight, module.initial_value())
        elif isinstance(module, DecayGate):
            init.normal_(module.reduce, mean=0.0, std=module.reduce.shape[1] ** -0.5)
            init.zeros_(module.expand)
            init.copy_(module.bias, module.initial_bias())
        elif isinstance(module, SlidingWindow) and module.scale is not None:
            init.copy_(module.scale, module.initial_value())

    def attention_modules(self) -> list[LawcatAttention]:
        """Return the attention of each layer, first layer first."""
        return [layer.self_attn for layer in self.base_model.layers]

    def present_layer_types(self) -> list[str]:
        """Return what each layer computes now: ``config.layer_types``, or all softmax in ``teacher_mode``."""
        return [module.kind for module in self.attention_modules()]

    def new_cache(self) -> LawcatCache:
        """Return an empty cache for the layers as they are now."""
        return LawcatCache(self.config, self.present_layer_types())

    def _check_cache(self, cache: Cache) -> None:
        if not isinstance(cache, LawcatCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}, which has no place for the state of linear "
                "attention. Pass model.new_cache(), or none: generate() and use_cache=True make one."
            )
        if cache.layer_types != self.present_layer_types():
            raise ValueError(
                "past_key_values was made for other layers: those of another model, or of this one on the "
                "other side of teacher_mode()."
            )

    @contextlib.contextmanager
    def teacher_mode(self) -> Iterator[None]:
        """Within this context every layer computes the teacher's softmax attention from the present weights.

        With untrained projections that is the teacher itself. A cache made outside does not fit inside.
        """
        with self.softmax_in(range(self.config.num_hidden_layers)):
            yield

    @contextlib.contextmanager
    def softmax_in(self, layers: Iterable[int]) -> Iterator[None]:
        """As ``teacher_mode``, of these layers only, counted from 0."""
        modules = self.attention_modules()
        kinds = self.present_layer_types()
        try:
            for layer in layers:
                modules[layer].kind = FULL
            yield
        finally:
            for module, kind in zip(modules, kinds, strict=True):
                module.kind = kind


class LawcatModel(LawcatPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: LawcatConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [LawcatDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        # Those that this configuration has: transformers takes a name without a module for a mistake.
        self._keep_in_fp32_modules_strict = {
            name for module in self.attention_modules() for name in module.new_modules()
        }
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states [B, T, hidden] and the cache.

        Args:
            input_ids: Tokens [B, T], or give ``inputs_embeds`` [B, T, hidden].
            attention_mask: [B, past + T] or [B, T], 1 for tokens and 0 for (left) padding; or a dict by layer
                type.
            position_ids: [B, T]; used by softmax, in layers of it and in windows, and by ``linear_rope``.
            past_key_values: A ``LawcatCache`` of what came before.
            use_cache: Keep and return a cache.
            kwargs: Handed to the softmax attention function.

        Raises:
            ValueError: when both or neither of ``input_ids`` and ``inputs_embeds`` are given, for a cache of
                another class or of other layers, or for a mask that no linear layer can use.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if past_key_values is not None:
            self._check_cache(past_key_values)
        elif use_cache:
            past_key_values = self.new_cache()
        # transformers looks for packed sequences at positions, which waits for a GPU: only at those given.
        given_positions = position_ids
        if position_ids is None:
            past_tokens = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_tokens
            position_ids = position_ids.unsqueeze(0)
        masks = self._masks(attention_mask, inputs_embeds, given_positions, past_key_values)
        has_softmax = self.config.sliding_window is not None or FULL in masks
        needs_positions = self.config.linear_rope or has_softmax
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids) if needs_positions else None

        hidden_states = inputs_embeds
        for layer, kind in zip(self.layers, self.present_layer_types(), strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[kind],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def _masks(
        self,
        attention_mask: Tensor | dict[str, Tensor] | None,
        inputs_embeds: Tensor,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
    ) -> dict[str, Tensor | None]:
        """Return the mask of each type of layer that this model has."""
        types = set(self.present_layer_types())
        if isinstance(attention_mask, dict):
            if missing := sorted(types - attention_mask.keys()):
                raise ValueError(
                    f"attention_mask has no entry for {missing[0]!r}, which this model has layers of."
                )
            by_token = {kind: attention_mask[kind] for kind in types - {FULL}}
            for mask in by_token.values():
                if mask is not None and mask.ndim != 2:
                    self._check_padding_mask(mask, 0, 0, is_hybrid=False)
            return {kind: attention_mask[kind] for kind in types}
        masks: dict[str, Tensor | None] = dict.fromkeys(types - {FULL}, attention_mask)
        if masks and attention_mask is not None:
            tokens = inputs_embeds.shape[1]
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            self._check_padding_mask(attention_mask, tokens, past + tokens, is_hybrid=FULL in types)
            if LINEAR in masks and self._looks_at_masks(inputs_embeds, past):
                # To look waits for the GPU, so it is done here and not in each layer.
                is_whole = bool((attention_mask[:, -tokens:] != 0).all())
                masks[LINEAR] = None if is_whole else attention_mask
        if FULL in types:
            masks[FULL] = causal_mask(
                self.config, inputs_embeds, attention_mask, past_key_values, position_ids
            )
        return masks

    def _looks_at_masks(self, inputs_embeds: Tensor, past_tokens: int) -> bool:
        """Return whether a mask is better left out where it is all ones.

        On a CPU that saves work; on a GPU kernels decode without one, but to look waits.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.config.sliding_window is not None:
            return False
        # What is traced would leave out any mask, once it has seen ones.
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return False
        device = inputs_embeds.device.type
        if device == "cpu":
            return True
        chosen: str = choose_backend("auto", device)
        return chosen == "triton" and inputs_embeds.shape[1] == 1 and past_tokens > 0

    def _check_padding_mask(
        self, attention_mask: Tensor, tokens: int, all_tokens: int, *, is_hybrid: bool
    ) -> None:
        if attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.ndim} dimensions; linear attention is causal by itself "
                "and takes a padding mask [batch, tokens]."
            )
        width = attention_mask.shape[1]
        if width < tokens or (is_hybrid and width != all_tokens):
            raise ValueError(
                f"attention_mask covers {width} tokens; it must cover all {all_tokens}, those in the cache "
                "included."
            )


class LawcatForCausalLM(LawcatPreTrainedModel, GenerationMixin):
    """A linear-attention language model converted from a pretrained transformer.

    Example:
        >>> import torch
        >>> from lawcat import LawcatConfig, LawcatForCausalLM
        >>> config = LawcatConfig(
        ...     vocab_size=10,
        ...     hidden_size=16,
        ...     intermediate_size=16,
        ...     num_hidden_layers=1,
        ...     num_attention_heads=2,
        ... )
        >>> LawcatForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 10])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012

    def __init__(self, config: LawcatConfig) -> None:
        super().__init__(config)
        self.model = LawcatModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        # Having been told above that it cannot make one, generate() leaves the making of a cache to us.
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if (given := model_kwargs.get("past_key_values")) is not None:
            self._check_cache(given)
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, vocabulary], the loss where labels are given, and the cache.

        Args:
            input_ids: Tokens [B, T], or give ``inputs_embeds`` [B, T, hidden].
            attention_mask: [B, past + T] or [B, T], 1 for tokens and 0 for (left) padding.
            position_ids: [B, T]; used by softmax, in layers of it and in windows, and by ``linear_rope``.
            past_key_values: A ``LawcatCache`` of what came before.
            labels: Tokens [B, T] to predict, -100 where none; shifted here.
            use_cache: Keep and return a cache.
            logits_to_keep: Compute logits for the last so many tokens (0: all), or for these positions.
            kwargs: Handed to the softmax attention function and the loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["NEW_MODULES", "LawcatForCausalLM", "LawcatModel", "LawcatPreTrainedModel"]
