"""Whole runs: interrupted anywhere they come to the same end, and nothing is overwritten."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    TinyRun,
    assert_same_student,
    files_unchanged,
    free_port,
    on_one_processor,
    tensors_of,
    tiny_recipe,
    without_measurements,
)

import lawcat.distill.linearize as linearize_module
from comparison import assert_near
from lawcat import load_model
from lawcat.convert.initialize import convert, is_new_parameter
from lawcat.convert.teacher import load_teacher
from lawcat.distill.checkpoint import list_checkpoints
from lawcat.distill.data_workers import batches_from_processes
from lawcat.distill.linearize import linearize
from lawcat.distill.mixture import Mixture
from lawcat.distill.recipe import Recipe
from lawcat.distill.trainer import ANSWER_ACCURACY
from lawcat.distill.training_log import read_log
from lawcat.errors import (
    BusyError,
    CheckpointError,
    ConfigurationError,
    DataError,
    LawcatError,
    MissingDependencyError,
    TeacherError,
    TrainingError,
)
from tiny_teachers import random_ids, save_teacher

LOG = "training_log.jsonl"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, module_patch: pytest.MonkeyPatch) -> TinyRun:
    place = tmp_path_factory.mktemp("runs")
    on_one_processor(module_patch, place / "cache")
    tiny = TinyRun(place)
    tiny("whole")
    return tiny


@pytest.fixture
def whole(run: TinyRun) -> Path:
    """The student of a run that nothing interrupted."""
    return run.place / "whole"


def at(stage: int, step: int, act: Callable[[], object]) -> Callable[..., None]:
    """Return a progress function that acts after a step."""

    def progress(title: str, done: int, total: int, shown: Any = None) -> None:
        if title.startswith(f"stage {stage}:") and done == step:
            act()

    return progress


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def training_folder(run: TinyRun, out: str) -> Path:
    return run.place / f"{out}.training"


def assert_finished(run: TinyRun, out: str, whole: Path) -> None:
    """Fail unless a run's student and log are those of the uninterrupted one, and it left nothing else."""
    assert_same_student(run.place / out, whole)
    assert without_measurements(read_log(run.place / out / LOG)) == without_measurements(
        read_log(whole / LOG)
    )
    assert not training_folder(run, out).exists()
    assert not [path.name for path in run.place.iterdir() if path.name.startswith(f".{out}")]


def test_what_a_run_leaves(run: TinyRun, whole: Path) -> None:
    assert not training_folder(run, "whole").exists()
    expected = {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "generation_config.json",
        "manifest.json",
    }
    expected |= {"recipe.yaml", "lawcat_run.json", LOG, "modeling_lawcat.py", "adapter"}
    assert expected <= {path.name for path in whole.iterdir()}
    assert Recipe.load(whole / "recipe.yaml") == tiny_recipe(run.text)
    record = json.loads((whole / "lawcat_run.json").read_text())
    assert record["recipe"] == tiny_recipe(run.text).fingerprint()
    assert record["teacher"] == load_teacher(run.teacher).fingerprint
    assert record["stages"]["1"]["steps"] == record["stages"]["2"]["steps"] == 6
    assert len(record["stages"]["1"]["last_layer_losses"]) == 2
    assert record["versions"]["torch"] == torch.__version__
    assert record["data"]["sources"][0]["name"] == "text"
    assert not list(whole.rglob("*.bin")) + list(whole.rglob("*.pt"))


def test_student_and_adapter_are_the_same_model(run: TinyRun, whole: Path) -> None:
    ids = random_ids()
    student, adapter = load_model(whole), load_model(whole / "adapter")
    assert torch.equal(student.model(ids).logits, adapter.model(ids).logits)
    teacher = load_teacher(run.teacher).model
    assert not torch.allclose(student.model(ids).logits, teacher(ids).logits, atol=1e-2)
    untrained, _ = convert(teacher)
    moved = {
        name
        for name, parameter in untrained.named_parameters()
        if not torch.equal(parameter, dict(student.model.named_parameters())[name])
    }
    attention = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
    assert all(is_new_parameter(name) or name.endswith(attention) for name in moved)
    assert {name for name, _ in untrained.named_parameters() if is_new_parameter(name)} <= moved


