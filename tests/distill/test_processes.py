"""Several processes, each with a part of every step's sequences, train as one that has them all."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny_runs import TinyRun, free_port, in_two_processes, on_one_processor, tiny_recipe
from tiny_stages import CPU, Repetition, T, make_stage, make_step, parameters_of, random_batch, train
from torch import Tensor

from comparison import assert_near
from lawcat.cli.linearize import run_linearize
from lawcat.distill.sequence import Batch
from lawcat.distill.trainer import AttentionTransferStage, RecoveryStage, Stage, Workers
from lawcat.distill.training_step import TrainingStep
from lawcat.errors import TrainingError

GRAPH_WARNING = "training goes on without CUDA graphs: "
# Where it is the weight of a batch's first token, which nothing predicts.
MARK = 99.0


class Recording(Repetition):
    """As a graph on a GPU: what it gives lies where the capture has put it, and of all that its function did
    a replay does only what is done to tensors."""

    def __init__(self, step: TrainingStep) -> None:
        self._step = step

    def capture(self, function: Callable[[], Any]) -> None:
        super().capture(function)
        self._output = function()
        for tensor in tensors_of(self._output):
            tensor.fill_(torch.nan)  # a capture computes nothing

    def replay(self) -> Any:
        for place, tensor in zip(tensors_of(self._output), tensors_of(super().replay()), strict=True):
            place.copy_(tensor)
        for parameter in self._step.parameters:
            parameter.grad = torch.full_like(parameter, torch.nan)
        return self._output


class Fails(Repetition):
    def capture(self, function: Callable[[], Any]) -> None:
        function()
        raise RuntimeError("operation not permitted when stream is capturing")


def tensors_of(part: Any) -> Iterator[Tensor]:
    yield from (part.summands, *part.gates.values())


def batches_of(number: int) -> list[Batch]:
    """Return batches of four rows, and one of two. In one no token of the first half counts, and in stage 2
    some carry a state over."""
    made = [random_batch(seed, rows=4, segments=3 if number == 2 and seed % 2 else 1) for seed in range(12)]
    for batch in made:
        batch.is_answer[:, 4::5] = True
    made[5].loss_weight[2:] *= 9.0
    made[7].loss_weight[:2] = 0.0
    return [*made[:10], random_batch(100, rows=2), *made[10:]]


def half(batch: Batch, rank: int) -> Batch:
    rows = len(batch.sources) // 2
    own = slice(rank * rows, (rank + 1) * rows)
    return replace(batch.map(lambda tensor: tensor[own].contiguous()), sources=batch.sources[own])


def stage_of(number: int, device: torch.device = CPU) -> Stage:
    settings = {0: {}, 1: {"gate_penalty": 0.3, "answer_weight": 0.5}, 2: {"gate_penalty": 0.3}}
    return make_stage(number, device, dtype=torch.float32, **settings[number])


def test_which_tokens_weigh() -> None:
    batch, carried = random_batch(1), random_batch(1, segments=3)
    for number, length in ((0, 3 * T), (2, T)):
        stage = make_stage(number)
        assert stage.weight(batch) == batch.loss_weight[:, 1:].sum()
        assert stage.weight(carried) == carried.loss_weight[:, 3 * T - length + 1 :].sum()
    assert make_stage(1).weight(batch) is None


@dataclass(frozen=True)
class Outcome:
    before: dict[str, Tensor]
    measured: list[dict[str, Tensor]]
    after: dict[str, Tensor]
    num_graphs: int
    told: list[str]

    @classmethod
    def of(cls, stage: Stage, step: TrainingStep, batches: list[Batch]) -> Outcome:
        before = parameters_of(stage)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            measured = train(step, batches)
        ours = [str(one.message) for one in told if str(one.message).startswith(GRAPH_WARNING)]
        return cls(before, measured, parameters_of(stage), step.num_graphs, ours)


@functools.cache
def by_one_process(number: int) -> Outcome:
    stage = stage_of(number)
    return Outcome.of(stage, make_step(stage, is_queued=True), batches_of(number))


def train_by_half(folder: Path, number: int, way: str, rank: int) -> None:
    """Train with a half of each batch, and leave in a folder what came of it."""
    stage = stage_of(number)
    make_graph: Any = lambda: Recording(step)  # noqa: E731
    if way in ("not queued", "no graphs"):
        make_graph = None
    if way == "one captures nothing" and rank == 1:
        make_graph = Fails
    workers = Workers(Accelerator(cpu=True))
    step = TrainingStep(stage, workers, is_queued=way != "not queued", make_graph=make_graph)
    if way == "one has no memory" and rank == 1:
        backward = stage.backward

        def full(batch: Batch, workers: Workers) -> dict[str, Tensor]:
            losses = backward(batch, workers)
            if step.num_graphs and batch.input_ids.shape[0] == 1:  # comes once, so it is not replayed
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return losses

        stage.backward = full  # type: ignore[method-assign]
    torch.save(
        Outcome.of(stage, step, [half(batch, rank) for batch in batches_of(number)]), folder / str(rank)
    )


def outcomes(folder: Path) -> list[Outcome]:
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(2)]


def assert_same_training(found: list[Outcome], expected: Outcome, tolerance: float) -> None:
    """Fail unless two processes measured what one did, and have its parameters, both the very same."""
    for outcome in found:
        for i, (mine, theirs) in enumerate(zip(outcome.measured, expected.measured, strict=True)):
            assert mine.keys() == theirs.keys()
            for name in mine.keys() - {"gate_saturated_share", "gate_median_half_life_tokens"}:
                assert_near(mine[name], theirs[name], tolerance, f"{name} of step {i}")
    for name, value in expected.after.items():
        moved = value - expected.before[name]
        assert moved.abs().max() > 0, name
        assert torch.equal(found[0].after[name], found[1].after[name]), name
        # Where a gradient is rounding alone, Adam goes one way or the other.
        assert (found[0].after[name] - value).norm() <= 10 * tolerance * moved.norm(), name


@pytest.mark.parametrize(
    ("number", "way", "graphs", "told"),
    [
        (0, "graphs", (2, 2), ""),
        (1, "graphs", (2, 2), ""),
        (2, "graphs", (3, 3), ""),
        (1, "not queued", (0, 0), ""),
        (2, "not queued", (0, 0), ""),
        (2, "no graphs", (0, 0), ""),
        (2, "one captures nothing", (3, 0), "operation not permitted when stream is capturing"),
        (2, "one has no memory", (3, 0), "there is no memory for them"),
    ],
)
def test_two_processes_train_as_one(
    number: int, way: str, graphs: tuple[int, int], told: str, tmp_path: Path
) -> None:
    in_two_processes(functools.partial(train_by_half, tmp_path, number, way), free_port())
    found = outcomes(tmp_path)
    assert_same_training(found, by_one_process(number), 1e-5)
    assert tuple(outcome.num_graphs for outcome in found) == graphs
    assert found[0].told == []
    assert found[1].told == ([GRAPH_WARNING + told] if told else [])


def spoilt(stage: Stage, what: str) -> Callable[[Batch, Workers], dict[str, Tensor]]:
    """Return the stage's backward, of which, for a batch that is marked, one number is not finite."""
    backward = stage.backward

    def call(batch: Batch, workers: Workers) -> dict[str, Tensor]:
        losses = backward(batch, workers)
        is_marked = batch.loss_weight[0, 0] == MARK
        if what == "loss":
            losses["loss"] = torch.where(is_marked, torch.nan, losses["loss"])
        else:
            parameter = stage.student.model.layers[1].self_attn.decay_gate.bias
            assert parameter.grad is not None
            parameter.grad[-1] += torch.where(is_marked, torch.inf, 0.0)
        return losses

    return call


