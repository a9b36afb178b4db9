"""The log: every step once, whatever was killed."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lawcat.distill.training_log as module
from lawcat.distill.training_log import TrainingLog, read_log
from lawcat.errors import DataError, LawcatError, MissingDependencyError

torch.set_num_threads(1)


def steps(path: Path) -> list[tuple[int, int]]:
    return [(record["stage"], record["step"]) for record in read_log(path)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made" / "log.jsonl"


def test_lines_are_there_at_once(path: Path) -> None:
    with TrainingLog(path) as log:
        log.write(1, 1, {"loss": 0.5})
        assert json.loads(path.read_text()) == {"stage": 1, "step": 1, "loss": 0.5}
        log.write(1, 2, {"loss": 0.25})
        assert steps(path) == [(1, 1), (1, 2)]
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.write(1, 3, {})


def test_values_of_every_kind(path: Path) -> None:
    with TrainingLog(path) as log:
        log.write(
            2,
            7,
            {
                "loss": torch.tensor(0.5),
                "layers": torch.tensor([1.0, math.nan]),
                "rate": np.float32(0.25),
                "count": np.int64(3),
                "infinite": -math.inf,
                "gate": {"saturated": (0.5, None), "half_life": np.array([2.0, math.inf])},
                "text": "\u00e9\n",
                "flag": True,
            },
        )
        with pytest.raises(TypeError, match="got a object"):
            log.write(2, 8, {"x": object()})
    assert path.read_text().count("\n") == 1
    assert read_log(path) == [
        {
            "stage": 2,
            "step": 7,
            "loss": 0.5,
            "layers": [1.0, None],
            "rate": 0.25,
            "count": 3,
            "infinite": None,
            "gate": {"saturated": [0.5, None], "half_life": [2.0, None]},
            "text": "\u00e9\n",
            "flag": True,
        }
    ]


@pytest.mark.parametrize(
    ("resume_from", "expected"),
    [
        ((0, 0), []),
        ((1, 0), []),
        ((1, 2), [(1, 1), (1, 2)]),
        ((1, 3), [(1, 1), (1, 2), (1, 3)]),
        ((2, 0), [(1, 1), (1, 2), (1, 3)]),
        ((2, 1), [(1, 1), (1, 2), (1, 3), (2, 1)]),
        ((2, 9), [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]),
    ],
)
@pytest.mark.parametrize("torn", [b"", b'{"stage": 2, "st', b'{"stage": 2, "step": 3}', b"\xff"])
def test_resuming_drops_what_is_done_again(
    path: Path, resume_from: tuple[int, int], expected: list[tuple[int, int]], torn: bytes
) -> None:
    with TrainingLog(path) as log:
        for stage, step in [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]:
            log.write(stage, step, {"loss": 1.0})
    with open(path, "ab") as file:
        file.write(torn)
    assert steps(path) == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
    with TrainingLog(path, resume_from=resume_from) as log:
        assert steps(path) == expected
        log.write(3, 1, {})
    assert steps(path) == [*expected, (3, 1)]


def test_resuming_without_a_log_begins_one(path: Path) -> None:
    with TrainingLog(path, resume_from=(1, 5)) as log:
        log.write(1, 6, {})
    assert steps(path) == [(1, 6)]


def test_a_log_is_not_appended_to_by_another_run(path: Path) -> None:
    with TrainingLog(path) as log:
        log.write(1, 1, {})
    with pytest.raises(DataError, match="earlier run already"):
        TrainingLog(path)
    assert steps(path) == [(1, 1)]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"stage": 1}', '{"stage": 1, "step": "2"}', "1"])
def test_a_damaged_line_is_named(path: Path, line: str) -> None:
    path.parent.mkdir()
    path.write_text('{"stage": 1, "step": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=r"line 2 of .*log\.jsonl is damaged"):
        TrainingLog(path, resume_from=(1, 1))


def test_a_missing_log_has_no_records(path: Path) -> None:
    assert read_log(path) == []


def test_a_full_disk_is_said(path: Path) -> None:
    class Full:
        def write(self, _: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None: ...

    with TrainingLog(path) as log:
        log._file.close()  # type: ignore[union-attr]
        log._file = Full()  # type: ignore[assignment]
        with pytest.raises(LawcatError, match=r"disk full: .*log\.jsonl"):
            log.write(1, 1, {})


def test_kill_loses_no_line(path: Path) -> None:
    code = f"""
        import os, signal
        from lawcat.distill.training_log import TrainingLog
        log = TrainingLog({str(path)!r})
        for step in range(1, 101):
            log.write(1, step, {{"loss": 1.0}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert steps(path) == [(1, step) for step in range(1, 101)]


def test_a_kill_while_resuming_leaves_the_log(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TrainingLog(path) as log:
        log.write(1, 1, {})
        log.write(1, 2, {})

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        TrainingLog(path, resume_from=(1, 1))
    assert steps(path) == [(1, 1), (1, 2)]


def test_tensorboard_gets_the_numbers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer:
        def __init__(self, log_dir: str) -> None:
            written.append(log_dir)

        def add_scalar(self, name: str, number: float, step: int) -> None:
            written.append((name, number, step))

        def close(self) -> None:
            written.append("closed")

    written: list[Any] = []
    monkeypatch.setattr(module, "_tensorboard_writer", lambda: Writer)
    with TrainingLog(path, tensorboard_dir=path.parent / "tb") as log:
        log.write(1, 3, {"loss": 0.5, "gate": {"saturated": [0.1, math.nan]}, "text": "x", "flag": True})
    assert written == [
        str(path.parent / "tb"),
        ("stage1/loss", 0.5, 3),
        ("stage1/gate/saturated/0", 0.1, 3),
        "closed",
    ]


def test_tensorboard_missing_is_said_before_anything_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lawcat\[tensorboard\]'"):
        TrainingLog(path, tensorboard_dir=path.parent / "tb")
    assert not path.exists()


def test_tensorboard_itself(path: Path) -> None:
    pytest.importorskip("tensorboard")
    with TrainingLog(path, tensorboard_dir=path.parent / "tb") as log:
        log.write(1, 1, {"loss": 0.5})
    assert list((path.parent / "tb").iterdir())