def test_the_log_has_each_step_once_with_what_was_measured(whole: Path) -> None:
    rows = read_log(whole / LOG)
    assert [(row["stage"], row["step"]) for row in rows] == [(s, n) for s in (1, 2) for n in range(1, 7)]
    for row in rows:
        assert row["grad_norm"] > 0
        assert row["tokens_per_s"] > 0
        assert row["seconds"] > 0
        assert row["peak_memory_bytes"] > 1_000_000
        assert 0 < row["learning_rate"] <= 0.02
        if row["stage"] == 1:
            assert row["loss"] == pytest.approx(sum(row["layer_losses"]) / 2)
            assert row["tokens"] == 32
        elif "kl" in row:
            assert row["loss"] == pytest.approx(row["cross_entropy"] + row["kl"], rel=1e-5)
            assert row["tokens"] == 32
        else:
            assert row["tokens"] in (64, 96, 128)
    explained = (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
    for name in {*itertools.chain(*rows), ANSWER_ACCURACY}:
        assert f"`{name}`" in explained.partition("## What a step logs")[2], name
    assert {"kl" in row for row in rows if row["stage"] == 2} == {True, False}
    measured = [row for row in rows if "gate_median_half_life_tokens" in row]
    assert [(row["stage"], row["step"]) for row in measured] == [(1, 1), (1, 6), (2, 1), (2, 6)]
    assert all(row["gate_median_half_life_tokens"] > 1 for row in measured)
    assert all(0 <= row["gate_saturated_share"] <= 1 for row in measured)


def test_a_second_call_finds_it_done(run: TinyRun, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linearize_module, "load_teacher", None)
    with files_unchanged(run.place):
        result = run("whole")
    assert (result.path, result.is_reused) == (whole, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("stage", "step"), [(1, 1), (1, 3), (1, 6), (2, 1), (2, 5), (2, 6)])
def test_a_signal_saves_the_step_in_hand(
    run: TinyRun, whole: Path, number: int, stage: int, step: int, capfd: pytest.CaptureFixture[str]
) -> None:
    out = f"signal-{number}-{stage}-{step}"
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        run(out, progress=at(stage, step, send(number)))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert "stopping after this step" in capfd.readouterr().err
    newest = list_checkpoints(training_folder(run, out) / "checkpoints")[0]
    assert newest.name == f"stage{stage}-step-{step:08d}"
    assert not (run.place / out).exists()
    assert not run(out).is_reused
    assert_finished(run, out, whole)


def test_a_second_ctrl_c_stops_at_once(run: TinyRun, whole: Path) -> None:
    def twice() -> None:
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    with pytest.raises(KeyboardInterrupt):
        run("twice", progress=at(2, 3, twice))
    newest = list_checkpoints(training_folder(run, "twice") / "checkpoints")[0]
    assert newest.name == "stage2-step-00000002"
    run("twice")
    assert_finished(run, "twice", whole)


def test_a_signal_outside_of_training_stops_at_once(
    run: TinyRun, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = linearize_module.load_teacher

    def interrupted(*args: Any, **options: Any) -> Any:
        send(signal.SIGTERM)()
        raise AssertionError("not stopped")

    monkeypatch.setattr(linearize_module, "load_teacher", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("before")
    monkeypatch.setattr(linearize_module, "load_teacher", load)
    run("before")
    assert_finished(run, "before", whole)


KILLS = {
    "stage 1": (1, 3),
    "end of stage 1": (1, 6),
    "beginning of stage 2": (2, 1),
    "stage 2": (2, 5),
    "end of stage 2": (2, 6),
}


@pytest.mark.parametrize("where", KILLS)
def test_kill_9_during_training(run: TinyRun, whole: Path, where: str) -> None:
    out = "killed in " + where
    kill = at(*KILLS[where], send(signal.SIGKILL))
    assert run.in_a_process(lambda: run(out, progress=kill)) == -signal.SIGKILL
    assert not (run.place / out).exists()
    run(out)
    assert_finished(run, out, whole)


@pytest.mark.parametrize("what", ["between the stages", "checkpointing", "saving", "before cleaning up"])
def test_kill_9_elsewhere(run: TinyRun, whole: Path, what: str) -> None:
    out = f"killed {what}"

    def killed() -> None:
        kill = send(signal.SIGKILL)
        if what == "between the stages":
            linearize_module.RecoveryModel = lambda *args: kill()  # type: ignore[assignment, misc]
        elif what == "checkpointing":
            count = iter(range(10))
            save = torch.save
            torch.save = lambda *args: kill() if next(count) == 4 else save(*args)
        elif what == "saving":
            shutil.copy = lambda *args: kill()  # type: ignore[assignment]
        else:
            linearize_module.remove_directory = lambda path: kill()  # type: ignore[assignment]
        run(out)

    assert run.in_a_process(killed) == -signal.SIGKILL
    if what == "saving":
        assert [path for path in run.place.iterdir() if path.name.startswith(f".{out}.tmp")]
    assert run(out).is_reused == (what == "before cleaning up")
    assert_finished(run, out, whole)


def test_interrupted_again_and_again(run: TinyRun, whole: Path) -> None:
    for stage in (1, 2):
        for step in range(1, 7):
            with pytest.raises(KeyboardInterrupt):
                run("again", progress=at(stage, step, send(signal.SIGINT)))
    run("again")
    assert_finished(run, "again", whole)


def test_a_damaged_checkpoint_is_passed_over(run: TinyRun, whole: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("damaged", progress=at(2, 4, send(signal.SIGINT)))
    newest, before = list_checkpoints(training_folder(run, "damaged") / "checkpoints")
    file = newest / "parameters.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    messages: list[str] = []
    with pytest.warns(UserWarning, match=f"skipping the damaged checkpoint {newest.name}"):
        linearize(str(run.teacher), run.place / "damaged", tiny_recipe(run.text), message=messages.append)
    assert "resuming from stage 2, step 2" in messages
    assert before.name == "stage2-step-00000002"
    assert_finished(run, "damaged", whole)


VARIANTS: dict[str, dict[str, Any]] = {
    "no stage 1": {"attention_transfer__steps": 0},
    "no stage 2": {"recovery__steps": 0},
    "no stage": {"attention_transfer__steps": 0, "recovery__steps": 0},
    "all weights": {"recovery__train": "all"},
    "all weights, no KL": {"recovery__train": "all", "recovery__kl_weight": 0},
    "bfloat16": {"precision": "bfloat16"},
    "all weights, bfloat16": {"precision": "bfloat16", "recovery__train": "all"},
    "MLPs in full": {"recovery__full_targets": ("gate_proj", "up_proj", "down_proj")},
    "MLPs in full, bfloat16": {"recovery__full_targets": ("up_proj",), "precision": "bfloat16"},
    "hybrid": {"model__softmax_layers": (1,), "model__gate": "head"},
    "nothing carried": {"recovery__carried_segments": 0},
    "longer batches carried": {"recovery__carried_sequences": 3},
    "tuned teacher": {"teacher_tuning__steps": 6, "teacher_tuning__batch_sequences": 2},
    "tuned teacher, no stage 1": {"teacher_tuning__steps": 6, "attention_transfer__steps": 0},
    "tuned teacher, bfloat16": {"teacher_tuning__steps": 6, "precision": "bfloat16"},
    "tuned teacher, hybrid, MLPs in full, bfloat16": {
        "teacher_tuning__steps": 6,
        "model__softmax_layers": (1,),
        "recovery__full_targets": ("up_proj",),
        "precision": "bfloat16",
    },
    "gates pulled": {"attention_transfer__gate_penalty": 0.1, "recovery__gate_penalty": 0.1},
    "LoLCATs": {
        "model__feature_map": "untied",
        "model__feature_dim": 16,
        "model__linear_rope": True,
        "model__sliding_window": 4,
        "model__gate": "none",
        "model__use_conv": False,
        "recovery__new_parameter_learning_rate": 0,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_recipes_resume_too(run: TinyRun, variant: str) -> None:
    overrides = VARIANTS[variant]
    run(f"{variant}, whole", **overrides)
    expected = run.place / f"{variant}, whole"
    out = f"{variant}, interrupted"
    usual = {"teacher_tuning__steps": 0, "attention_transfer__steps": 6, "recovery__steps": 6}
    for stage, steps in enumerate({name: overrides.get(name, usual[name]) for name in usual}.values()):
        if steps:
            with pytest.raises(KeyboardInterrupt):
                run(out, progress=at(stage, 3, send(signal.SIGTERM)), **overrides)
    run(out, **overrides)
    assert_finished(run, out, expected)
    in_full = overrides.get("recovery__full_targets", ())
    assert (expected / "adapter").is_dir() == ("all weights" not in variant and not in_full)
    ids = random_ids()
    student = load_model(expected)
    if (expected / "adapter").is_dir():
        assert torch.equal(load_model(expected / "adapter").model(ids).logits, student.model(ids).logits)
    tensors = tensors_of(expected)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    has_factors = any(".lora_" in name for name in tensors)
    assert has_factors == (
        overrides.get("recovery__steps") != 0 and "all weights" not in variant and not in_full
    )
    if variant == "no stage":
        untrained, _ = convert(load_teacher(run.teacher).model, seed=3)
        assert torch.equal(untrained(ids).logits, student.model(ids).logits)
        assert read_log(expected / LOG) == []
    if variant == "all weights":
        before = load_teacher(run.teacher).model.state_dict()
        assert not torch.equal(before["model.norm.weight"], tensors["student model.norm.weight"])


def test_weights_trained_in_full_are_in_the_student(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    recovery_model = linearize_module.RecoveryModel

    def remembered(*args: Any) -> Any:
        kept.append(recovery_model(*args))
        return kept[-1]

    monkeypatch.setattr(linearize_module, "RecoveryModel", remembered)
    messages: list[str] = []
    recipe = tiny_recipe(run.text, recovery__full_targets=("up_proj", "down_proj"))
    out = run.place / "in full"
    linearize(str(run.teacher), out, recipe, message=messages.append)
    assert messages[-1] == (
        "no adapter beside it: up_proj, down_proj trained in full, so it would be as large as the student"
    )
    ids = random_ids()
    student = load_model(out).model
    assert_near(student(ids).logits, kept[0].student(ids).logits, 1e-5, "logits")
    before = load_teacher(run.teacher).model.state_dict()
    moved = {
        name.split(".")[-2] for name, t in before.items() if not torch.equal(t, student.state_dict()[name])
    }
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}


def test_bfloat16_trains_as_float32_does(run: TinyRun) -> None:
    rows = {}
    for precision in ("float32", "bfloat16"):
        out = run(f"precision {precision}", recovery__train="all", precision=precision).path
        rows[precision] = read_log(out / LOG)
    for exact, rounded in zip(rows["float32"], rows["bfloat16"], strict=True):
        assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.02)
        assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.15)


def test_a_place_that_is_taken(run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "lawcat_run.json").write_text("[1]")
    (tmp_path / "taken.training").mkdir()
    (tmp_path / "taken.training" / "thesis.txt").write_text("mine")
    (tmp_path / "blocked.training").write_text("mine")
    recipe = tiny_recipe(run.text)
    monkeypatch.chdir(tmp_path)
    with files_unchanged(tmp_path):
        for name in ("folder", "file", "dangling", "record", "taken", ".", ".."):
            with pytest.raises(ConfigurationError, match="nothing was overwritten"):
                linearize(str(run.teacher), name, recipe)
        with pytest.raises(LawcatError, match=r"cannot write .*blocked\.training"):
            linearize(str(run.teacher), tmp_path / "blocked", recipe)
        # Refused before the teacher is even looked for.
        with pytest.raises(ConfigurationError, match="not a student made by lawcat"):
            linearize("no/such-teacher", tmp_path / "folder", recipe)


def test_a_place_where_another_process_begins(run: TinyRun, whole: Path) -> None:
    """Or was killed as it did, and its number is another one's now."""
    training = training_folder(run, "begun")
    training.mkdir()
    (training / ".lawcat_run.json.tmp-1-00000000-0").write_text("{")
    run("begun")
    assert_finished(run, "begun", whole)


def test_a_run_with_another_recipe_or_teacher_or_data(run: TinyRun, tmp_path: Path, whole: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("mine", progress=at(1, 3, send(signal.SIGINT)))
    other = save_teacher(tmp_path / "other", seed=1)
    for out, folder in (("mine", training_folder(run, "mine")), ("whole", whole)):
        with files_unchanged(folder):
            with pytest.raises(CheckpointError, match="another recipe; nothing was overwritten"):
                run(out, seed=4)
            with pytest.raises(CheckpointError, match="another teacher; nothing was overwritten"):
                linearize(str(other), run.place / out, tiny_recipe(run.text))
    text = run.text.read_bytes()
    run.text.write_bytes(text + b" w3")
    try:
        with pytest.raises(CheckpointError, match="on other data: a file that the recipe names has changed"):
            run("mine")
    finally:
        run.text.write_bytes(text)
    run("mine")
    assert_finished(run, "mine", whole)


def test_a_run_that_failed_before_it_had_begun_is_not_in_the_way(run: TinyRun, whole: Path) -> None:
    (run.place / "blank.txt").write_text(" ")
    with pytest.raises(DataError, match=r"blank\.txt is empty"):
        run("misspelt", **{"data.0.path": str(run.place / "blank.txt")})
    training = training_folder(run, "misspelt")
    (training / "tensorboard").mkdir()
    (training / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="is not of a run of lawcat; nothing was"):
        run("misspelt")
    assert (training / "thesis.txt").read_text() == "mine"
    (training / "thesis.txt").unlink()
    run("misspelt")
    assert_finished(run, "misspelt", whole)


def test_a_file_that_is_not_there_shows_before_the_teacher_is_looked_for(run: TinyRun, whole: Path) -> None:
    with pytest.raises(DataError, match=r"data\.0 \(text\): There is no file nowhere.*--set data\.0\.path="):
        linearize("./no-teacher", run.place / "lost", tiny_recipe(run.text), **{"data.0.path": "nowhere.txt"})
    assert not training_folder(run, "lost").exists()
    hidden = run.text.rename(run.text.with_name("hidden.txt"))
    try:
        assert linearize(str(run.teacher), whole, tiny_recipe(run.text)).is_reused
    finally:
        hidden.rename(run.text)


def test_a_teacher_found_elsewhere_is_the_same_teacher(run: TinyRun, tmp_path: Path, whole: Path) -> None:
    moved = shutil.copytree(run.teacher, tmp_path / "moved")
    assert linearize(str(moved), whole, tiny_recipe(run.text)).is_reused


def test_a_loss_that_is_not_finite(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = linearize_module.AttentionTransferStage.backward

    def poisoned(self: Any, batch: Any, workers: Any) -> Any:
        if len(calls) == 3:
            with torch.no_grad():
                self.student.model.layers[1].self_attn.q_conv.weight.fill_(torch.nan)
        calls.append(1)
        return losses(self, batch, workers)

    calls: list[int] = []
    monkeypatch.setattr(linearize_module.AttentionTransferStage, "backward", poisoned)
    with pytest.raises(TrainingError, match="stage 1, step 4: the loss is not finite, first in layer 1"):
        run("poisoned 1")
    checkpoints = training_folder(run, "poisoned 1") / "checkpoints"
    assert [path.name for path in list_checkpoints(checkpoints)] == ["stage1-step-00000002"]
    assert len(read_log(training_folder(run, "poisoned 1") / LOG)) == 3


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes are not forked here")
def test_an_error_ends_the_processes_that_make_data(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a program that ends of this error would wait for them, which leave it to the program to end them."""

    def batches(mixture: Any, requests: Any, *, ahead: bool) -> Any:
        return batches_from_processes(mixture.batch, requests, 2)

    def broken(self: Any, batch: Any, workers: Any) -> Any:
        assert len(multiprocessing.active_children()) == 2
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(Mixture, "batches", batches)
    monkeypatch.setattr(linearize_module.AttentionTransferStage, "backward", broken)
    with pytest.raises(RuntimeError, match="unspecified launch failure") as told:
        run("broken", attention_transfer__steps=1000)  # more than pipes hold
    assert told.value.__traceback__ is not None
    left = multiprocessing.active_children()
    for process in left:
        process.kill()
    assert left == []


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("model.layers.1.self_attn.q_proj.lora_A.default", "the loss is not finite, first in layer 1"),
        ("model.layers.0.mlp.up_proj", "the loss is not finite, first in layer 0"),
        ("model.norm", "the loss is not finite, first in the output head"),
        (None, "the gradient is not finite in model.layers.0.self_attn.q_conv.weight"),
    ],
)
def test_a_loss_that_is_not_finite_in_stage_2(
    run: TinyRun, whole: Path, module: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"poisoned in {module}"
    backward = linearize_module.RecoveryStage.backward
    calls: list[int] = []

    def poisoned(self: Any, batch: Any, workers: Any) -> Any:
        calls.append(1)
        if len(calls) == 4 and module is not None:
            with torch.no_grad():
                self.student.get_submodule(module).weight.fill_(torch.nan)
        measured = backward(self, batch, workers)
        if len(calls) == 4 and module is None:
            self.student.model.layers[0].self_attn.q_conv.weight.grad.fill_(torch.inf)
        return measured

    with monkeypatch.context() as patch:
        patch.setattr(linearize_module.RecoveryStage, "backward", poisoned)
        with pytest.raises(TrainingError, match=f"stage 2, step 4: {message}"):
            run(out)
    newest = list_checkpoints(training_folder(run, out) / "checkpoints")[0]
    assert newest.name == "stage2-step-00000002"
    assert not (run.place / out).exists()
    run(out)  # what was in the checkpoint is good
    assert_finished(run, out, whole)


def test_a_full_disk_at_the_end(run: TinyRun, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy", full)
        with pytest.raises(
            LawcatError, match=r"disk full: .*full could not be written.*nothing was overwritten"
        ):
            run("full")
    assert not (run.place / "full").exists()
    assert not [path for path in run.place.iterdir() if path.name.startswith(".full")]
    steps: list[int] = []
    run("full", progress=lambda title, *rest: steps.append(1) if title.startswith("stage") else None)
    assert steps == [], "trained again"
    assert_finished(run, "full", whole)


def test_a_full_disk_at_a_checkpoint(run: TinyRun, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = torch.save, []

    def full(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(LawcatError, match="disk full"):
            run("full checkpoint")
    newest = list_checkpoints(training_folder(run, "full checkpoint") / "checkpoints")[0]
    assert newest.name == "stage2-step-00000002"
    run("full checkpoint")
    assert_finished(run, "full checkpoint", whole)


def test_bad_input_is_refused_before_anything_is_made(run: TinyRun, tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_bytes(b"")
    binary.write_bytes(b"\xff\xfe\xfd")
    broken = shutil.copytree(run.teacher, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    recipe, before = tiny_recipe(run.text), sorted(run.place.iterdir())
    out = run.place / "bad"
    for teacher, kind, message in [
        ("./no-such-folder", TeacherError, "there is no file or folder"),
        (str(broken), TeacherError, "model.safetensors"),
    ]:
        with pytest.raises(kind, match=message):
            linearize(teacher, out, recipe)
    for overrides, message in [
        ({"recovry": {"steps": 1}}, r"recovry: unknown key\. Did you mean 'recovery'\?"),
        ({"recovery": {"stps": 1}}, r"recovery\.stps: unknown key\. Did you mean 'steps'\?"),
        ({"recovery.train": "all", "recovery.lora_rank": 4}, "contradicts"),
        ({"model": {"softmax_layers": [0, 1]}}, "names all 2 layers, which leaves nothing to linearize"),
        ({"model": {"softmax_layers": [5]}}, "softmax layer 5 does not exist"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            linearize(str(run.teacher), out, recipe, **overrides)
    with pytest.raises(ConfigurationError, match="There is no recipe"):
        linearize(str(run.teacher), out, "quik")
    assert sorted(run.place.iterdir()) == before
    for path, message in [(empty, "is empty"), (binary, "not UTF-8"), (tmp_path / "gone.txt", "no file")]:
        with pytest.raises(DataError, match=message):
            linearize(str(run.teacher), tmp_path / f"out-{path.stem}", tiny_recipe(path))
    with pytest.raises(ConfigurationError, match=r"recovery\.lora_targets: 'q_prj' is not a linear layer"):
        run("bad targets", recovery__lora_targets=("q_prj",))
    assert not training_folder(run, "bad targets").exists()  # at once, not after stage 1
    with pytest.raises(ConfigurationError, match=r"recovery\.full_targets: 'lm_head' is not a linear layer"):
        run("bad targets", recovery__full_targets=("lm_head",))
    run("no stage that has targets", recovery__lora_targets=("q_prj",), recovery__steps=0)


def test_two_runs_on_one_directory(run: TinyRun, whole: Path) -> None:
    refused: list[str] = []

    def again() -> None:
        if not refused:
            with (
                files_unchanged(training_folder(run, "twofold")),
                pytest.raises(BusyError, match=r"another process is training .*twofold at this moment"),
            ):
                run("twofold")
            exit_code = run.in_a_process(lambda: run("twofold"))
            refused.append(f"in a process: {exit_code}")

    run("twofold", progress=at(2, 2, again))
    assert refused == ["in a process: 1"]
    assert_finished(run, "twofold", whole)


def test_a_run_that_has_ended_meanwhile(run: TinyRun, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process writes the student between this one's first look and its lock."""
    resolve = linearize_module.resolve_teacher

    def resolve_late(*args: Any, **options: Any) -> Any:
        source = resolve(*args, **options)
        shutil.copytree(whole, run.place / "late")
        return source

    with monkeypatch.context() as patch:
        patch.setattr(linearize_module, "resolve_teacher", resolve_late)
        with pytest.raises(BusyError, match=r"has just written .*late; run the same command again"):
            run("late")
    assert_same_student(run.place / "late", whole)
    assert run("late").is_reused


def test_the_record_counts_what_is_trained_and_what_is_read(run: TinyRun, whole: Path) -> None:
    stages = json.loads((whole / "lawcat_run.json").read_text())["stages"]
    rows = read_log(whole / LOG)
    assert any(row["tokens"] > 32 for row in rows)
    for number in (1, 2):
        own = [row for row in rows if row["stage"] == number]
        assert stages[str(number)]["trained_tokens"] == 6 * 2 * 16
        assert stages[str(number)]["tokens"] == sum(row["tokens"] for row in own)
        assert stages[str(number)]["seconds"] == pytest.approx(sum(row["seconds"] for row in own), abs=0.01)


def test_the_record_counts_what_was_before_an_interruption(run: TinyRun) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("resumed", progress=at(1, 3, send(signal.SIGINT)))
    log = training_folder(run, "resumed") / LOG
    rows = read_log(log)
    rows[0] |= {"seconds": 1000.0, "peak_memory_bytes": 7 * 10**12}
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = run("resumed").path
    record = json.loads((folder / "lawcat_run.json").read_text())
    assert 1000 < record["training_s"] < 1100
    assert record["peak_memory_bytes"] == 7 * 10**12
    card = (folder / "README.md").read_text()
    assert re.search(r"Trained on [\d,]+ tokens in 10\d\d s .* peak memory 7\.0 TB", card)


def test_new_parameters_that_recovery_leaves_alone(run: TinyRun) -> None:
    before = tensors_of(run("stage 1 alone", recovery__steps=0).path)
    after = tensors_of(run("left alone", recovery__new_parameter_learning_rate=0).path)
    new = [name for name in before if is_new_parameter(name.removeprefix("student "))]
    assert new
    assert all(torch.equal(before[name], after[name]) for name in new)
    assert not torch.equal(
        before["student model.layers.0.self_attn.q_proj.weight"],
        after["student model.layers.0.self_attn.q_proj.weight"],
    )


def test_a_text_shorter_than_a_sequence(run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w3 w4 w5")
    with pytest.raises(DataError, match="holds 4 tokens, fewer than one sequence of 16"):
        linearize(str(run.teacher), tmp_path / "out", tiny_recipe(tmp_path / "short.txt"))
    assert not (tmp_path / "out").exists()


def test_peft_is_asked_for_at_the_start(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    version = metadata.version

    def missing(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lawcat\[distill\]'"):
        run("without peft")
    assert not training_folder(run, "without peft").exists()


def test_a_run_says_what_it_does_and_nothing_else(run: TinyRun, capfd: pytest.CaptureFixture[str]) -> None:
    messages: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linearize(str(run.teacher), run.place / "quiet", tiny_recipe(run.text), message=messages.append)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert any("tensors copied" in message for message in messages)
    assert messages[-1] == f"writing {run.place / 'quiet'}"


def test_overrides_by_name_and_by_dotted_name(run: TinyRun) -> None:
    recipe = tiny_recipe(run.text)
    options: dict[str, Any] = {"attention_transfer": {"steps": 0}, "recovery.steps": 0, "seed": 9}
    out = linearize(str(run.teacher), run.place / "overridden", recipe, **options).path
    found = Recipe.load(out / "recipe.yaml")
    assert (found.attention_transfer.steps, found.recovery.steps, found.seed) == (0, 0, 9)


@pytest.mark.parametrize("train_what", ["lora", "all", "lora, tuned teacher"])
def test_two_processes_are_one_with_the_whole_batch(
    run: TinyRun, train_what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {
        "recovery__train": train_what.partition(",")[0],
        "recovery__carried_sequences": 4,
    }
    if "tuned" in train_what:
        options |= {"teacher_tuning__steps": 6, "teacher_tuning__batch_sequences": 4}
    options |= {"attention_transfer__batch_sequences": 4, "recovery__batch_sequences": 4}
    run(f"one {train_what}", **options)
    capfd.readouterr()
    run.in_two_processes(lambda rank: run(f"two {train_what}", **options), free_port())
    assert "Error" not in capfd.readouterr().err
    one, two = run.place / f"one {train_what}", run.place / f"two {train_what}"
    mine, theirs = read_log(one / LOG), read_log(two / LOG)
    assert len(mine) == len(theirs) == (18 if "tuned" in train_what else 12)
    assert {"kl" in row for row in mine if row["stage"] == 2} == {True, False}
    for a, b in zip(mine, theirs, strict=True):
        assert (a["stage"], a["step"], a["tokens"]) == (b["stage"], b["step"], b["tokens"])
        for name in ("loss", "cross_entropy", "kl", "grad_norm"):
            assert (name in a) == (name in b)
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-5), (name, a, b)
        if a["stage"] == 1:
            assert a["layer_losses"] == pytest.approx(b["layer_losses"], rel=1e-5)
    assert mine[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-6)
    expected = tensors_of(one)
    for name, tensor in tensors_of(two).items():
        assert_near(tensor, expected[name], 1e-4, name, least_scale=0.1)
    record = json.loads((two / "lawcat_run.json").read_text())
    assert record["processes"] == 2


@pytest.mark.skipif(torch.accelerator.is_available(), reason="what happens without a GPU")
def test_torchrun_needs_no_word_that_there_is_no_gpu(run: TinyRun) -> None:
    def work(rank: int) -> None:
        os.environ.pop("ACCELERATE_USE_CPU")
        run("by torchrun", attention_transfer__steps=1, recovery__steps=0)

    run.in_two_processes(work, free_port())
    assert json.loads((run.place / "by torchrun" / "lawcat_run.json").read_text())["processes"] == 2


def test_a_batch_that_two_processes_cannot_share(run: TinyRun) -> None:
    def refused(rank: int) -> None:
        with pytest.raises(ConfigurationError, match="batch_sequences=3 cannot be shared by 2 processes"):
            run("three", attention_transfer__batch_sequences=3)
        with pytest.raises(ConfigurationError, match="carried_sequences=5 cannot be shared"):
            run("five", recovery__carried_sequences=5, attention_transfer__steps=0)

    run.in_two_processes(refused, free_port())
