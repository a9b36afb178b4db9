"""`lawcat info`: what a model is, what it keeps in memory, and which backends are here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lawcat.convert.adapter import Adapter, is_adapter
from lawcat.convert.families import family_of
from lawcat.convert.initialize import student_config
from lawcat.convert.teacher import load_teacher_config
from lawcat.evaluation.lengths import format_length
from lawcat.files import human_bytes
from lawcat.model.configuration_lawcat import LINEAR, LawcatConfig
from lawcat.ops.backend import explain

_LENGTHS = (1024, 4096, 16384, 65536, 262144)
# What a cache of the teacher is kept in on a GPU, and what the state is always kept in.
_CACHE_BYTES, _STATE_BYTES = 2, 4


def run_info(model: str, as_json: bool) -> None:
    """See the command's help."""
    found = describe(model)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for key in ("model", "kind", "base", "family", "layers", "heads", "operator", "declared_window_tokens"):
        if found.get(key) is not None:
            print(f"{key.replace('_', ' ')}: {found[key]}")
    print("\nmemory of one sequence:")
    print(f"{'context':>10}  {'KV cache, bfloat16':>20}  {'linear state, float32':>22}")
    for row in found["memory"]:
        cache, state = human_bytes(row["cache_bytes"]), human_bytes(row["state_bytes"])
        print(f"{format_length(row['tokens']):>10}  {cache:>20}  {state:>22}")
    print("\nbackends:")
    for line in found["backends"]:
        print(f"  {line}")


def describe(model: str) -> dict[str, Any]:
    """Return what ``lawcat info`` shows, as plain data."""
    path = Path(model)
    kind, base = "teacher", None
    if is_adapter(path):
        adapter = Adapter.load(path)
        kind, base = "adapter", adapter.base_name
        config = student_config(
            load_teacher_config(base), softmax_layers=adapter.softmax_layers, **adapter.operator
        )
    else:
        loaded = load_teacher_config(model)
        if isinstance(loaded, LawcatConfig):
            kind, config = "student", loaded
        else:
            family_of(loaded)
            config = student_config(loaded)
    assert config.layer_types is not None
    num_linear = config.layer_types.count(LINEAR)
    return {
        "model": model,
        "kind": kind,
        "base": base,
        "family": config.teacher_model_type,
        "layers": f"{num_linear} linear, {len(config.layer_types) - num_linear} softmax"
        if kind != "teacher"
        else f"{len(config.layer_types)} softmax",
        "heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, "
        f"{config.head_dim} wide",
        "operator": None if kind == "teacher" else _operator(config),
        "declared_window_tokens": config.max_position_embeddings,
        "memory": [
            {"tokens": n, "cache_bytes": _cache_bytes(config, n), "state_bytes": state_bytes(config, n)}
            for n in _LENGTHS
        ],
        "backends": explain().splitlines(),
    }


def _operator(config: LawcatConfig) -> str:
    parts = [
        f"gate a {config.gate}" if config.gate != "none" else "no gate",
        f"convolution of {config.conv_kernel_size}" if config.use_conv else "no convolution",
        "normalised" if config.use_normalizer else "not normalised",
        f"{config.feature_dim} features",
        f"state a {config.state_heads} head",
    ]
    return ", ".join([*parts, "rotary embedding"] if config.linear_rope else parts)


def _cache_bytes(config: LawcatConfig, tokens: int, layers: int | None = None) -> int:
    layers = config.num_hidden_layers if layers is None else layers
    assert config.num_key_value_heads
    assert config.head_dim
    return 2 * layers * tokens * config.num_key_value_heads * config.head_dim * _CACHE_BYTES


def state_bytes(config: LawcatConfig, tokens: int) -> int:
    """Return the bytes that one sequence holds: states, convolution inputs, and softmax layers' cache."""
    assert config.layer_types is not None
    assert config.head_dim
    assert config.feature_dim
    linear = config.layer_types.count(LINEAR)
    state = config.num_state_heads * config.feature_dim * (config.head_dim + 1) * _STATE_BYTES
    channels = (config.num_attention_heads + config.num_state_heads) * config.head_dim
    inputs = channels * (config.conv_kernel_size - 1) * _STATE_BYTES if config.use_conv else 0
    return linear * (state + inputs) + _cache_bytes(config, tokens, len(config.layer_types) - linear)
