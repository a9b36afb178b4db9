"""Steps that are queued, and repeated by graphs: the same as steps that are not; on a CPU by an object that
runs the work again."""

from __future__ import annotations

import copy
import functools
import gc
import json
import math
import os
import signal
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import TinyRun, assert_same_student, free_port, on_one_processor
from tiny_stages import (
    CPU,
    Repetition,
    assert_same_steps,
    make_stage,
    make_step,
    parameters_of,
    random_batch,
    train,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from comparison import assert_near
from lawcat.distill import losses, sources, step_graph, trainer, training_step
from lawcat.distill.sequence import Batch, PackedSequence
from lawcat.distill.step_graph import StepGraphs, graphs_for
from lawcat.distill.trainer import AttentionTransferStage
from lawcat.distill.training_log import read_log
from lawcat.distill.training_step import TrainingStep
from lawcat.errors import ConfigurationError, TrainingError

HAS_GPU = torch.cuda.is_available()


def batches_of(number: int, count: int = 13) -> list[Batch]:
    """Return batches of two shapes, and one of another among them; in stage 2 some carry a state over."""
    made = [random_batch(seed, segments=1 + seed % 2 if number == 2 else 1) for seed in range(count)]
    return [*made[:5], random_batch(100, rows=1), *made[5:]]


def graphs_of(batches: list[Batch]) -> int:
    """Return how many kinds of steps in ``train`` come more than twice."""
    kinds = Counter((batch.input_ids.shape, i % 3 == 0) for i, batch in enumerate(batches))
    many = sum(count > 2 for count in kinds.values())
    assert many >= 2
    return many


@pytest.mark.parametrize("number", [0, 1, 2])
def test_replayed_steps_are_the_steps(number: int) -> None:
    stage = make_stage(number)
    expected = train(make_step(stage, is_queued=True), batches_of(number))
    again = make_stage(number)
    step = make_step(again, is_queued=True, make_graph=Repetition)
    found = train(step, batches_of(number))
    assert_same_steps(found, expected)
    for name, value in parameters_of(again).items():
        assert torch.equal(value, parameters_of(stage)[name]), name
    assert step.num_graphs == graphs_of(batches_of(number))
    assert {"loss", "grad_norm"} <= found[0].keys()
    assert ("gate_saturated_share" in found[0]) == (number > 0)
    assert "gate_saturated_share" not in found[1]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_queued_steps_are_the_steps(number: int) -> None:
    """The fused optimizer differs in roundings only, and so do losses over all tokens and over those used."""
    stage, queued = make_stage(number), make_stage(number)
    before = parameters_of(stage)
    expected = train(make_step(stage), batches_of(number))
    found = train(make_step(queued, is_queued=True), batches_of(number))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert_near(value, theirs[name], 1e-4, name)
    after = parameters_of(queued)
    for name, value in parameters_of(stage).items():
        assert_near(after[name] - before[name], value - before[name], 2e-2, name)
        assert not torch.equal(value, before[name]), name


class Waits(TorchDispatchMode):
    """Finds the operations for which a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        by_mask = name == "aten.index.Tensor" and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        if by_mask or any(
            word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("watches_gates", [False, True])
@pytest.mark.parametrize("segments", [1, 3])
def test_no_step_waits_for_the_gpu(
    number: int, watches_gates: bool, segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_only_used", losses._zeros_for_unused)  # as on a GPU
    step = make_step(make_stage(number), is_queued=True)
    with Waits() as waits:
        assert Tensor.item(torch.ones(())) == 1.0
    assert waits.found
    with Waits() as waits:
        step(random_batch(0, segments=segments), learning_rate_factor=1.0, watches_gates=watches_gates)
    assert waits.found == []


@pytest.mark.parametrize("make_graph", [None, Repetition])
def test_nothing_moves_after_a_number_that_is_not_one(make_graph: Any) -> None:
    stage = make_stage(2)
    step = make_step(stage, is_queued=True, make_graph=make_graph)
    batches = [random_batch(seed) for seed in range(8)]
    train(step, batches[:4])
    before, state = parameters_of(stage), copy.deepcopy(step.state_dict())
    batches[4].loss_weight[0, 3] = math.inf
    measured = [step(batch, learning_rate_factor=1.0) for batch in batches[4:]]
    assert [one.is_finite() for one in measured] == [False, True, True, True]
    for name, value in parameters_of(stage).items():
        assert torch.equal(value, before[name]), name
    assert all(entry["step"] == 4 for entry in state["state"].values())
    assert all(entry["step"] == 4 for entry in step.state_dict()["state"].values())
    # Gradients can be had again, of any batch, and no step is taken with them.
    step.compute_gradients(batches[5])
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in step.parameters)


@pytest.mark.parametrize("was_queued", [False, True])
@pytest.mark.parametrize("is_queued", [False, True])
def test_the_optimizer_goes_on_from_its_state(was_queued: bool, is_queued: bool) -> None:
    one, other = make_stage(1), make_stage(1)
    first = make_step(one, is_queued=was_queued)
    train(first, batches_of(1, 3))
    second = make_step(other, is_queued=is_queued)
    with torch.no_grad():
        for mine, theirs in zip(other.student.parameters(), one.student.parameters(), strict=True):
            mine.copy_(theirs)
    state = copy.deepcopy(first.state_dict())
    assert all(type(group["lr"]) is float and group["fused"] is None for group in state["param_groups"])
    second.load_state_dict(state)
    found = train(second, batches_of(1, 3))
    expected = train(first, batches_of(1, 3))
    for mine, theirs in zip(found, expected, strict=True):
        assert_near(mine["loss"], theirs["loss"], 1e-5)
    if was_queued == is_queued:
        assert_same_steps(found, expected)


def counted(make_graph: Any = Repetition) -> tuple[StepGraphs, list[Tensor]]:
    """Return graphs of a function that counts its calls by where its input lies."""
    seen: list[Tensor] = []

    def function(batch: Batch, flag: bool) -> Tensor:
        seen.append(batch.input_ids)
        return batch.input_ids.sum() * (2 if flag else 1)

    return StepGraphs(function, CPU, make_graph), seen


def test_what_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graph, "_MOST_GRAPHS", 2)
    graphs, seen = counted()
    batches = [random_batch(seed) for seed in range(4)]
    for batch in batches:
        assert graphs(batch) == batch.input_ids.sum()
    assert graphs.num_graphs == 1
    assert [any(t is batch.input_ids for batch in batches) for t in seen] == [True, True, False, False]
    assert seen[2] is seen[3]
    for batch in batches:  # other work on the same shape reads the same place
        assert graphs(batch, True) == 2 * batch.input_ids.sum()
    assert graphs.num_graphs == 2
    assert seen[-1] is seen[2]
    graphs.release()
    assert graphs.num_graphs == 0
    calls = len(seen)
    assert graphs(batches[0]) == batches[0].input_ids.sum()
    assert seen[calls] is batches[0].input_ids
    for rows in (3, 4, 5):  # no more than two
        for seed in range(4):
            batch = random_batch(seed, rows=rows)
            assert graphs(batch) == batch.input_ids.sum()
    assert graphs.num_graphs == 2


def test_a_replayed_step_reads_the_factors_of_its_batch() -> None:
    stage, plain = make_stage(2), make_stage(2)
    batches = [random_batch(seed) for seed in range(5)]
    step = make_step(stage, is_queued=True, make_graph=Repetition)
    train(step, batches[:4])
    train(make_step(plain, is_queued=True), batches[:4])
    factor = batches[4].kl_factor
    assert factor is not None
    twice = replace(batches[4], kl_factor=2 * factor)
    found = [step(batch, learning_rate_factor=0.0).tensors() for batch in (batches[4], twice)]
    assert step.num_graphs == 1
    assert torch.equal(found[0]["cross_entropy"], found[1]["cross_entropy"])
    assert_near(found[1]["kl"], 2 * found[0]["kl"], 1e-5)
    # One without is of another kind, and what it measures is what factors of 1 measure.
    ones = replace(batches[4], kl_factor=torch.ones_like(batches[4].loss_weight))
    measured = [
        step(batch, learning_rate_factor=0.0).tensors()
        for batch in (ones, *[replace(batches[4], kl_factor=None)] * 3)
    ]
    assert_same_steps(measured[1:], measured[:1] * 3)
    assert step.num_graphs == 2


@pytest.mark.parametrize("make_graph", [None, Repetition])
def test_a_step_ends_with_the_last_reference_to_it(
    make_graph: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cycle, its optimizer's memory and its events on a GPU would be there in the next stage."""
    on_one_processor(monkeypatch, tmp_path / "cache")
    made: list[list[weakref.ref[Any]]] = []

    class Watched(TrainingStep):
        def __init__(self, stage: Any, workers: Any) -> None:
            assert [one() for refs in made for one in refs] == [None] * 4 * len(made)
            super().__init__(stage, workers, is_queued=make_graph is not None, make_graph=make_graph)
            watched = (self, self._optimizer, self._ended, self._graphs)
            made.append([weakref.ref(one) for one in watched])

        def release(self) -> None:
            assert (self.num_graphs > 0) == (make_graph is not None)
            super().release()

    monkeypatch.setattr(trainer, "TrainingStep", Watched)
    run = TinyRun(tmp_path)
    gc.collect()
    gc.disable()
    try:
        settings = {"teacher_tuning__steps": 4, "teacher_tuning__batch_sequences": 2}
        run("watched", recovery__carried_segments=0, **settings)
        assert [[one() for one in refs] for refs in made] == [[None] * 4] * 3
    finally:
        gc.enable()


def interrupted(error: Exception) -> Callable[..., Any]:
    """Return what, in the place of gradient clipping, stops a step that has its gradients."""

    def stop(*arguments: Any) -> Any:
        raise error

    return stop


def test_a_capture_that_fails_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(Repetition):
        def capture(self, function: Callable[[], Any]) -> None:
            reason = RuntimeError("operation not permitted when stream is capturing")
            try:  # as torch.cuda.graph, whose end fails as well
                with monkeypatch.context() as patch:
                    patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted(reason))
                    function()
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

    stage, plain = make_stage(2), make_stage(2)
    expected = train(make_step(plain, is_queued=True), batches_of(2))
    step = make_step(stage, is_queued=True, make_graph=Fails)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = train(step, batches_of(2))
    assert [str(warning.message) for warning in told] == [
        "training goes on without CUDA graphs: operation not permitted when stream is capturing"
    ]
    assert step.num_graphs == 0
    assert_same_steps(found, expected)
    for name, value in parameters_of(stage).items():
        assert torch.equal(value, parameters_of(plain)[name]), name


