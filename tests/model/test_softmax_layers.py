"""A layer left as softmax is transformers' own, bit for bit; ``teacher_mode`` makes every layer one."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from model_variants import VARIANTS, left_pad, model_of, random_tokens
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    masking_utils,
)

from lawcat import LawcatForCausalLM
from lawcat.convert.families import FAMILIES
from lawcat.model.causal_mask import causal_mask
from small_models import make_model

FULL = "full_attention"
TEACHERS: dict[str, dict[str, object]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one kv head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 16},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "head_dim": 16, "rms_norm_eps": 0.01},
    "qwen3, biases": {"family": "qwen3", "attention_bias": True, "tie_word_embeddings": True},
}
CLASSES: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def pair(
    fields: dict[str, object], layer_types: list[str] | None, implementation: str = "sdpa"
) -> tuple[PreTrainedModel, LawcatForCausalLM]:
    """A Llama, or a model of another family, and a lawcat model with its weights."""
    torch.manual_seed(0)
    options = COMMON | fields | {"attn_implementation": implementation}
    family = str(options.pop("family", "llama"))
    config_class, model_class = CLASSES[family]
    llama = model_class(config_class(**options)).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    options = {"tie_word_embeddings": False} | options | dict(FAMILIES[family].constants)
    student = make_model(layer_types=layer_types, **options)
    missing, unexpected = student.load_state_dict(llama.state_dict(), strict=False)
    assert unexpected == []
    assert all(".self_attn." in name for name in missing)
    return llama, student


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TEACHERS)
def test_all_softmax_is_llama(name: str, implementation: str) -> None:
    llama, student = pair(TEACHERS[name], [FULL, FULL], implementation)
    tokens = random_tokens(2, 40)
    assert torch.equal(student(tokens).logits, llama(tokens).logits)

    padded, mask, positions = left_pad(random_tokens(2, 10), [0, 4])
    arguments = {"attention_mask": mask, "position_ids": positions}
    assert torch.equal(student(padded, **arguments).logits, llama(padded, **arguments).logits)

    first, second = tokens[:, :9], tokens[:, 9:12]
    caches = [model(first, use_cache=True).past_key_values for model in (student, llama)]
    logits = [
        model(second, past_key_values=cache).logits
        for model, cache in zip((student, llama), caches, strict=True)
    ]
    assert torch.equal(*logits)

    arguments = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(student.generate(padded, **arguments), llama.generate(padded, **arguments))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_its_gradients_are_llamas(name: str) -> None:
    llama, student = pair(TEACHERS[name], [FULL, FULL])
    tokens = random_tokens(2, 12)
    for model in (llama, student):
        model.train()
        model(tokens, labels=tokens).loss.backward()
    gradients = {name: parameter.grad for name, parameter in llama.named_parameters()}
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


@torch.no_grad()
@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("layer_types", [None, ["linear_attention", FULL]], ids=["linear", "hybrid"])
def test_teacher_mode_is_llama(layer_types: list[str] | None, name: str) -> None:
    llama, student = pair(TEACHERS[name], layer_types)
    tokens = random_tokens(2, 40)
    expected = llama(tokens).logits
    with student.teacher_mode():
        assert torch.equal(student(tokens).logits, expected)
        padded, mask, positions = left_pad(tokens[:, :10], [0, 4])
        arguments = {"attention_mask": mask, "position_ids": positions}
        assert torch.equal(student(padded, **arguments).logits, llama(padded, **arguments).logits)
    assert not torch.equal(student(tokens).logits, expected)


def test_the_teacher_generates() -> None:
    llama, student = pair({}, None)
    padded, mask, _ = left_pad(random_tokens(2, 10), [0, 4])
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    with student.teacher_mode():
        assert torch.equal(student.generate(padded, **arguments), llama.generate(padded, **arguments))


@torch.no_grad()
def test_teacher_mode_ends() -> None:
    model = model_of(VARIANTS["hybrid"])
    tokens = random_tokens(1, 9)
    expected = model(tokens).logits
    types = model.present_layer_types()
    with contextlib.suppress(RuntimeError), model.teacher_mode(), model.model.teacher_mode():
        assert model.present_layer_types() == [FULL, FULL]
        raise RuntimeError
    assert model.present_layer_types() == types == model.config.layer_types
    assert torch.equal(model(tokens).logits, expected)
    with model.teacher_mode():
        with model.teacher_mode():
            pass
        assert model.present_layer_types() == [FULL, FULL]
    assert model.present_layer_types() == types


@torch.no_grad()
def test_a_cache_does_not_cross_the_border_of_teacher_mode() -> None:
    model = model_of(VARIANTS["paper"])
    tokens = random_tokens(1, 5)
    outside = model(tokens, use_cache=True).past_key_values
    message = "made for other layers: .* teacher_mode"
    with model.teacher_mode():
        inside = model(tokens, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=message):
            model(tokens, past_key_values=outside)
    with pytest.raises(ValueError, match=message):
        model(tokens, past_key_values=inside)


@torch.no_grad()
def test_teacher_mode_takes_any_mask_that_llama_takes() -> None:
    llama, student = pair({}, None)
    tokens = random_tokens(1, 6)
    mask = torch.zeros(1, 1, 6, 6).masked_fill(
        torch.ones(6, 6).triu(1).bool(), torch.finfo(torch.float32).min
    )
    mask[..., 0] = torch.finfo(torch.float32).min
    mask[..., 0, 0] = 0
    with student.teacher_mode():
        assert torch.equal(
            student(tokens, attention_mask=mask).logits, llama(tokens, attention_mask=mask).logits
        )


@pytest.mark.parametrize("name", ["biases", "qwen2", "qwen3, biases"])
def test_the_teachers_names_are_kept(name: str) -> None:
    llama, student = pair(TEACHERS[name], None)
    names, new = set(llama.state_dict()), set(student.state_dict())
    assert names <= new
    assert {name.split(".")[4] for name in new - names} == {"q_conv", "k_conv", "feature_map", "decay_gate"}


def test_softmax_layers_have_no_new_parameters() -> None:
    model = model_of(VARIANTS["hybrid"])
    new = [name for name in model.state_dict() if "conv" in name or "feature_map" in name or "gate." in name]
    assert new
    assert all(name.startswith("model.layers.0.") for name in new)


def test_no_mask_without_padding_even_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.17 makes one then, with which SDPA has no FlashAttention."""
    monkeypatch.setattr(masking_utils, "_ignore_causal_mask_sdpa", lambda *_, **__: False)
    embeddings = torch.zeros(2, 5, 8)
    config = LlamaConfig(attn_implementation="sdpa")
    assert causal_mask(config, embeddings) is None
    assert causal_mask(LlamaConfig(attn_implementation="eager"), embeddings) is not None
    padding = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert causal_mask(config, embeddings, padding) is not None
    packed = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    assert causal_mask(config, embeddings, position_ids=packed) is not None
