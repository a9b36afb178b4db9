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
)

from lawcat import LawcatConfig
from lawcat.convert.families import FAMILIES, family_of, supported_families
from lawcat.errors import TeacherError


def test_the_families_of_the_table() -> None:
    assert family_of(LlamaConfig()) is FAMILIES["llama"]
    assert family_of(MistralConfig(sliding_window=None)) is FAMILIES["mistral"]
    for name, family in FAMILIES.items():
        assert family.model_type == name
        assert name in supported_families()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "family 'gpt2'"),
        (Qwen2Config(), "family 'qwen2'"),
        (GemmaConfig(), "family 'gemma'"),
        (MixtralConfig(), "family 'mixtral'. It is a mixture of experts"),
        (Qwen2MoeConfig(), "family 'qwen2_moe'. It is a mixture of experts"),
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
