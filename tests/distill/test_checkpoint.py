"""Checkpoints: equal after reading, and never lost to a kill, a flipped bit or a full disk."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lawcat.distill.checkpoint as checkpoint_module
from lawcat.distill.checkpoint import (
    TrainingState,
    capture_rng,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    restore_rng,
    save_checkpoint,
)
from lawcat.errors import CheckpointError, LawcatError
from lawcat.files import verify_manifest

torch.set_num_threads(1)


def make_state(step: int, stage: int = 1, **changes: Any) -> TrainingState:
    values: dict[str, Any] = {
        "recipe_fingerprint": "recipe",
        "teacher_fingerprint": "teacher",
        "parameters": {
            "layers.0.gate": torch.full((4, 3), float(step)),
            "layers.0.half": torch.ones(2, dtype=torch.bfloat16),
        },
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.rand(5)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "foreach": None}],
        },
        "scheduler": {"last_epoch": step, "lr_lambdas": [None]},
        "rng": capture_rng(),
        "data_index": step * 8,
        "losses": [0.25, 1 / 3],
        "extra": {"order": [3, 1, 2]},
    }
    return TrainingState(stage=stage, step=step, **(values | changes))


def assert_equal(got: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            assert_equal(got[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert type(got) is type(expected)
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_equal(a, b)
    else:
        assert got == expected


def test_what_is_read_equals_what_was_saved(tmp_path: Path) -> None:
    state = make_state(120)
    path = save_checkpoint(tmp_path / "made" / "checkpoints", state)
    assert path.name == "stage1-step-00000120"
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json",
        "optimizer.pt",
        "parameters.safetensors",
        "state.json",
    ]
    loaded = load_checkpoint(path, recipe_fingerprint="recipe", teacher_fingerprint="teacher")
    assert_equal(vars(loaded), vars(state))


def test_parameters_that_share_storage_are_saved_whole_and_small(tmp_path: Path) -> None:
    base = torch.arange(10_000.0)
    path = save_checkpoint(
        tmp_path, make_state(1, parameters={"a": base[:4], "b": base[2:6], "c": base.view(100, 100).T})
    )
    loaded = load_checkpoint(path).parameters
    assert_equal(loaded, {"a": base[:4], "b": base[2:6], "c": base.view(100, 100).T})
    assert (path / "parameters.safetensors").stat().st_size < 41_000


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Two steps, a checkpoint and two steps in new objects give what four steps give."""

    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        schedules = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(0.5) ** step),
            torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3]),
        ]
        return model, optimizer, torch.optim.lr_scheduler.ChainedScheduler(schedules)

    def train(model: torch.nn.Module, optimizer: Any, scheduler: Any, steps: int) -> None:
        for _ in range(steps):
            shift = random.random() + np.random.rand()  # noqa: NPY002 - the global generators are what is tested
            loss = (model(torch.rand(16, 4)) - shift).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    model, optimizer, scheduler = build()
    train(model, optimizer, scheduler, 2)
    path = save_checkpoint(
        tmp_path,
        TrainingState(
            2,
            2,
            "r",
            "t",
            dict(model.named_parameters()),
            optimizer.state_dict(),
            scheduler.state_dict(),
            capture_rng(),
        ),
    )
    train(model, optimizer, scheduler, 2)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    model, optimizer, scheduler = build()
    state = load_checkpoint(path)
    model.load_state_dict(state.parameters)
    optimizer.load_state_dict(state.optimizer)
    scheduler.load_state_dict(state.scheduler)
    restore_rng(state.rng)
    train(model, optimizer, scheduler, 2)
    assert_equal(dict(model.state_dict()), expected)


def test_restore_rng_restores_all_three(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves a second value in the generator's pocket
    np.random.normal()  # noqa: NPY002
    state = capture_rng()

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), float(np.random.normal()), float(torch.rand(()))]  # noqa: NPY002

    first = draw()
    restore_rng(load_checkpoint(save_checkpoint(tmp_path, make_state(1, rng=state))).rng)
    assert draw() == first


def test_another_number_of_cuda_devices_warns() -> None:
    state = capture_rng()
    state["cuda"] = [*state["cuda"], torch.zeros(16, dtype=torch.uint8)]
    with pytest.warns(UserWarning, match="CUDA devices"):
        restore_rng(state)


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_last_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (1, 2, 10, 100, 100_000_000):
        save_checkpoint(tmp_path, make_state(step), keep=keep)
    save_checkpoint(tmp_path, make_state(1, stage=2), keep=keep)
    expected = ["stage2-step-00000001", "stage1-step-100000000", "stage1-step-00000100"][:keep]
    assert [path.name for path in list_checkpoints(tmp_path)] == expected
    assert sorted(os.listdir(tmp_path)) == sorted(expected)


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="keep at least 1"):
        save_checkpoint(tmp_path, make_state(1), keep=0)


