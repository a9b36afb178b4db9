"""Models by name, for benchmarks that need no checkpoint: only sizes matter to a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lawcat.errors import ConfigurationError, did_you_mean
from lawcat.model.configuration_lawcat import LawcatConfig

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Family and fields of the teacher's configuration.
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    "llama-3.2-1b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "rope_parameters": _LLAMA3_ROPE,
        },
    ),
    "mistral-7b": (
        "mistral",
        {
            "vocab_size": 32768,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "qwen2.5-0.5b": (
        "qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "qwen3-0.6b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    # Small enough for a test.
    "tiny": (
        "llama",
        {
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        },
    ),
}


def shape_names() -> tuple[str, ...]:
    """Return the names that ``--shape`` takes.

    >>> shape_names()
    ('smollm2-135m', 'llama-3.2-1b', 'mistral-7b', 'qwen2.5-0.5b', 'qwen3-0.6b', 'tiny')
    """
    return tuple(_MODELS)


def teacher_config(name: str) -> Any:
    """Return the transformers configuration of a teacher of this shape.

    Args:
        name: One of ``shape_names()``.

    Raises:
        ConfigurationError: for another name.

    Example:
        >>> teacher_config("llama-3.2-1b").num_hidden_layers
        16
    """
    from transformers import AutoConfig

    if name not in _MODELS:
        raise ConfigurationError(
            f"--shape {name!r} is not known; use one of {', '.join(_MODELS)}."
            + did_you_mean(name, shape_names())
        )
    family, fields = _MODELS[name]
    return AutoConfig.for_model(family, **fields)


@dataclass(frozen=True)
class MixerShape:
    """Heads and widths of one layer's linear attention.

    Attributes:
        name: What it is called in tables.
        num_heads: Query heads H.
        num_kv_heads: Key and value heads G.
        head_dim: Width D of a head.
        feature_dim: Width F of the feature map.
        state_heads: ``"query"`` or ``"kv"``.
        conv_kernel_size: Taps K; None for no convolution.
        gate_divisor: See ``LawcatConfig``.
        min_log_decay: See ``LawcatConfig``.
        eps: Added to the normaliser.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    feature_dim: int
    state_heads: str = "query"
    conv_kernel_size: int | None = 4
    gate_divisor: float = 16.0
    min_log_decay: float = -2.5
    eps: float = 1e-6

    @property
    def num_state_heads(self) -> int:
        """Return the heads N that keep a state."""
        return self.num_heads if self.state_heads == "query" else self.num_kv_heads

    @classmethod
    def of(cls, name: str, config: LawcatConfig) -> MixerShape:
        """Return the shape of a model's linear layers."""
        assert config.num_key_value_heads is not None
        assert config.head_dim is not None
        assert config.feature_dim is not None
        return cls(
            name,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.feature_dim,
            config.state_heads,
            config.conv_kernel_size if config.use_conv else None,
            float(config.gate_divisor),
            float(config.min_log_decay),
            float(config.normalizer_eps),
        )
