"""Stage 0: only LoRA factors train, through softmax; stages 1 and 2 begin from what it has left."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import TinyRun, assert_same_student, on_one_processor, tensors_of, without_measurements
from torch import Tensor
from torch.nn import functional as F

import lawcat.distill.linearize as linearize_module
from comparison import assert_near
from lawcat.convert.initialize import convert, is_new_parameter
from lawcat.distill.attention_transfer import attention_transfer_losses
from lawcat.distill.checkpoint import TrainingState, list_checkpoints, load_checkpoint
from lawcat.distill.recipe import AttentionTransferSettings, RecoverySettings, TeacherTuningSettings
from lawcat.distill.recovery import RecoveryModel, is_lora_factor, is_trained_in_full, plain_name
from lawcat.distill.sequence import Batch
from lawcat.distill.trainer import AttentionTransferStage, RecoveryStage, TeacherTuningStage, trained
from lawcat.distill.training_log import read_log
from lawcat.errors import TrainingError
from tiny_teachers import random_ids, tiny_teacher

LOG = "training_log.jsonl"
TUNED = {"teacher_tuning__steps": 6, "teacher_tuning__batch_sequences": 2}
WORKERS: Any = SimpleNamespace(count=1)
IDS = random_ids(2, 20)


def recovery_of(**settings: Any) -> RecoveryModel:
    """Return what stages 0 and 2 train, moved from where it starts."""
    student, _ = convert(tiny_teacher())
    recovery = RecoveryModel(student, RecoverySettings(lora_rank=2, lora_alpha=6.0, **settings))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if is_new_parameter(name) or is_lora_factor(name):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return recovery


def random_batch() -> Any:
    weight = torch.rand(2, 20, generator=torch.Generator().manual_seed(4))
    factor = torch.rand(2, 20, generator=torch.Generator().manual_seed(9))
    return Batch(IDS, weight, IDS > 0, ("text",) * len(IDS), factor)


def factors_of(recovery: RecoveryModel) -> dict[str, tuple[Any, Any]]:
    """Return A and B by the name of the weight that they belong to."""
    found = {plain_name(name): p for name, p in recovery.student.named_parameters() if is_lora_factor(name)}
    names = [name.removesuffix(".lora_A.weight") for name in found if name.endswith(".lora_A.weight")]
    return {
        f"{name}.weight": (found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"]) for name in names
    }


def merged(recovery: RecoveryModel) -> Any:
    """Return a teacher of transformers whose weights are those with the factors."""
    teacher = tiny_teacher()
    with torch.no_grad():
        for name, (a, b) in factors_of(recovery).items():
            teacher.get_parameter(name).add_(b @ a, alpha=recovery.lora_scale)
    return teacher


def test_losses_and_gradients_are_those_of_the_teacher_with_its_factors() -> None:
    recovery = recovery_of(cross_entropy_weight=0.7, kl_weight=0.4, kl_temperature=2.0)
    stage = TeacherTuningStage(recovery, TeacherTuningSettings(steps=1))
    batch = random_batch()
    measured = stage.backward(batch, WORKERS)

    teacher = merged(recovery)
    logits = teacher(IDS).logits[:, :-1]
    original = tiny_teacher()(IDS).logits[:, :-1].detach()
    weight, factor = batch.loss_weight[:, 1:], batch.kl_factor[:, 1:]
    plain = F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="none").view(2, -1)
    divergence = F.kl_div(
        (logits / 2).log_softmax(-1), (original / 2).log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    cross_entropy = (weight * plain).sum() / weight.sum()
    kl = (weight * factor * divergence).sum() * 4 / weight.sum()
    expected = 0.7 * cross_entropy + 0.4 * kl
    torch.autograd.backward(expected)
    assert_near(measured["loss"], expected, 1e-5)
    assert_near(measured["cross_entropy"], cross_entropy, 1e-5)
    assert_near(measured["kl"], kl, 1e-5)
    assert kl > 0.01
    for name, (a, b) in factors_of(recovery).items():
        gradient = recovery.lora_scale * teacher.get_parameter(name).grad
        assert_near(a.grad, b.T @ gradient, 1e-4, name)
        assert_near(b.grad, gradient @ a.T, 1e-4, name)
    for name, parameter in recovery.student.named_parameters():
        assert (parameter.grad is not None) == is_lora_factor(name), name


@pytest.mark.parametrize("full_targets", [None, ("up_proj",)])
def test_nothing_else_trains(full_targets: Any) -> None:
    recovery = recovery_of(full_targets=full_targets)
    student = recovery.student
    stage = TeacherTuningStage(recovery, TeacherTuningSettings(steps=1, learning_rate=0.3))
    (group,) = stage.parameter_groups()
    assert group["peak"] == 0.3
    factors = {id(p) for name, p in student.named_parameters() if is_lora_factor(name)}
    assert {id(p) for p in group["params"]} == factors
    assert len(factors) == 2 * 4 * 2
    before = {name: p.clone() for name, p in student.named_parameters()}
    optimizer = torch.optim.AdamW(group["params"], lr=0.01)
    for _ in range(2):
        stage.backward(random_batch(), WORKERS)
        optimizer.step()
        student.zero_grad()
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) != is_lora_factor(name), name
    assert all(attention.is_linear for attention in student.attention_modules())

    AttentionTransferStage(student, AttentionTransferSettings())
    names = {name for name, p in student.named_parameters() if p.requires_grad}
    assert names == {name for name in before if is_new_parameter(name)}
    assert trained(student).keys() == names | {name for name in before if is_lora_factor(name)}
    RecoveryStage(recovery, RecoverySettings(), 20)
    names = {name for name, p in student.named_parameters() if p.requires_grad}
    assert names == trained(student).keys() | {name for name in before if is_trained_in_full(name)}


def test_stage_1_fits_the_tuned_teacher() -> None:
    recovery = recovery_of()
    stage = AttentionTransferStage(recovery.student, AttentionTransferSettings())
    found = stage.backward(SimpleNamespace(input_ids=IDS), WORKERS)["layer_losses"]

    expected_student, _ = convert(merged(recovery))
    untuned_student, _ = convert(tiny_teacher())
    parameters = dict(recovery.student.named_parameters())
    for student in (expected_student, untuned_student):
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if is_new_parameter(name):
                    parameter.copy_(parameters[name])
    expected = attention_transfer_losses(expected_student, IDS, gradient_scale=1.0)
    assert_near(found, expected, 1e-4)
    for name, parameter in expected_student.named_parameters():
        gradient = parameters[name].grad if is_new_parameter(name) else None
        assert (parameter.grad is None) == (gradient is None), name
        if parameter.grad is not None and gradient is not None:
            assert_near(gradient, parameter.grad, 1e-3, name)
    assert all(p.grad is None for name, p in parameters.items() if is_lora_factor(name))
    untuned = attention_transfer_losses(untuned_student, IDS)
    assert (found - untuned).abs().max() > 0.01 * untuned.max()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, module_patch: pytest.MonkeyPatch) -> TinyRun:
    place = tmp_path_factory.mktemp("runs")
    on_one_processor(module_patch, place / "cache")
    tiny = TinyRun(place)
    tiny("whole", **TUNED)
    return tiny


@pytest.fixture
def whole(run: TinyRun) -> Path:
    """The student of a run of three stages that nothing interrupted."""
    return run.place / "whole"


def stop(run: TinyRun, out: str, stage: int, step: int, number: int, **overrides: Any) -> None:
    """Send this process a signal after a step."""

    def progress(title: str, done: int, total: int, shown: Any = None) -> None:
        if title.startswith(f"stage {stage}:") and done == step:
            os.kill(os.getpid(), number)

    run(out, progress=progress, **(TUNED | overrides))


def stopped_at(run: TinyRun, out: str, stage: int, step: int, **overrides: Any) -> TrainingState:
    """Interrupt a run after a step and return its checkpoint."""
    with pytest.raises(KeyboardInterrupt):
        stop(run, out, stage, step, signal.SIGINT, **overrides)
    newest = list_checkpoints(run.place / f"{out}.training" / "checkpoints")[0]
    assert newest.name == f"stage{stage}-step-{step:08d}"
    return load_checkpoint(newest)


def assert_finished(run: TinyRun, out: str, whole: Path) -> None:
    assert_same_student(run.place / out, whole)
    mine, theirs = (without_measurements(read_log(path / LOG)) for path in (run.place / out, whole))
    assert mine == theirs


@pytest.mark.parametrize(("stage", "step"), [(0, 1), (0, 5), (0, 6), (1, 1), (1, 6), (2, 1), (2, 5)])
def test_a_run_goes_on_where_it_was(run: TinyRun, whole: Path, stage: int, step: int) -> None:
    out = f"stopped {stage} {step}"
    state = stopped_at(run, out, stage, step)
    is_factor = [is_lora_factor(name) for name in state.parameters]
    assert any(is_factor)
    assert all(is_factor) == (stage == 0)
    assert state.data_index == [0, 12, 24][stage] + 2 * step
    run(out, **TUNED)
    assert_finished(run, out, whole)


@pytest.mark.parametrize(("stage", "step"), [(0, 1), (0, 3), (0, 6), (1, 3), (2, 1)])
def test_kill_9(run: TinyRun, whole: Path, stage: int, step: int) -> None:
    out = f"killed {stage} {step}"
    exit_code = run.in_a_process(lambda: stop(run, out, stage, step, signal.SIGKILL))
    assert exit_code == -signal.SIGKILL
    run(out, **TUNED)
    assert_finished(run, out, whole)


def test_factors_stay_in_stage_1_and_stage_2_goes_on_from_them(run: TinyRun) -> None:
    options: dict[str, Any] = {
        "recovery__learning_rate": 1e-9,
        "recovery__new_parameter_learning_rate": 0,
    }
    first = stopped_at(run, "handed on", 0, 6, **options).parameters
    assert all(t.abs().max() > 1e-3 for name, t in first.items() if ".lora_B" in name)
    second = stopped_at(run, "handed on", 1, 6, **options).parameters
    assert all(torch.equal(second[name], factor) for name, factor in first.items())
    new = {name: t for name, t in second.items() if name not in first}
    assert all(is_new_parameter(name) for name in new)
    last = tensors_of(run("handed on", **TUNED, **options).path)
    for name, tensor in second.items():
        assert_near(last[f"adapter {plain_name(name)}"], tensor, 1e-5, name)


def test_what_the_log_and_the_record_say(run: TinyRun, whole: Path) -> None:
    rows = read_log(whole / LOG)
    assert [(row["stage"], row["step"]) for row in rows] == [(s, n) for s in range(3) for n in range(1, 7)]
    for row in rows[:6]:
        assert row["loss"] == pytest.approx(row["cross_entropy"] + row["kl"], rel=1e-5)
        assert row["tokens"] == 32
        assert row["learning_rate"] <= 1e-3
        assert "gate_saturated_share" not in row
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)  # factors start as nothing
    assert rows[5]["kl"] > 1e-6
    stages = json.loads((whole / "lawcat_run.json").read_text())["stages"]
    assert stages["0"]["steps"] == 6
    assert stages["0"]["tokens"] == stages["0"]["trained_tokens"] == 6 * 32
    assert stages["0"]["first_loss"] == rows[0]["loss"]
    card = (whole / "README.md").read_text()
    assert "in 6 steps, LoRA factors learned these data in the teacher's softmax attention (loss " in card
    titles: set[str] = set()
    run("told", progress=lambda title, *rest: titles.add(title), **TUNED)
    assert {"stage 0: teacher tuning", "stage 1: attention transfer", "stage 2: recovery"} <= titles


def test_without_steps_nothing_is_as_it_would_not_be(run: TinyRun) -> None:
    plain = run("plain").path
    none = run("no steps", teacher_tuning__steps=0, teacher_tuning__learning_rate=0.5).path
    assert_finished(run, "no steps", plain)
    assert [row["stage"] for row in read_log(none / LOG)] == [1] * 6 + [2] * 6
    assert "LoRA factors learned" not in (plain / "README.md").read_text()
    assert "teacher_tuning" not in (plain / "recipe.yaml").read_text()
    tuned = tensors_of(run.place / "whole")
    assert tuned.keys() == tensors_of(plain).keys()
    assert not torch.equal(
        tuned["student model.layers.0.self_attn.feature_map.weight"],
        tensors_of(plain)["student model.layers.0.self_attn.feature_map.weight"],
    )


def test_a_loss_that_is_not_finite(run: TinyRun, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = TeacherTuningStage.backward
    calls: list[int] = []

    def poisoned(self: Any, batch: Any, workers: Any) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == 4:
            layers = self.student.model.layers
            with torch.no_grad():
                # In the linear attention of layer 0 it would show earlier, where nothing runs in this stage.
                layers[0].self_attn.q_conv.weight.fill_(torch.nan)
                layers[1].self_attn.q_proj.lora_A.default.weight.fill_(torch.nan)
        return backward(self, batch, workers)

    with monkeypatch.context() as patch:
        patch.setattr(linearize_module.TeacherTuningStage, "backward", poisoned)
        with pytest.raises(TrainingError, match="stage 0, step 4: the loss is not finite, first in layer 1"):
            run("poisoned", **TUNED)
    run("poisoned", **TUNED)
    assert_finished(run, "poisoned", whole)


def test_the_teacher_of_the_kl_has_no_factors() -> None:
    recovery = recovery_of()
    expected = tiny_teacher().model(IDS).last_hidden_state
    TeacherTuningStage(recovery, TeacherTuningSettings(steps=1))
    assert torch.equal(recovery.teacher_hidden(IDS), expected)
    assert not recovery.teacher_hidden(IDS).requires_grad
    before = copy.deepcopy(recovery.student.state_dict())
    RecoveryStage(recovery, RecoverySettings(), 20)
    assert torch.equal(recovery.teacher_hidden(IDS), expected)
    assert all(torch.equal(t, before[name]) for name, t in recovery.student.state_dict().items())
