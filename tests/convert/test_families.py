"""Which teachers are taken, and that every other is refused by name, with what is supported."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from lawcat import LawcatConfig
from lawcat.convert.families import FAMILIES, family_of, supported_families
from lawcat.errors import TeacherError


def test_the_families_of_the_table() -> None:
    assert family_of(LlamaConfig()) is FAMILIES["llama"]
    assert family_of(MistralConfig(sliding_window=None)) is FAMILIES["mistral"]
    assert family_of(Qwen2Config()) is FAMILIES["qwen2"]
    assert family_of(Qwen3Config()) is FAMILIES["qwen3"]
    for name, family in FAMILIES.items():
        assert family.model_type == name
        assert name in supported_families()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "family 'gpt2'"),
        (GemmaConfig(), "family 'gemma'"),
        (MixtralConfig(), "family 'mixtral'. It is a mixture of experts"),
        (Qwen2MoeConfig(), "family 'qwen2_moe'. It is a mixture of experts"),
        (Qwen3MoeConfig(), "family 'qwen3_moe'. It is a mixture of experts"),
        (LawcatConfig(), "family 'lawcat'. It is a lawcat student already"),
        (object(), "family None"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_other_families_are_refused_by_name(config: Any, message: str) -> None:
    with pytest.raises(TeacherError) as caught:
        family_of(config)
    assert message in str(caught.value)
    assert f"Supported families: {supported_families()}." in str(caught.value)


def test_a_sliding_window_is_refused() -> None:
    with pytest.raises(TeacherError, match=r"sliding_window=4096.*Supported are models with full attention"):
        family_of(MistralConfig())


@pytest.mark.parametrize("config_class", [Qwen2Config, Qwen3Config])
def test_a_sliding_window_of_some_layers_is_refused(config_class: Any) -> None:
    """By what layers do: ``sliding_window`` is set in many a model in which none looks at it."""
    layers = {"num_hidden_layers": 4}
    for harmless in (
        {"sliding_window": 32768},
        {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 4},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "layer_types": ["full_attention"] * 4},
    ):
        assert family_of(config_class(**layers, **harmless)).model_type == config_class.model_type
    message = (
        r"\((qwen2|qwen3)\) uses sliding-window attention \(sliding_window=9, first in layer 3\)\. "
        r"Supported are models with full attention in each layer \(use_sliding_window=false\)"
    )
    window = {"use_sliding_window": True, "sliding_window": 9}
    for settings in (
        {**window, "max_window_layers": 3},
        {**window, "layer_types": [*["full_attention"] * 3, "sliding_attention"]},
    ):
        with pytest.raises(TeacherError, match=message):
            family_of(config_class(**layers, **settings))
    kinds = ["full_attention", "linear_attention", "full_attention", "full_attention"]
    with pytest.raises(TeacherError, match="uses layers of 'linear_attention'"):
        family_of(config_class(**layers, layer_types=kinds))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        (type("Settings", (), {"quant_method": "awq"})(), "awq"),
        ({"bits": 4}, "of an unknown method"),
    ],
)
def test_quantized_weights_are_refused(settings: Any, name: str) -> None:
    config = LlamaConfig()
    config.quantization_config = settings
    with pytest.raises(TeacherError, match=rf"quantized weights \({name}\)\. Supported are unquantized"):
        family_of(config)