def test_saving_the_same_state_again_writes_nothing(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_state(5))
    before = path.stat().st_mtime_ns, (path / "manifest.json").stat().st_ino
    assert save_checkpoint(tmp_path, make_state(5)) == path
    assert (path.stat().st_mtime_ns, (path / "manifest.json").stat().st_ino) == before


def test_a_damaged_checkpoint_of_the_same_step_is_written_anew(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_state(5))
    (path / "optimizer.pt").write_bytes(b"")
    save_checkpoint(tmp_path, make_state(5))
    assert load_checkpoint(path).step == 5
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer": {"state": {0: object()}}},
            r"state\['optimizer'\]\['state'\]\[0\] is a builtins.object",
        ),
        ({"scheduler": {"rates": [np.ones(2)]}}, r"\['scheduler'\]\['rates'\]\[0\] is a numpy.ndarray"),
        ({"extra": {"a": object()}}, "what JSON cannot"),
        ({"extra": {"a": float("nan")}}, "what JSON cannot"),
    ],
)
def test_what_could_not_be_read_back_is_refused_at_once(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path / "new", make_state(1, **changes))
    assert not (tmp_path / "new").exists()


def test_losses_that_are_not_finite_survive(tmp_path: Path) -> None:
    losses = load_checkpoint(save_checkpoint(tmp_path, make_state(1, losses=[1.0, float("inf")]))).losses
    assert losses[0] == 1.0
    assert np.isnan(losses[1])


@pytest.mark.parametrize("what", ["recipe", "teacher"])
def test_another_recipe_or_teacher_is_refused(tmp_path: Path, what: str) -> None:
    path = save_checkpoint(tmp_path, make_state(1))
    fingerprint = "0123456789abcdef"
    with pytest.raises(
        CheckpointError, match=rf"made with another {what} \(fingerprint {what}, this run's is 0123456789ab\)"
    ):
        load_checkpoint(path, **{f"{what}_fingerprint": fingerprint})  # type: ignore[arg-type]


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(tmp_path, make_state(1))
    monkeypatch.setattr(checkpoint_module, "_FORMAT", 2)
    with pytest.raises(CheckpointError, match="checkpoint format 1 and this version of lawcat reads 2"):
        load_checkpoint(path)


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "executed"),))

    path = save_checkpoint(tmp_path / "run", make_state(1))
    torch.save({"optimizer": Evil(), "scheduler": {}, "rng": {}}, path / "optimizer.pt")
    from lawcat.files import write_manifest

    write_manifest(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "missing") is None
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "notes").mkdir()
    (tmp_path / "stage1-step-00000001").write_text("a file of that name")
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "stage1-step-00000007")


@pytest.mark.parametrize("name", ["parameters.safetensors", "optimizer.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_falls_back_to_the_checkpoint_before(tmp_path: Path, name: str, damage: str) -> None:
    good = save_checkpoint(tmp_path, make_state(1))
    bad = save_checkpoint(tmp_path, make_state(2))
    file = bad / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        # In a manifest, the first digit of a sum: white space would rightly not count as damage.
        place = content.index(b'"sha256": "') + 11 if name == "manifest.json" else len(content) // 2
        content[place] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    with pytest.warns(
        UserWarning,
        match=r"skipping the damaged checkpoint stage1-step-00000002: .*resumes from the checkpoint before",
    ):
        assert latest_checkpoint(tmp_path) == good
    with pytest.raises(CheckpointError):
        load_checkpoint(bad)
    (good / "state.json").unlink()
    with pytest.warns(UserWarning, match="skipping"):
        assert latest_checkpoint(tmp_path) is None


def disk_full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (checkpoint_module, "save_file"),
        (torch, "save"),
        (checkpoint_module, "write_atomic"),
        (os, "fsync"),
        (os, "rename"),
    ],
)
def test_full_disk_leaves_the_checkpoints_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    kept = [save_checkpoint(tmp_path, make_state(step)) for step in (1, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, disk_full)
        with pytest.raises(LawcatError, match=r"disk full: .*stage1-step-00000003.*nothing was overwritten"):
            save_checkpoint(tmp_path, make_state(3), keep=1)
    assert sorted(os.listdir(tmp_path)) == [path.name for path in kept]
    for path in kept:
        verify_manifest(path)


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2, 1, 1))  # type: ignore[attr-defined]
    with pytest.raises(LawcatError, match=r"disk full: .* needs 1\.0 MB and the disk has 1 bytes free"):
        save_checkpoint(tmp_path, make_state(1))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="the system has no limit of file sizes")
