"""The configuration: defaults that follow from others, and every contradiction refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from lawcat import LawcatConfig
from lawcat.errors import ConfigurationError
from small_models import make_config


def test_defaults_that_follow_from_others() -> None:
    config = LawcatConfig(hidden_size=96, num_attention_heads=6, num_hidden_layers=3)
    assert config.head_dim == config.feature_dim == 16
    assert config.num_key_value_heads == config.num_state_heads == 6
    assert config.layer_types == ["linear_attention"] * 3


def test_the_papers_operator_is_the_default() -> None:
    config = LawcatConfig()
    assert config.use_conv
    assert config.use_normalizer
    assert not config.linear_rope
    assert (config.conv_kernel_size, config.gate, config.gate_rank) == (4, "channel", 16)
    assert (config.gate_divisor, config.state_heads) == (16.0, "query")


def test_the_default_bound_lets_chunks_be_long() -> None:
    """What the slow forms of the operator are for must not be the default."""
    from lawcat.ops import chunked

    chunk = chunked._factored_chunk(LawcatConfig().min_log_decay, 1000)
    assert chunk == chunked._FACTORED_CHUNK_TOKENS[0]


@pytest.mark.parametrize(("state_heads", "expected"), [("query", 4), ("kv", 2)])
def test_state_heads(state_heads: str, expected: int) -> None:
    assert make_config(state_heads=state_heads).num_state_heads == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate": "chanel"}, r"gate='chanel' is not a choice; use one of 'channel', 'head', 'none'\."),
        ({"gate_bias_init": "ones"}, "gate_bias_init='ones' is not a choice; use one of 'zeros', 'spread'"),
        ({"state_heads": "all"}, "state_heads='all' is not a choice"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": None, "hidden_size": 30}, "hidden_size=30 is not a multiple of num_attention_heads=4"),
        ({"layer_types": ["linear_attention"]}, "layer_types has 1 entries for num_hidden_layers=2"),
        (
            {"layer_types": ["linear_attention", "chunked_attention"]},
            "layer_types holds 'chunked_attention'; use 'linear_attention', 'sliding_attention' or 'full_",
        ),
        (
            {"layer_types": ["linear_attention", "sliding_attention"]},
            "layer_types holds 'sliding_attention', which needs sliding_window",
        ),
        ({"sliding_window": 0}, r"sliding_window=0 must be at least 1; .* \(None\)"),
        ({"sliding_window": 4, "num_sinks": -1}, "num_sinks=-1 must be at least 0"),
        ({"num_sinks": 2}, "num_sinks=2 has no effect without a window: set sliding_window"),
        ({"feature_map": "both"}, "feature_map='both' is not a choice; use one of 'tied', 'untied'"),
        ({"sliding_windo": 4}, "Did you mean 'sliding_window'"),
        ({"feature_dim": 5}, "feature_dim=5 must be an even number of at least 2"),
        ({"feature_dim": 0}, "feature_dim=0 must be an even number"),
        ({"feature_dim": 18}, "feature_dim=18 is more than twice head_dim=8"),
        ({"conv_kernel_size": 1}, "conv_kernel_size=1 must be at least 2; .* use_conv=False"),
        ({"conv_init_std": -0.1}, "conv_init_std=-0.1 must be at least 0"),
        ({"gate_rank": 0}, "gate_rank=0 must be at least 1; .* gate='none'"),
        ({"normalizer_eps": 0.0}, "normalizer_eps=0.0 must be above 0"),
        ({"gate_divisor": -1.0}, "gate_divisor=-1.0 must be above 0"),
        ({"min_log_decay": 0.0}, "min_log_decay=0.0 must be below 0"),
        ({"use_cnv": False}, r"use_cnv is not a field of LawcatConfig. Did you mean 'use_conv'\?"),
        ({"normaliser_eps": 1e-4}, "Did you mean 'normalizer_eps'"),
    ],
    ids=str,
)
def test_contradictions(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        make_config(**fields)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    "fields",
    [{"gate_rank": 1.5}, {"use_conv": "yes"}, {"layer_types": "linear_attention"}, {"gate": None}],
    ids=str,
)
def test_types_are_checked(fields: dict[str, object]) -> None:
    (name,) = fields
    with pytest.raises(Exception, match=rf"(?s)'{name}'.*expected"):
        make_config(**fields)


@pytest.mark.parametrize(
    "fields", [{"gate_divisor": 16}, {"min_log_decay": -2}, {"attention_dropout": 0}], ids=str
)
def test_whole_numbers_are_numbers(fields: dict[str, object]) -> None:
    (name,) = fields
    assert getattr(make_config(**fields), name) == fields[name]


def test_a_value_that_is_changed_later_is_checked_when_saved(tmp_path: Path) -> None:
    config = make_config()
    config.gate = "chanel"
    with pytest.raises(Exception, match="gate='chanel' is not a choice"):
        config.save_pretrained(tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    make_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text()) | {"feature_dim": 7}
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigurationError, match="feature_dim=7"):
        LawcatConfig.from_pretrained(tmp_path)


def test_what_transformers_adds_is_kept() -> None:
    assert make_config(some_new_field=3).some_new_field == 3


def test_a_llama_configuration_can_be_taken_over() -> None:
    llama = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    )
    fields = {name: value for name, value in llama.to_dict().items() if name != "model_type"}
    config = LawcatConfig(**fields)
    for name in ("hidden_size", "intermediate_size", "rope_parameters", "head_dim", "vocab_size"):
        assert getattr(config, name) == getattr(llama, name), name
