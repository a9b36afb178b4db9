"""What all tests share: one thread (tensors are small), fixed seeds, and a small model of any variant."""

from __future__ import annotations

import os
from collections.abc import Callable

import hypothesis
import pytest
import torch

from lawcat import LawcatConfig, LawcatForCausalLM

torch.set_num_threads(1)
# No test talks to a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The same examples on every run, and no limit on one example's time: a machine may be busy.
hypothesis.settings.register_profile("lawcat", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.load_profile("lawcat")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def _tiny_config(**fields: object) -> LawcatConfig:
    defaults: dict[str, object] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return LawcatConfig(**(defaults | fields))


def _tiny_model(
    *, noise: float = 0.1, dtype: torch.dtype = torch.float32, **fields: object
) -> LawcatForCausalLM:
    torch.manual_seed(0)
    model = LawcatForCausalLM(_tiny_config(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return model.to(dtype)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., LawcatConfig]:
    """A function that makes a small configuration, any field of it given by keyword."""
    return _tiny_config


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., LawcatForCausalLM]:
    """A function that makes a small model in eval mode whose parameters are all moved from where they start.

    ``noise=0.0`` leaves them there; other keywords are configuration fields.
    """
    return _tiny_model