def test_writes_that_the_system_refuses_halfway(tmp_path: Path) -> None:
    """The real failures of safetensors and torch, got by a limit on the size of files."""
    code = f"""
        import resource, sys, torch
        torch.set_num_threads(1)
        from lawcat.distill.checkpoint import *
        from lawcat.errors import LawcatError
        save_checkpoint({str(tmp_path)!r}, TrainingState(1, 1, "r", "t"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        big = torch.zeros(10_000)
        for fields in ({{"parameters": {{"w": big}}}}, {{"optimizer": {{"w": big}}}}):
            try:
                save_checkpoint({str(tmp_path)!r}, TrainingState(1, 2, "r", "t", **fields), keep=1)
            except LawcatError as error:
                print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    first, second = result.stdout.splitlines()
    assert first.startswith("disk full: ")
    assert "File too large" in first
    assert second.startswith("cannot write ")
    assert os.listdir(tmp_path) == ["stage1-step-00000001"]
    assert latest_checkpoint(tmp_path) is not None


KILLED_AT_EVERY_PHASE = """
    import os, shutil, signal, sys
    import torch
    torch.set_num_threads(1)
    import lawcat.distill.checkpoint as module
    from lawcat.distill.checkpoint import TrainingState, save_checkpoint

    root = sys.argv[1]

    def state(step):
        parameters = {"w": torch.full((1000,), float(step))}
        return TrainingState(1, step, "r", "t", parameters, {"m": torch.ones(1000)})

    for step in (1, 2):
        save_checkpoint(root + "/start", state(step))

    def save_and_die(folder, at):
        count = 0
        def event(*_):
            nonlocal count
            count += 1
            if count > at:
                os.kill(os.getpid(), signal.SIGKILL)
        def around(function):
            def wrapped(*args, **kwargs):
                event()
                result = function(*args, **kwargs)
                event()
                return result
            return wrapped
        def half_written(function):
            whole = around(function)
            def wrapped(content, path, **kwargs):
                event()
                open(path, "wb").write(b"half of a file")
                event()
                return whole(content, path, **kwargs)
            return wrapped
        os.fsync = around(os.fsync)
        os.rename = around(os.rename)
        os.replace = around(os.replace)
        os.unlink = around(os.unlink)
        shutil.rmtree = around(shutil.rmtree)
        module.save_file = half_written(module.save_file)
        torch.save = half_written(torch.save)
        module.write_manifest = around(module.write_manifest)
        save_checkpoint(folder, state(3), keep=2)

    for at in range(1000):
        folder = f"{root}/{at:03d}"
        shutil.copytree(root + "/start", folder)
        child = os.fork()
        if not child:
            save_and_die(folder, at)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    print(at)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_killed_at_every_phase(tmp_path: Path) -> None:
    """kill -9 before and after every step that touches the disk: the newest whole checkpoint is found."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_AT_EVERY_PHASE), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    num_phases = int(result.stdout)
    assert num_phases > 25
    steps = []
    for at in range(num_phases + 1):
        folder = tmp_path / f"{at:03d}"
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error"
            )  # what is half-written has no checkpoint's name, so nothing is skipped
            path = latest_checkpoint(folder)
        assert path is not None
        state = load_checkpoint(path, recipe_fingerprint="r", teacher_fingerprint="t")
        assert torch.equal(state.parameters["w"], torch.full((1000,), float(state.step)))
        assert not [name for name in os.listdir(folder) if name.startswith(".")]
        # and the run goes on from there
        save_checkpoint(folder, make_state(4))
        assert len(os.listdir(folder)) == 2
        steps.append(state.step)
    assert steps == sorted(steps)
    assert set(steps) == {2, 3}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_killed_at_any_time(tmp_path: Path) -> None:
    code = f"""
        import torch
        torch.set_num_threads(1)
        from lawcat.distill.checkpoint import *
        for step in range(1, 10**6):
            parameters = {{"w": torch.full((50_000,), float(step))}}
            save_checkpoint({str(tmp_path)!r}, TrainingState(1, step, "r", "t", parameters))
            print(step, flush=True)
    """
    for delay_s in (0.03, 0.111):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay_s)
            process.kill()
            done = [1, *(int(line) for line in process.stdout if line.endswith("\n"))]
        path = latest_checkpoint(tmp_path)
        assert path is not None
        state = load_checkpoint(path)
        assert state.step >= done[-1]
        assert torch.equal(state.parameters["w"], torch.full((50_000,), float(state.step)))
        shutil.rmtree(tmp_path)


def test_state_is_readable_json(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_state(7))
    description = json.loads((path / "state.json").read_text())
    assert description["format"] == 1
    assert description["step"] == 7
    assert description["data_index"] == 56
