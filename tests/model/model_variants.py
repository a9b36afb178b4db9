"""Small models of every variant that a configuration field switches, made once."""

from __future__ import annotations

import functools

import torch
from hypothesis import strategies as st
from torch import Tensor

from lawcat import LawcatForCausalLM
from small_models import make_model

LINEAR, SLIDING, FULL = "linear_attention", "sliding_attention", "full_attention"

# One of each; the first is the paper's.
VARIANTS: dict[str, dict[str, object]] = {
    "paper": {"gate_bias_init": "zeros"},
    "spread bias": {"gate_bias_init": "spread"},
    "no convolution": {"use_conv": False},
    "five taps": {"conv_kernel_size": 5},
    "no normaliser": {"use_normalizer": False},
    "gate a head": {"gate": "head"},
    "no gate": {"gate": "none"},
    "state a kv head": {"state_heads": "kv"},
    "state a kv head, no convolution": {"state_heads": "kv", "use_conv": False, "gate": "head"},
    "rope": {"linear_rope": True},
    "narrow map": {"feature_dim": 4},
    "wide map": {"feature_dim": 16},
    "biases": {"attention_bias": True, "attention_output_bias": False},
    "norms of q and k": {"use_qk_norm": True, "head_dim": 16},
    "one kv head": {"num_key_value_heads": 1},
    "no groups": {"num_key_value_heads": 4},
    "strong bound": {"min_log_decay": -5.0, "gate_divisor": 0.1},
    "very strong bound": {"min_log_decay": -50.0, "gate_divisor": 0.02},
    "hybrid": {"layer_types": [LINEAR, FULL]},
    "hybrid, softmax first": {
        "layer_types": [FULL, LINEAR],
        "attention_bias": True,
        "use_qk_norm": True,
        "linear_rope": True,
    },
    "all softmax": {"layer_types": [FULL, FULL]},
    "untied map": {"feature_map": "untied"},
}
WINDOW_VARIANTS: dict[str, dict[str, object]] = {
    "lolcats": {
        "linear_rope": True,
        "feature_map": "untied",
        "use_conv": False,
        "gate": "none",
        "sliding_window": 5,
    },
    "window": {"sliding_window": 5},
    "window of one": {"sliding_window": 1},
    "long window": {"sliding_window": 33, "gate": "head"},
    "sinks in a window": {"sliding_window": 4, "num_sinks": 3},
    "window, state a kv head": {"sliding_window": 5, "state_heads": "kv", "num_sinks": 1},
    "window, no normaliser": {"sliding_window": 5, "use_normalizer": False},
    "window, strong bound": {"sliding_window": 7, "min_log_decay": -5.0, "gate_divisor": 0.1},
    "window, biases": {"sliding_window": 3, "attention_bias": True, "num_key_value_heads": 1},
    "window, norms of q and k": {"sliding_window": 4, "num_sinks": 2, "use_qk_norm": True},
    "sliding": {"layer_types": [SLIDING, SLIDING], "sliding_window": 5},
    "sliding, with sinks": {"layer_types": [SLIDING, SLIDING], "sliding_window": 4, "num_sinks": 3},
    "three kinds": {
        "layer_types": [SLIDING, LINEAR, FULL],
        "num_hidden_layers": 3,
        "sliding_window": 6,
        "num_sinks": 2,
    },
}
VARIANTS |= WINDOW_VARIANTS


def _possible(fields: dict[str, object]) -> dict[str, object]:
    """The same fields, without what needs a window where there is none."""
    if fields["sliding_window"] is None:
        fields["num_sinks"] = 0
        fields["layer_types"] = [LINEAR if kind == SLIDING else kind for kind in fields["layer_types"]]
    return fields


# Any combination of fields.
fields = st.fixed_dictionaries(
    {
        "use_conv": st.booleans(),
        "conv_kernel_size": st.integers(2, 5),
        "use_normalizer": st.booleans(),
        "gate": st.sampled_from(["channel", "head", "none"]),
        "gate_bias_init": st.sampled_from(["zeros", "spread"]),
        "linear_rope": st.booleans(),
        "state_heads": st.sampled_from(["query", "kv"]),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "feature_dim": st.sampled_from([4, 8, 16]),
        "attention_bias": st.booleans(),
        "attention_output_bias": st.sampled_from([None, False]),
        "use_qk_norm": st.booleans(),
        "layer_types": st.lists(st.sampled_from([LINEAR, LINEAR, SLIDING, FULL]), min_size=2, max_size=2),
        "feature_map": st.sampled_from(["tied", "untied"]),
        "sliding_window": st.sampled_from([None, 1, 4, 7, 50]),
        "num_sinks": st.integers(0, 4),
    }
).map(_possible)


@functools.cache
def _kept(items: tuple[tuple[str, object], ...], dtype: torch.dtype) -> LawcatForCausalLM:
    restored = {name: list(value) if isinstance(value, tuple) else value for name, value in items}
    return make_model(dtype=dtype, **restored)


def model_of(fields: dict[str, object], dtype: torch.dtype = torch.float64) -> LawcatForCausalLM:
    """The model of these fields, shared between tests, which must leave it as it is.

    In float64 by default: forms that are equal then differ by 1e-12, and nothing hides behind rounding.
    """
    items = tuple(
        (name, tuple(value) if isinstance(value, list) else value) for name, value in fields.items()
    )
    return _kept(items, dtype)


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(3, 64, shape)


def left_pad(tokens: Tensor, padding: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows with so many pad tokens before each, the mask and the position ids."""
    width = tokens.shape[1] + max(padding)
    padded = torch.zeros(len(padding), width, dtype=torch.long)
    mask = torch.zeros(len(padding), width, dtype=torch.long)
    for row, amount in enumerate(padding):
        padded[row, amount : amount + tokens.shape[1]] = tokens[row]
        mask[row, amount : amount + tokens.shape[1]] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return padded, mask, positions
