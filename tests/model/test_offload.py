"""Weights that accelerate keeps on the CPU or on disk until they are needed give the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from model_variants import VARIANTS, model_of, random_tokens

from lawcat import LawcatForCausalLM


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_offloaded_to_the_cpu(name: str) -> None:
    model = model_of(VARIANTS[name], torch.float32)
    # `model_of` gives everybody the same object, and hooks stay.
    moved = type(model)(model.config).eval()
    moved.load_state_dict(model.state_dict())
    cpu_offload(moved, execution_device="cpu")
    assert {parameter.device.type for parameter in moved.parameters()} == {"meta"}
    tokens = random_tokens(2, 20)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    assert torch.equal(moved(tokens).logits, model(tokens).logits)
    assert torch.equal(
        moved(tokens, attention_mask=mask).logits[:, 3:], model(tokens, attention_mask=mask).logits[:, 3:]
    )
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(moved.generate(tokens, **options), model.generate(tokens, **options))
    # Nothing stays behind where it was brought.
    assert {parameter.device.type for parameter in moved.parameters()} == {"meta"}


@torch.no_grad()
def test_offloaded_to_disk(tmp_path: Path) -> None:
    model = model_of(VARIANTS["paper"], torch.float32)
    model.save_pretrained(tmp_path / "model")
    moved = LawcatForCausalLM.from_pretrained(tmp_path / "model")
    disk_offload(moved, tmp_path / "offload", execution_device="cpu")
    tokens = random_tokens(1, 20)
    assert torch.equal(moved(tokens).logits, model(tokens).logits)