def test_graphs_are_given_up_where_their_memory_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    replaying: list[bool] = []

    class Takes(Repetition):
        def replay(self) -> Any:
            replaying.append(True)
            result = super().replay()
            replaying.clear()
            return result

    stage, plain = make_stage(2), make_stage(2)
    batches = batches_of(2)
    expected = train(make_step(plain, is_queued=True), batches)
    step = make_step(stage, is_queued=True, make_graph=Takes)
    clip = torch.nn.utils.clip_grad_norm_

    def full(*arguments: Any) -> Tensor:
        """There is room for a step or for graphs."""
        if step.num_graphs and not replaying:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", full)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = train(step, batches)
    assert [str(warning.message) for warning in told] == [
        "training goes on without CUDA graphs: there is no memory for them"
    ]
    assert step.num_graphs == 0
    assert_same_steps(found, expected)
    for name, value in parameters_of(stage).items():
        assert torch.equal(value, parameters_of(plain)[name]), name
    # Without graphs there is nothing to give up.
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        step(batches[0], learning_rate_factor=1.0)


def test_graphs_go_where_they_would_be_in_the_way() -> None:
    stage = make_stage(1)
    step = make_step(stage, is_queued=True, make_graph=Repetition)
    for work in (
        lambda: step.load_state_dict(step.state_dict()),  # what they would write to is replaced
        lambda: step.compute_gradients(random_batch(0)),  # takes the memory that they hold
    ):
        train(step, batches_of(1))
        assert step.num_graphs
        work()
        assert step.num_graphs == 0


