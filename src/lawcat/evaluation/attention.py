"""Which implementation of softmax attention a model runs with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch

from lawcat.errors import ConfigurationError, did_you_mean
from lawcat.model.configuration_lawcat import FULL, LINEAR

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AttentionChoice = Literal["auto", "sdpa", "flash_attention_2", "eager"]


def check_attention(choice: str) -> AttentionChoice:
    """Return the choice if it is one.

    Raises:
        ConfigurationError: if it is not.

    Example:
        >>> check_attention("sdpa")
        'sdpa'
    """
    for allowed in get_args(AttentionChoice):
        if choice == allowed:
            return allowed  # type: ignore[no-any-return]
    allowed = list(get_args(AttentionChoice))
    raise ConfigurationError(
        f"attention {choice!r} is not a choice; use {', '.join(allowed)}.{did_you_mean(choice, allowed)}"
    )


def set_attention(model: PreTrainedModel, choice: AttentionChoice = "auto") -> str:
    """Let a model's softmax layers run with an implementation, and return its name.

    Args:
        model: A causal language model, on its device and in its dtype.
        choice: `"auto"` is FlashAttention-2 where the package `flash-attn` is installed and the model is in
            half precision on a GPU, else PyTorch's `scaled_dot_product_attention`.

    Returns:
        As `attention_of`.

    Raises:
        ConfigurationError: for FlashAttention-2 where it cannot run, or an implementation that the model does
            not have.
    """
    problem = _flash_problem(model)
    if choice == "flash_attention_2" and problem:
        raise ConfigurationError(f"flash_attention_2 cannot run: {problem}. Use --attention auto or sdpa.")
    name = choice
    if choice == "auto":
        name = "sdpa" if problem else "flash_attention_2"
    if set(_layer_types(model)) == {LINEAR}:  # has no softmax
        return attention_of(model)
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        if choice != "auto":
            raise ConfigurationError(
                f"{type(model).__name__} cannot run with attention {choice!r}: "
                f"{str(error).splitlines()[0]} Use --attention auto."
            ) from error
    return attention_of(model)


def attention_of(model: PreTrainedModel) -> str:
    """Return the implementation of a model's attention: transformers' name for it, or `"linear"`."""
    types = set(_layer_types(model))
    if types == {LINEAR}:
        return LINEAR.removesuffix("_attention")
    name = str(getattr(model.config.get_text_config(), "_attn_implementation", None) or "the model's own")
    if not types or FULL in types:
        return f"linear, {name}" if LINEAR in types else name
    return ", ".join(sorted(one.removesuffix("_attention") for one in types))


def _flash_problem(model: PreTrainedModel) -> str | None:
    from transformers.utils import is_flash_attn_2_available

    parameter = next(model.parameters())
    if parameter.device.type != "cuda":
        return "it needs a GPU"
    if parameter.dtype not in (torch.float16, torch.bfloat16):
        name = str(parameter.dtype).removeprefix("torch.")
        return f"it needs bfloat16 or float16 weights, and these are {name} (--dtype bfloat16)"
    if not is_flash_attn_2_available():
        return "the package flash-attn is not installed (pip install flash-attn)"
    return None


def _layer_types(model: PreTrainedModel) -> list[str]:
    """Return what the layers of a model of ours compute; nothing for others."""
    return list(model.config.layer_types or ()) if model.config.model_type == "lawcat" else []