def train_till_it_breaks(folder: Path, what: str, is_queued: bool, rank: int) -> None:
    stage = stage_of(2)
    if rank == 1:
        stage.backward = spoilt(stage, what)  # type: ignore[method-assign]
    make_graph: Any = (lambda: Recording(step)) if is_queued else None
    workers = Workers(Accelerator(cpu=True))
    step = TrainingStep(stage, workers, is_queued=is_queued, make_graph=make_graph)
    batches = [half(random_batch(seed, rows=4), rank) for seed in range(6)]
    before = Outcome.of(stage, step, batches[:4])
    batches[4].loss_weight[0, 0] = MARK
    batches = batches[4:] if is_queued else batches[4:5]  # one that is not queued ends there
    measured = [step(batch, learning_rate_factor=1.0) for batch in batches]
    assert [one.is_finite() for one in measured] == [False, True][: len(batches)]
    step.compute_gradients(batches[0])
    found = [bool(torch.isfinite(p.grad).all()) for p in step.parameters if p.grad is not None]
    assert len(found) == len(step.parameters)
    assert all(found) == (rank == 0 or what == "loss")
    torch.save((before.after, parameters_of(stage), step.num_graphs), folder / str(rank))


@pytest.mark.parametrize(("what", "is_queued"), [("loss", True), ("gradient", True), ("gradient", False)])
def test_what_is_not_finite_in_one_process_stops_all(what: str, is_queued: bool, tmp_path: Path) -> None:
    in_two_processes(functools.partial(train_till_it_breaks, tmp_path, what, is_queued), free_port())
    for rank in range(2):
        before, after, _ = torch.load(tmp_path / str(rank))
        for name, value in before.items():
            assert torch.equal(after[name], value), name