def test_training_on_a_cpu_leaves_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Tensor, "pin_memory", interrupted(AssertionError("memory was pinned")))
    step = make_step(make_stage(1), is_queued=True, make_graph=Repetition)
    train(step, batches_of(1))
    assert step.num_graphs


def test_where_there_are_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    assert graphs_for(gpu) is not None
    assert graphs_for(CPU) is None
    for value, has_graphs in (("off", False), ("auto", True), ("", True)):
        monkeypatch.setenv("LAWCAT_CUDA_GRAPHS", value)
        assert (graphs_for(gpu) is not None) == has_graphs
    monkeypatch.setenv("LAWCAT_CUDA_GRAPHS", "on")
    with pytest.raises(ConfigurationError, match="LAWCAT_CUDA_GRAPHS='on' is neither 'auto' nor 'off'"):
        graphs_for(CPU)


@pytest.fixture(scope="module")
def run(module_patch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    on_one_processor(module_patch, tmp_path_factory.mktemp("cache"))
    return TinyRun(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train as on a GPU, where a step is looked at when the next one is queued."""
    step = functools.partial(TrainingStep, is_queued=True, make_graph=Repetition)
    monkeypatch.setattr(trainer, "TrainingStep", step)


def test_a_whole_run_queued(run: TinyRun, queued: None, monkeypatch: pytest.MonkeyPatch) -> None:
    queued_run = run("queued").path
    rows = read_log(queued_run / "training_log.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [(s, i) for s in (1, 2) for i in range(1, 7)]
    monkeypatch.undo()
    on_one_processor(monkeypatch, run.place / "cache")
    expected = read_log(run("plain").path / "training_log.jsonl")
    for mine, theirs in zip(rows, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name in ("loss", "grad_norm", "learning_rate", "tokens"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3), name


def test_a_queued_step_is_given_its_own_time(
    run: TinyRun, queued: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at when the next one, which may take any time to be queued, has been queued, too."""
    now = 0.0
    backward = AttentionTransferStage.backward
    durations = [8.0, 1.0, 2.0, 0.5, 4.0, 0.25]
    left = iter(durations)

    def takes_long(self: Any, batch: Any, workers: Any) -> Any:
        nonlocal now
        now += next(left)
        return backward(self, batch, workers)

    monkeypatch.setattr(training_step, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(AttentionTransferStage, "backward", takes_long)
    out = run("timed", recovery__steps=0).path
    rows = read_log(out / "training_log.jsonl")
    assert [row["seconds"] for row in rows] == durations
    assert [row["tokens_per_s"] for row in rows] == [32 / seconds for seconds in durations]
    stage = json.loads((out / "lawcat_run.json").read_text())["stages"]["1"]
    assert stage["seconds"] == sum(durations)
    assert stage["tokens_per_s"] == round(5 * 32 / sum(durations[1:]))


def test_a_queued_run_resumes(run: TinyRun, queued: None) -> None:
    tuning = {"teacher_tuning__steps": 6, "teacher_tuning__batch_sequences": 2}
    whole = run("queued whole", **tuning).path

    def stop(title: str, step: int, *rest: Any) -> None:
        if (title[:7], step) in {("stage 0", 3), ("stage 1", 3), ("stage 2", 4)} - stopped:
            stopped.add((title[:7], step))
            os.kill(os.getpid(), signal.SIGINT)

    stopped: set[tuple[str, int]] = set()
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run("queued in parts", progress=stop, **tuning)
    assert len(stopped) == 3
    assert_same_student(run("queued in parts", **tuning).path, whole)
    rows = read_log(run.place / "queued in parts" / "training_log.jsonl")
    assert [row["step"] for row in rows] == [*range(1, 7)] * 3


def with_factors(function: Callable[..., PackedSequence]) -> Callable[..., PackedSequence]:
    """Return a function whose sequences have a factor of KL that differs from token to token."""

    def call(tokens: Any, source: str) -> PackedSequence:
        return replace(function(tokens, source), kl_factor=(tokens % 3).astype(np.float32))

    return call


def test_two_processes_queue_their_steps(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "TrainingStep", functools.partial(TrainingStep, is_queued=True))
    monkeypatch.setattr(sources, "_plain_sequence", with_factors(sources._plain_sequence))
    options = {"attention_transfer__steps": 3, "recovery__steps": 3, "recovery__carried_sequences": 2}
    one = run("queued by one", **options).path
    run.in_two_processes(lambda rank: run("queued by two", **options), free_port())
    rows = [read_log(path / "training_log.jsonl") for path in (one, run.place / "queued by two")]
    assert len(rows[0]) == 6
    for mine, theirs in zip(*rows, strict=True):
        for name in ("loss", "grad_norm", "tokens", *({"kl"} & mine.keys())):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert any("kl" in row for row in rows[0])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("loss", "loss is not finite, first in layer 1"),
        ("gradient", "gradient is not finite in model.layers.0"),
    ],
)
def test_a_queued_run_says_where_a_number_is_not_one(
    what: str, message: str, run: TinyRun, queued: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = AttentionTransferStage.backward
    calls: list[int] = []

    def poisoned(self: Any, batch: Any, workers: Any) -> Any:
        calls.append(1)
        layers = self.student.model.layers
        if what == "loss" and len(calls) == 4:
            with torch.no_grad():
                layers[1].self_attn.q_conv.weight.fill_(torch.nan)
        measured = backward(self, batch, workers)
        if what == "gradient" and len(calls) >= 4:
            layers[0].self_attn.q_conv.weight.grad.fill_(torch.inf)
        return measured

    monkeypatch.setattr(AttentionTransferStage, "backward", poisoned)
    with pytest.raises(TrainingError, match=f"stage 1, step 4: the {message}"):
        run(f"queued and poisoned {what}")
    folder = Path(run.place / f"queued and poisoned {what}.training")
    assert len(read_log(folder / "training_log.jsonl")) == 3
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["stage1-step-00000002"]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_steps_by_cuda_graphs_on_a_gpu(number: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAWCAT_BACKEND", backend)
    device = torch.device("cuda", 0)
    found: dict[str, Any] = {}
    for way in ("off", "auto"):
        monkeypatch.setenv("LAWCAT_CUDA_GRAPHS", way)
        stage = make_stage(number, device)
        before = parameters_of(stage)
        step = make_step(stage, device)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            measured = train(step, batches_of(number))
        assert step.num_graphs == (0 if way == "off" else graphs_of(batches_of(number)))
        found[way] = measured, parameters_of(stage)
    for mine, theirs in zip(found["auto"][0], found["off"][0], strict=True):
        for name, value in theirs.items():
            assert_near(mine[name], value, 0.02, name)
    for name, value in found["off"][1].items():
        moved = value - before[name]
        assert moved.abs().max() > 0, name
        # Where a gradient is rounding alone, Adam goes one way or the other.
        assert (found["auto"][1][name] - value).norm() < 0.2 * moved.norm(), name


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_a_capture_that_fails_on_a_gpu() -> None:
    device = torch.device("cuda", 0)
    present = torch.cuda.current_stream(device)

    def waits(batch: Batch, flag: bool) -> Tensor:
        return batch.input_ids.sum() + int(batch.input_ids.max().item())

    graphs = StepGraphs(waits, device, graphs_for(device))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for seed in range(4):
            ids = random_batch(seed).input_ids
            assert graphs(random_batch(seed)).item() == ids.sum() + ids.max()
    assert [str(warning.message)[:38] for warning in told] == ["training goes on without CUDA graphs: "]
    assert "capturing" in str(told[0].message)
    assert torch.cuda.current_stream(device) == present


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_what_a_gpu_takes_is_what_is_told() -> None:
    """Also where the CPU looks late, and where it was late to queue a step."""
    device = torch.device("cuda", 0)
    step = make_step(make_stage(1, device), device)
    for _ in range(4):
        step(random_batch(0), learning_rate_factor=1.0)
    torch.cuda.synchronize()
    began = time.perf_counter()
    first = [step(random_batch(0), learning_rate_factor=1.0) for _ in range(3)]
    torch.cuda.synchronize()
    worked = time.perf_counter() - began
    time.sleep(1.0)
    late = step(random_batch(0), learning_rate_factor=1.0)
    told = [one.seconds() for one in (*first, late)]
    assert sum(told[1:3]) < worked < told[3]
    assert 1.0 <= told[3] < 1.0 + 2 * worked + 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("segments", [1, 3])
def test_no_step_waits_on_a_gpu(number: int, segments: int) -> None:
    device = torch.device("cuda", 0)
    step = make_step(make_stage(number, device), device)
    for _ in range(4):
        step(random_batch(0, segments=segments), learning_rate_factor=1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for is_replayed in (True, False):
            step(random_batch(1, rows=2 if is_replayed else 3, segments=segments), learning_rate_factor=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
