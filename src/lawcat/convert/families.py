"""The base families that lawcat understands, one row each.

A row says which fields of the teacher's configuration carry over, what each model of the family has without
a field that says so, and what of the family lawcat does not compute. To add a family whose decoder is Llama's
(norm, gated MLP, rotary embedding, grouped queries), add its row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lawcat.errors import TeacherError

# Fields that mean the same in every family of this table.
_COMMON_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)


@dataclass(frozen=True)
class Family:
    """One base family.

    Attributes:
        model_type: transformers' name of it.
        examples: Models that belong to it, for messages.
        fields: Fields of the teacher's configuration that are taken over under the same name.
        unsupported: Returns what of a configuration lawcat cannot compute and what would work, or None.
        constants: Fields of ``LawcatConfig`` with the value that every model of the family has.
    """

    model_type: str
    examples: str
    fields: tuple[str, ...]
    unsupported: Callable[[Any], str | None]
    constants: Mapping[str, Any] = field(default_factory=dict)


def _nothing(config: Any) -> str | None:
    return None


def _sliding_window(config: Any) -> str | None:
    window = getattr(config, "sliding_window", None)
    if window is None:
        return None
    return (
        f"sliding-window attention (sliding_window={window}). Supported are models with full attention, such "
        "as Mistral-7B v0.2 and later"
    )


def _other_layers(config: Any) -> str | None:
    """As Qwen's configurations say it: a window counts in the layers that ``layer_types`` names."""
    for kind in getattr(config, "layer_types", None) or ():
        if kind == "sliding_attention":
            return (
                f"sliding-window attention (sliding_window={config.sliding_window}, first in layer "
                f"{config.layer_types.index(kind)}). Supported are models with full attention in each "
                "layer (use_sliding_window=false)"
            )
        if kind != "full_attention":
            return f"layers of {kind!r}. Supported are models with full attention in each layer"
    return None


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama", "Llama 2, Llama 3.x, SmolLM2", (*_COMMON_FIELDS, "attention_bias", "mlp_bias"), _nothing
        ),
        Family("mistral", "Mistral-7B v0.2 and later", _COMMON_FIELDS, _sliding_window),
        Family(
            "qwen2",
            "Qwen2, Qwen2.5",
            _COMMON_FIELDS,
            _other_layers,
            {"attention_bias": True, "attention_output_bias": False},
        ),
        Family(
            "qwen3", "Qwen3, dense", (*_COMMON_FIELDS, "attention_bias"), _other_layers, {"use_qk_norm": True}
        ),
    )
}


def supported_families() -> str:
    """Return the table in words, for messages.

    >>> supported_families()
    'llama (Llama 2, Llama 3.x, SmolLM2), mistral (Mistral-7B v0.2 and later), qwen2 (Qwen2, Qwen2.5), \
qwen3 (Qwen3, dense)'
    """
    return ", ".join(f"{family.model_type} ({family.examples})" for family in FAMILIES.values())


def family_of(config: Any) -> Family:
    """Return the row for a teacher's configuration.

    Args:
        config: A transformers configuration.

    Raises:
        TeacherError: when the family, or something in this configuration, is not supported; it is named.
    """
    model_type = getattr(config, "model_type", None)
    family = FAMILIES.get(str(model_type))
    if family is None:
        hint = ""
        if getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
            hint = " It is a mixture of experts, which lawcat cannot convert."
        elif model_type == "lawcat":
            hint = " It is a lawcat student already."
        raise TeacherError(
            f"the teacher is of the family {model_type!r}.{hint} Supported families: {supported_families()}."
        )
    reason = family.unsupported(config)
    if reason is None and getattr(config, "quantization_config", None) is not None:
        settings = config.quantization_config
        method = getattr(settings, "quant_method", None)
        if isinstance(settings, dict):
            method = settings.get("quant_method")
        reason = (
            f"quantized weights ({method or 'of an unknown method'}). Supported are unquantized safetensors, "
            "and GGUF, which is dequantized"
        )
    if reason is not None:
        raise TeacherError(f"the teacher ({model_type}) uses {reason}.")
    return family