def exchange(rank: int) -> None:
    workers = Workers(Accelerator(cpu=True))
    assert (workers.count, workers.index, workers.is_main) == (2, rank, rank == 0)
    ours = torch.full((2, 1), rank + 1.0)
    assert workers.add_up(ours) is ours  # all gradients at once: a copy would take as much again
    assert ours.tolist() == [[3.0], [3.0]]
    assert [workers.any(rank == 1), workers.any(False), workers.any(True)] == [True, False, True]


def test_what_processes_exchange() -> None:
    in_two_processes(exchange, free_port())


def wait_for_the_first(rank: int) -> None:
    """Wait for one that does alone what takes longer than an exchange may, as reading text does."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=1))
    workers = Workers(Accelerator(cpu=True))
    if workers.is_main:
        time.sleep(2.5)
    workers.wait()
    assert workers.any(rank == 1)


def test_the_first_process_may_take_its_time() -> None:
    in_two_processes(wait_for_the_first, free_port())


def test_a_run_ends_in_every_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_one_processor(monkeypatch, tmp_path / "cache")
    run = TinyRun(tmp_path)

    def work(rank: int) -> None:
        backward = RecoveryStage.backward
        calls = itertools.count()

        def poisoned(self: Any, batch: Any, workers: Any) -> Any:
            losses = backward(self, batch, workers)
            return losses | {"loss": losses["loss"] * (math.nan if next(calls) == 3 and rank else 1.0)}

        monkeypatch.setattr(RecoveryStage, "backward", poisoned)
        with pytest.raises(TrainingError, match="stage 2, step 4: the loss is not finite"):
            run("poisoned in one")

    in_two_processes(work, free_port())
    assert (tmp_path / "poisoned in one.training" / "checkpoints" / "stage2-step-00000002").is_dir()


def test_the_command_ends_the_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """But not after an error, where one of two may wait in an exchange and the other for its end."""
    on_one_processor(monkeypatch, tmp_path / "cache")
    run, recipe, matrix = TinyRun(tmp_path), tmp_path / "recipe.yaml", tmp_path / "matrix.yaml"
    settings = tiny_recipe(run.text, attention_transfer__steps=1, recovery__steps=0)
    recipe.write_text(settings.to_yaml(), encoding="utf-8")
    matrix.write_text(settings.to_yaml() + "matrix: {plain: {}, per-head: {model.gate: head}}\n", "utf-8")

    def work(rank: int, *, recipe: Path, steps: int = 1, is_ended: bool = True) -> None:
        out, setting = tmp_path / f"{recipe.stem}-{steps}", f"attention_transfer.steps={steps}"
        with contextlib.nullcontext() if is_ended else pytest.raises(TrainingError):
            run_linearize(str(run.teacher), out, str(recipe), [setting], evaluate=True, tensorboard=False)
        assert torch.distributed.is_initialized() != is_ended

    def fails(self: Any, batch: Any, workers: Any) -> Any:
        raise TrainingError("this one does")

    for file in (recipe, matrix):
        in_two_processes(functools.partial(work, recipe=file), free_port())
    assert (tmp_path / "matrix-1" / "per-head").is_dir()
    monkeypatch.setattr(AttentionTransferStage, "backward", fails)
    in_two_processes(functools.partial(work, recipe=recipe, steps=2, is_ended=False), free_port())


def steps_on_a_gpu(folder: Path, number: int, rank: int) -> None:
    """Train with a half of each batch, on a GPU of this process's own."""
    workers = Workers(Accelerator())
    stage = stage_of(number, workers.device)
    step = TrainingStep(stage, workers)
    batches = [half(batch, rank) for batch in batches_of(number)]
    outcome = Outcome.of(stage, step, batches)
    # Neither what is replayed nor what is not has a GPU waited for, nor the question whether to stop.
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in (batches[0], batches[10]):
            step(batch, learning_rate_factor=1.0)
            assert not workers.any(False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.save(outcome, folder / str(rank))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("number", [0, 1, 2])
def test_two_gpus_train_as_one(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAWCAT_BACKEND", "torch")  # whose rounding is that of float32
    in_two_processes(functools.partial(steps_on_a_gpu, tmp_path, number), free_port(), method="spawn")
    found = outcomes(tmp_path)
    monkeypatch.setenv("LAWCAT_CUDA_GRAPHS", "off")
    device = torch.device("cuda", 0)
    stage = stage_of(number, device)
    expected = Outcome.of(stage, make_step(stage, device), batches_of(number))
    assert_same_training(found, expected, 1e-3)
    assert [outcome.num_graphs for outcome in found] == [3 if number == 2 else 2] * 2
    assert [outcome.told for outcome in found] == [[], []]
