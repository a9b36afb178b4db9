"""What is saved loads as the same model, by our classes and by transformers' Auto classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_variants import VARIANTS, model_of, random_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lawcat import LawcatConfig, LawcatForCausalLM, LawcatModel
from small_models import make_config, make_model


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name: str, tmp_path: Path) -> None:
    model = model_of(VARIANTS[name], torch.float32)
    model.save_pretrained(tmp_path)
    tokens = random_tokens(2, 20)
    expected = model(tokens).logits
    for auto in (AutoModelForCausalLM, LawcatForCausalLM):
        loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is LawcatForCausalLM
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert not loaded.training
        assert torch.equal(loaded(tokens).logits, expected)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is LawcatModel
    assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


def test_config_round_trip(tmp_path: Path) -> None:
    for name, fields in VARIANTS.items():
        config = make_config(**fields)
        config.save_pretrained(tmp_path / name)
        loaded = AutoConfig.from_pretrained(tmp_path / name)
        assert type(loaded) is LawcatConfig
        first, second = (
            {key: value for key, value in c.to_dict().items() if key != "_name_or_path"}
            for c in (config, loaded)
        )
        assert first == second
        assert loaded.to_json_string() == config.to_json_string()


def test_the_saved_config_says_what_it_is(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "lawcat"
    assert saved["architectures"] == ["LawcatForCausalLM"]
    assert saved["layer_types"] == ["linear_attention", "linear_attention"]


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert sum(name in ("lm_head.weight", "model.embed_tokens.weight") for name in names) == 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.num_parameters() == model.num_parameters()


def test_untied_weights_are_two(tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@torch.no_grad()
@pytest.mark.parametrize("is_tied", [True, False])
def test_resize_token_embeddings(is_tied: bool, tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=is_tied)
    tokens = random_tokens(2, 9)
    before = model(tokens).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == model.model.embed_tokens.num_embeddings == 70
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    after = model(tokens).logits
    assert after.shape[-1] == 70
    assert torch.equal(after[..., :64], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, after)


@torch.no_grad()
def test_shards(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = random_tokens(1, 9)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def new_modules(model: LawcatForCausalLM) -> dict[str, torch.Tensor]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if "conv" in name or "feature_map" in name or "decay_gate" in name
    }


@pytest.mark.parametrize(
    "fields",
    [{}, {"gate_bias_init": "zeros"}, {"gate": "head"}, {"state_heads": "kv", "feature_dim": 4}],
    ids=str,
)
def test_what_a_checkpoint_lacks_gets_its_initial_value(fields: dict[str, object], tmp_path: Path) -> None:
    """Loading the teacher's tensors alone: the new parameters are as in a new model."""
    make_model(layer_types=["full_attention"] * 2).save_pretrained(tmp_path)
    config = make_config(**fields)
    loaded, report = LawcatForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    expected = new_modules(make_model(noise=0.0, **fields))
    actual = new_modules(loaded)
    assert actual.keys() == expected.keys()
    assert set(report["missing_keys"]) == set(expected)
    for name, parameter in actual.items():
        if name.endswith("reduce"):  # random
            assert 0.5 < parameter.std() * 32**0.5 < 1.5
        else:
            assert torch.equal(parameter, expected[name]), name


def test_what_a_checkpoint_has_is_not_initialised_again(tmp_path: Path) -> None:
    """A module of which one parameter is missing keeps the others."""
    model = make_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    lacking = "model.layers.0.self_attn.decay_gate.bias"
    del tensors[lacking]
    save_file(tensors, path, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    fresh = dict(make_model(noise=0.0).named_parameters())
    for name, parameter in loaded.named_parameters():
        wanted = fresh[name] if name == lacking else dict(model.named_parameters())[name]
        assert torch.equal(parameter, wanted), name
