"""The mask of softmax layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask


def causal_mask(
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    position_ids: Tensor | None = None,
) -> Tensor | None:
    """Return transformers' causal mask, or None where SDPA is causal by itself.

    transformers leaves it out there too, but (5.17) not while a CUDA graph is captured, as training is,
    and with a mask SDPA has no FlashAttention.

    Args:
        config: Of the model.
        inputs_embeds: [B, T, hidden_size].
        attention_mask: [B, T] of tokens, 0 for padding.
        past_key_values: What comes before.
        position_ids: [B, T], where the caller was given them: sequences may be packed.

    Returns:
        What the attention function takes.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig
        >>> causal_mask(LlamaConfig(attn_implementation="sdpa"), torch.zeros(1, 3, 8)) is None
        True
    """
    is_plain = attention_mask is None and past_key_values is None and position_ids is None
    if is_plain and config._attn_implementation == "sdpa":
        return None
    mask: Tensor | None = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
    )
    return mask
