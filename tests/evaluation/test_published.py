import os
import re
from pathlib import Path

import pytest

from lawcat.evaluation.published import published_rows


def row(task, model):
    (found,) = [one for one in published_rows(task) if one.model == model]
    return found


def test_recurrent_models_on_needles_are_as_published():
    # Gated DeltaNet (arXiv 2412.06464v3), Table 2.
    lengths = (1024, 2048, 4096, 8192)
    table = {
        ("DeltaNet 1.3B", "niah_single_1"): (97.4, 96.8, 99.0, 98.8),
        ("DeltaNet 1.3B", "niah_single_2"): (98.4, 45.6, 18.6, 14.4),
        ("DeltaNet 1.3B", "niah_single_3"): (85.2, 47.0, 22.4),
        ("Mamba2 1.3B", "niah_single_1"): (99.2, 98.8, 65.4, 30.4),
        ("Mamba2 1.3B", "niah_single_2"): (99.4, 98.8, 56.2, 17.0),
        ("Mamba2 1.3B", "niah_single_3"): (64.4, 47.6, 4.6),
        ("Gated DeltaNet 1.3B", "niah_single_1"): (98.4, 88.4, 91.4, 91.8),
        ("Gated DeltaNet 1.3B", "niah_single_2"): (100.0, 99.8, 92.2, 29.6),
        ("Gated DeltaNet 1.3B", "niah_single_3"): (86.6, 84.2, 27.6),
    }
    for (model, task), values in table.items():
        found = row(task, model)
        assert found.accuracy == dict(zip(lengths, values, strict=False))
        assert (found.plotted, found.training) == (True, "from scratch")
        assert "2412.06464" in found.source
        assert "linear" in found.conditions
    plotted = [one.model for one in published_rows("niah_single_1") if one.plotted]
    assert sorted(plotted) == ["DeltaNet 1.3B", "Gated DeltaNet 1.3B", "Mamba2 1.3B"]


def test_models_on_babilong_are_as_published():
    assert list(row("babilong_qa2", "Mamba 130M").accuracy) == [0, 1000, 2000, 4000, 8000, 16000]
    assert list(row("babilong_qa3", "Mamba 130M").accuracy.values()) == [97, 97, 97, 97, 97, 96]
    assert list(row("babilong_qa3", "RMT 137M").accuracy.values()) == [97, 94, 88, 81, 73, 66]
    zero_shot = row("babilong_qa2", "Mamba 2.8B")
    assert zero_shot.accuracy == {0: 68, 1000: 47, 2000: 24, 4000: 8, 8000: 0}
    assert zero_shot.training == "zero-shot"
    assert "GPT-2 tokens" in zero_shot.conditions


def test_retrained_rows_are_in_tables_and_not_in_plots():
    expected = {"KDA": 30.6, "GDN-2": 39.2, "Mamba-2 (retrained)": 21.0, "Gated DeltaNet (retrained)": 32.0}
    for model, at_8k in expected.items():
        found = row("niah_single_2", model)
        assert (found.accuracy[8192], found.plotted) == (at_8k, False)
        assert "2605.22791" in found.source
    assert row("niah_single_3", "RWKV-7 0.19B").accuracy[8192] == 6.6


def test_every_row_is_a_share_with_a_source_and_other_tasks_have_none():
    tasks = [f"niah_single_{one}" for one in (1, 2, 3)] + ["babilong_qa2", "babilong_qa3"]
    for task in tasks:
        rows = published_rows(task)
        assert len({one.model for one in rows}) == len(rows)
        assert [one.plotted for one in rows] == sorted((one.plotted for one in rows), reverse=True)
        for one in rows:
            assert one.source
            assert one.conditions
            assert all(0 <= value <= 100 for value in one.accuracy.values())
    assert published_rows("passkey") == ()


# Names as the notes have them.
NOTED = {
    "DeltaNet 1.3B": "DeltaNet",
    "Mamba2 1.3B": "Mamba2",
    "Gated DeltaNet 1.3B": "Gated DeltaNet",
    "Mamba 130M": "Mamba 130M ~",
    "RMT 137M": "RMT 137M ~",
    "ARMT 137M": "ARMT 137M ~",
    "RMT 1.7B": "RMT-1.7B ~ *",
    "Mamba 2.8B": "Mamba-2.8B",
    "RWKV-6-world 7B": "RWKV-6-world-7B",
    "Jamba v0.1": "Jamba-v0.1",
    "Mistral-7B-Instruct-v0.2": "Mistral-7B-Instruct-v0.2",
    "Llama-3.2-1.2B": "Llama-3.2-1.2B *",
}


def test_rows_equal_the_notes_they_were_taken_from():
    notes = Path(os.environ.get("LAWCAT_NOTES", "notes-are-elsewhere")) / "evaluation.md"
    if not notes.is_file():
        pytest.skip("LAWCAT_NOTES does not name a folder with evaluation.md")
    noted = {}
    for line in notes.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) in (3, 4) and all(re.fullmatch(r"[\d. -]+(/[\d. -]+)+", cell) for cell in cells[1:]):
            noted[cells[0]] = [
                [None if part.strip() == "-" else float(part) for part in cell.split("/")]
                for cell in cells[1:]
            ]
    for group in (["niah_single_1", "niah_single_2", "niah_single_3"], ["babilong_qa2", "babilong_qa3"]):
        for column, task in enumerate(group):
            checked = 0
            for found in published_rows(task):
                if found.model in NOTED:
                    values = [value for value in noted[NOTED[found.model]][column] if value is not None]
                    assert list(found.accuracy.values()) == values, (task, found.model)
                    checked += 1
            assert checked >= 3
