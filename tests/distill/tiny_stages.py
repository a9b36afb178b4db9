"""Steps of the stages of a tiny student, and graphs of them on a CPU: objects that run the work again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lawcat.convert.initialize import cast_teacher_weights, convert, is_new_parameter
from lawcat.distill.recipe import AttentionTransferSettings, RecoverySettings, TeacherTuningSettings
from lawcat.distill.recovery import RecoveryModel
from lawcat.distill.sequence import Batch
from lawcat.distill.trainer import (
    AttentionTransferStage,
    RecoveryStage,
    Stage,
    TeacherTuningStage,
    Workers,
)
from lawcat.distill.training_step import TrainingStep
from tiny_teachers import random_ids, tiny_teacher

CPU = torch.device("cpu")
T = 16


class OneProcess:
    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, device: torch.device) -> None:
        self.device = device


class Repetition:
    """A graph that runs the function again."""

    def capture(self, function: Callable[[], Any]) -> None:
        self.function = function

    def replay(self) -> Any:
        return self.function()


def make_stage(
    number: int, device: torch.device = CPU, *, dtype: torch.dtype = torch.bfloat16, **settings: Any
) -> Stage:
    """Return a stage of a tiny student; on a GPU the teacher's weights have the dtype."""
    student, _ = convert(tiny_teacher(tie_word_embeddings=True))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if is_new_parameter(name):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    student.to(device)
    if device.type == "cuda":
        cast_teacher_weights(student, dtype)
    if number == 1:
        return AttentionTransferStage(student, AttentionTransferSettings(**settings))
    if number == 0:
        model = RecoveryModel(student, RecoverySettings(lora_rank=2, carried_segments=2))
        with torch.no_grad():  # from the teacher itself, where the divergence would be rounding
            for name, parameter in student.named_parameters():
                if ".lora_" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return TeacherTuningStage(model, TeacherTuningSettings(**settings))
    recovery = RecoverySettings(lora_rank=2, carried_segments=2, **settings)
    return RecoveryStage(RecoveryModel(student, recovery), recovery, T)


def make_step(stage: Stage, device: torch.device = CPU, **options: Any) -> TrainingStep:
    return TrainingStep(stage, Workers(OneProcess(device)), **options)


def random_batch(seed: int, rows: int = 2, segments: int = 1) -> Batch:
    ids = random_ids(rows, T * segments, seed=seed)
    weight = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    weight[:, ::5] = 0.0
    factor = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed + 1))
    factor[:, ::3] = 0.0
    return Batch(ids, weight, torch.zeros(ids.shape, dtype=torch.bool), ("text",) * rows, factor)


def train(step: TrainingStep, batches: list[Batch]) -> list[dict[str, Tensor]]:
    """Return what each step measured, looked at after all are queued."""
    measured = [
        step(batch, learning_rate_factor=0.5 + 0.05 * i, watches_gates=i % 3 == 0)
        for i, batch in enumerate(batches)
    ]
    return [one.tensors() for one in measured]


def parameters_of(stage: Stage) -> dict[str, Tensor]:
    return {name: p.detach().cpu().clone() for name, p in stage.student.named_parameters() if p.requires_grad}


def assert_same_steps(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert torch.equal(value, theirs[name]), (i, name)
