"""What `lawcat info` says of a model is what the model does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig, Qwen2Config, Qwen3Config

from lawcat import LawcatForCausalLM
from lawcat.cli.info import describe, run_info, state_bytes
from small_models import make_config

LINEAR, SLIDING, FULL = "linear_attention", "sliding_attention", "full_attention"
FIELDS = [
    {},
    {"use_conv": False, "state_heads": "kv"},
    {"sliding_window": 5, "use_conv": False},
    {"sliding_window": 5, "num_sinks": 2, "gate": "head", "use_conv": False},
    {"sliding_window": 5, "gate": "none", "use_conv": False, "state_heads": "kv"},
    {"layer_types": [SLIDING, FULL], "sliding_window": 6, "num_sinks": 1},
]


@torch.no_grad()
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_the_memory_is_what_the_cache_holds(fields: dict[str, object]) -> None:
    config = make_config(**fields)
    model = LawcatForCausalLM(config).to(torch.bfloat16)
    cache = model(torch.ones(1, 40, dtype=torch.long), use_cache=True).past_key_values
    expected = cache.state_bytes()
    if config.use_conv and LINEAR in config.layer_types:  # counted as if they were in float32, too
        expected += sum(layer.q_inputs.numel() + layer.k_inputs.numel() for layer in cache.layers) * 2
    assert state_bytes(config, 40) == expected


@pytest.mark.parametrize(
    ("config", "family", "heads"),
    [
        (Qwen2Config(num_hidden_layers=2), "qwen2", "32 query, 32 key/value, 128 wide"),
        (
            Qwen3Config(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2),
            "qwen3",
            "4 query, 2 key/value, 128 wide",
        ),
    ],
    ids=["qwen2", "qwen3"],
)
def test_a_teacher_of_qwens(tmp_path: Path, config: PreTrainedConfig, family: str, heads: str) -> None:
    config.save_pretrained(tmp_path)
    found = describe(str(tmp_path))
    assert (found["kind"], found["family"], found["heads"]) == ("teacher", family, heads)
    assert found["layers"] == "2 softmax"


def test_what_is_fetched_is_said_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(source: object, *, progress: Callable[[str], None]) -> PreTrainedConfig:
        progress(f"fetching {source}")
        return Qwen2Config(num_hidden_layers=2)

    monkeypatch.setattr("lawcat.cli.info.load_teacher_config", fetch)
    run_info("some-teacher", as_json=True, shipped=False)
    shown = capsys.readouterr()
    assert shown.err == "fetching some-teacher\n"
    assert json.loads(shown.out)["model"] == "some-teacher"


def test_what_is_said(tmp_path: Path) -> None:
    fields = {
        "layer_types": [SLIDING, LINEAR, FULL],
        "num_hidden_layers": 3,
        "sliding_window": 5,
        "num_sinks": 2,
        "feature_map": "untied",
        "linear_rope": True,
    }
    make_config(**fields).save_pretrained(tmp_path)
    found = describe(str(tmp_path))
    assert found["layers"] == "1 linear, 1 sliding, 1 softmax"
    said = "maps of q and k apart, rotary embedding, softmax window of 5, 2 sinks"
    assert found["operator"].endswith(f"state a query head, {said}")
    make_config().save_pretrained(tmp_path)
    found = describe(str(tmp_path))
    assert found["layers"] == "2 linear, 0 softmax"
    assert found["operator"].endswith("state a query head")
