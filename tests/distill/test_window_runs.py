"""Students with windows, sinks and maps of their own go the whole way: both stages train what is new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TinyRun, on_one_processor

from lawcat.convert.load import load_model
from lawcat.model.window import INITIAL_SCALE
from tiny_teachers import random_ids

FIELDS: dict[str, dict[str, Any]] = {
    "lolcats": {
        "model__sliding_window": 4,
        "model__feature_map": "untied",
        "model__use_conv": False,
        "model__gate": "none",
        "model__linear_rope": True,
    },
    "window and sinks": {"model__sliding_window": 4, "model__num_sinks": 2, "model__softmax_layers": [0]},
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_whole_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_one_processor(monkeypatch, tmp_path / "cache")
    run = TinyRun(tmp_path)
    moved = []
    for steps in (0, 6):
        out = f"student{steps}"
        run(out, recovery__steps=steps, **FIELDS[name])
        student, adapter = (load_model(tmp_path / path).model for path in (out, f"{out}/adapter"))
        assert student.config.sliding_window == 4
        assert student.config.num_sinks == FIELDS[name].get("model__num_sinks", 0)
        ids = random_ids(tokens=40)
        with torch.no_grad():
            assert torch.equal(student(ids).logits, adapter(ids).logits)
        moved.append(student.attention_modules()[1].window.scale)
    stage_1, stage_2 = moved
    assert (stage_1 != INITIAL_SCALE).all()
    assert (stage_2 != stage_1).all()
