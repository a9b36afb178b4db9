"""`lawcat info`: what a model is, what it keeps in memory, and which backends are here."""

from __future__ import annotations

import json
from typing import Any

from lawcat.cli.display import Display
from lawcat.convert.adapter import CARD_NAME, Adapter
from lawcat.convert.families import family_of
from lawcat.convert.initialize import student_config
from lawcat.convert.shipped import adapter_folder, shipped_adapters
from lawcat.convert.teacher import Progress, load_teacher_config
from lawcat.errors import ConfigurationError
from lawcat.evaluation.lengths import format_length
from lawcat.files import human_bytes
from lawcat.model.configuration_lawcat import FULL, LINEAR, SLIDING, LawcatConfig
from lawcat.ops.backend import explain
from lawcat.versions import versions

_LENGTHS = (1024, 4096, 16384, 65536, 262144)
# What a cache of the teacher is kept in on a GPU, and what the state is always kept in.
_CACHE_BYTES, _STATE_BYTES = 2, 4


def run_info(model: str | None, as_json: bool, shipped: bool) -> None:
    """See the command's help."""
    if shipped and model is not None:
        raise ConfigurationError(
            "name a model, or give --shipped for the adapters that come with lawcat; not both."
        )
    if model is None:
        (_print_shipped if shipped else _print_machine)(as_json)
        return
    with Display() as display:
        found = describe(model, progress=display.message)
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
    print()
    _print_backends(found["backends"])


def _print_machine(as_json: bool) -> None:
    numbers, lines = versions(), explain().splitlines()
    if as_json:
        print(json.dumps({"versions": numbers, "backends": lines}, indent=2))
        return
    print("versions:", ", ".join(f"{name} {number}" for name, number in numbers.items()))
    print()
    _print_backends(lines)


def _print_backends(lines: list[str]) -> None:
    print("backends:")
    for line in lines:
        print(f"  {line}")


def describe_shipped() -> list[dict[str, Any]]:
    """Return what ``lawcat info --shipped`` shows, as plain data: the adapters that come with lawcat."""
    found = []
    for name, folder in shipped_adapters().items():
        adapter = Adapter.load(folder)
        found.append(
            {
                "name": name,
                "base": adapter.base_name,
                "description": " ".join(str(adapter.recipe.get("description", "")).split()),
                "bytes": sum(file.stat().st_size for file in folder.iterdir()),
                "card": str(folder / CARD_NAME),
            }
        )
    return found


def _print_shipped(as_json: bool) -> None:
    found = describe_shipped()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for one in found:
        print(f"{one['name']}: {human_bytes(one['bytes'])}, base {one['base']}")
        if one["description"]:
            print(f"  {one['description']}")
        print(f"  {one['card']}")
    if not found:
        print("no adapters come with this lawcat")


def describe(model: str, progress: Progress | None = None) -> dict[str, Any]:
    """Return what ``lawcat info`` shows, as plain data; ``progress`` hears of what is fetched."""
    kind, base = "teacher", None
    folder = adapter_folder(model)
    if folder is not None:
        adapter = Adapter.load(folder)
        kind, base = "adapter", adapter.base_name
        config = student_config(
            load_teacher_config(base, progress=progress),
            softmax_layers=adapter.softmax_layers,
            **adapter.operator,
        )
    else:
        loaded = load_teacher_config(model, progress=progress)
        if isinstance(loaded, LawcatConfig):
            kind, config = "student", loaded
        else:
            family_of(loaded)
            config = student_config(loaded)
    assert config.layer_types is not None
    return {
        "model": model,
        "kind": kind,
        "base": base,
        "family": config.teacher_model_type,
        "layers": f"{len(config.layer_types)} softmax" if kind == "teacher" else _layers(config.layer_types),
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


def _layers(layer_types: list[str]) -> str:
    names = {LINEAR: "linear", SLIDING: "sliding", FULL: "softmax"}
    counts = {name: layer_types.count(kind) for kind, name in names.items()}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count or name != "sliding")


def _operator(config: LawcatConfig) -> str:
    parts = [
        f"gate a {config.gate}" if config.gate != "none" else "no gate",
        f"convolution of {config.conv_kernel_size}" if config.use_conv else "no convolution",
        "normalised" if config.use_normalizer else "not normalised",
        f"{config.feature_dim} features",
        f"state a {config.state_heads} head",
    ]
    if config.feature_map == "untied":
        parts.append("maps of q and k apart")
    if config.linear_rope:
        parts.append("rotary embedding")
    if config.sliding_window is not None:
        parts.append(f"softmax window of {config.sliding_window}")
    if config.num_sinks:
        parts.append(f"{config.num_sinks} sinks")
    return ", ".join(parts)


def _cache_bytes(config: LawcatConfig, tokens: int, layers: int | None = None) -> int:
    layers = config.num_hidden_layers if layers is None else layers
    assert config.num_key_value_heads
    assert config.head_dim
    return 2 * layers * tokens * config.num_key_value_heads * config.head_dim * _CACHE_BYTES


def state_bytes(config: LawcatConfig, tokens: int) -> int:
    """Return the bytes that one sequence holds: states, convolution inputs, windows, and softmax layers'
    cache."""
    assert config.layer_types is not None
    assert config.head_dim
    assert config.feature_dim
    linear, sliding, full = (config.layer_types.count(kind) for kind in (LINEAR, SLIDING, FULL))
    state = config.num_state_heads * config.feature_dim * (config.head_dim + 1) * _STATE_BYTES
    channels = (config.num_attention_heads + config.num_state_heads) * config.head_dim
    inputs = channels * (config.conv_kernel_size - 1) * _STATE_BYTES if config.use_conv else 0
    total = linear * (state + inputs) + _cache_bytes(config, tokens, full)
    if config.sliding_window is None:
        return total
    # Keys and values; of each place, whether it is seen; in linear layers also what the state takes in later.
    window = _cache_bytes(config, config.sliding_window + config.num_sinks, 1) + config.sliding_window
    window += 8 if config.num_sinks else 0
    assert config.num_key_value_heads
    gate = {"channel": config.feature_dim, "head": 1, "none": 0}[config.gate] * config.num_key_value_heads
    waiting = config.sliding_window * (config.num_state_heads * config.feature_dim + gate) * _STATE_BYTES
    return total + (linear + sliding) * window + linear * waiting
