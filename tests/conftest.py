"""What all tests share: one thread (tensors are small), fixed seeds, and a small model of any variant."""

from __future__ import annotations

import os
from collections.abc import Callable

import hypothesis
import pytest
import torch

# Without a GPU, Triton kernels run in its interpreter. Read when triton is first imported, which some of
# transformers' modules do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lawcat import LawcatConfig, LawcatForCausalLM
from small_models import make_config, make_model

torch.set_num_threads(1)
# No test talks to a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The same examples on every run, and no limit on one example's time: a machine may be busy.
hypothesis.settings.register_profile("lawcat", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.load_profile("lawcat")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., LawcatConfig]:
    """A function that makes a small configuration, any field of it given by keyword."""
    return make_config


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., LawcatForCausalLM]:
    """A function that makes a small model in eval mode whose parameters are all moved from where they start.

    ``noise=0.0`` leaves them there; other keywords are configuration fields.
    """
    return make_model
