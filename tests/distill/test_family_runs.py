"""Whole runs with teachers that have biases, or norms of q and k: interrupted, resumed and loaded."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TinyRun, assert_same_student, on_one_processor, tensors_of

from lawcat import load_model
from lawcat.convert.initialize import is_new_parameter
from lawcat.convert.teacher import load_teacher
from tiny_teachers import random_ids

# transformers makes Qwen's tokenizer of whatever comes with a Qwen2: of single bytes, not of words.
QWEN2: dict[str, Any] = {"family": "qwen2", "spells": True}
# Three stages of two steps.
STEPS = {"teacher_tuning__steps": 2, "attention_transfer__steps": 2, "recovery__steps": 2}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2": (QWEN2, STEPS),
    "qwen3": ({"family": "qwen3", "attention_bias": True}, {**STEPS, "model__softmax_layers": (1,)}),
    "qwen2, all weights": (QWEN2, {"recovery__train": "all"}),
    "qwen3, all weights, bfloat16": (
        {"family": "qwen3"},
        {"recovery__train": "all", "precision": "bfloat16"},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, overrides = RUNS[name]
    on_one_processor(monkeypatch, tmp_path / "cache")
    run = TinyRun(tmp_path, **fields)
    run("whole", **overrides)
    for stage in range(0 if "teacher_tuning__steps" in overrides else 1, 3):

        def interrupt(title: str, done: int, total: int, shown: Any = None, stage: int = stage) -> None:
            if title.startswith(f"stage {stage}:") and done == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(KeyboardInterrupt):
            run("resumed", progress=interrupt, **overrides)
    run("resumed", **overrides)
    whole = tmp_path / "whole"
    assert_same_student(whole, tmp_path / "resumed")

    ids, loaded = random_ids(), load_model(whole)
    trains_all = overrides.get("recovery__train") == "all"
    assert (whole / "adapter").is_dir() != trains_all
    if not trains_all:
        assert torch.equal(load_model(whole / "adapter").model(ids).logits, loaded.model(ids).logits)
    # LoRA leaves biases and norms as they are; else they train with the rest.
    before, after = load_teacher(run.teacher).model.state_dict(), loaded.model.state_dict()
    small = [n for n in before if n.endswith("_proj.bias") or n.endswith(("q_norm.weight", "k_norm.weight"))]
    assert len(small) == 2 * (3 if fields["family"] == "qwen2" else 6 if "attention_bias" in fields else 2)
    for tensor in small:
        assert torch.equal(before[tensor], after[tensor]) == (not trains_all), tensor
    assert not torch.equal(before[_Q_PROJ], after[_Q_PROJ])
    new = {n: t for n, t in tensors_of(whole).items() if n.startswith("student ") and is_new_parameter(n)}
    assert all(t.isfinite().all() and t.dtype == torch.float32 for t in new.values())


_Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
