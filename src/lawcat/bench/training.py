"""Steps of the two training stages, by distillation's own functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lawcat.bench.limits import timed_backends
from lawcat.bench.models import Pair
from lawcat.bench.operators import Progress, relative_error
from lawcat.bench.record import Record
from lawcat.bench.timing import Failure, failure_reason, time_by_turns
from lawcat.distill.recipe import AttentionTransferSettings, RecoverySettings
from lawcat.distill.recovery import RecoveryModel
from lawcat.distill.sequence import Batch
from lawcat.distill.step_graph import STEPS_BEFORE_CAPTURE
from lawcat.distill.trainer import AttentionTransferStage, RecoveryStage, Stage, Workers
from lawcat.distill.training_step import TrainingStep
from lawcat.memory import free_memory
from lawcat.ops import use_backend
from lawcat.ops.backend import watch_calls

# Tokens of the one sequence whose gradients are compared, since the definition goes token by token.
_CHECKED_TOKENS = 128
# Projections and losses of 16 bits round alike on both sides, the operands of the operator's products do not.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


def measure(
    pair: Pair,
    *,
    tokens: int = 1024,
    batch: int = 16,
    backends: tuple[str, ...] | None = None,
    seconds: float = 2.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Record]:
    """Return what a step of stage 1 and of stage 2 takes: losses, gradients, clipping and the optimizer.

    A backend whose gradients differ from the definition's gets no figure, nor does one in whose place another
    runs. On a GPU a step captures itself as a CUDA graph, as in a training, and replays are timed.

    The student trains on random tokens, so it is of no use afterwards.

    Args:
        pair: Its student trains.
        tokens: Of a sequence.
        batch: Sequences of a step.
        backends: Which of our backends; all when None.
        seconds: About how long a backend may be repeated.
        seed: Of the tokens.
        progress: Called with what is done, how much of it, and of how much.

    Returns:
        A record for each stage and backend; one that could not run says why.
    """
    names = backends or timed_backends()
    device = next(pair.student.parameters()).device
    records = []
    stages: list[tuple[str, Callable[[], Stage]]] = [
        ("training stage 1", lambda: AttentionTransferStage(pair.student, AttentionTransferSettings())),
        ("training stage 2", lambda: _recovery(pair, tokens)),
    ]
    if progress is not None:  # gradients are checked first
        progress(f"training, {pair.name}", 0, len(stages))
    for done, (measurement, make) in enumerate(stages, 1):
        runs: dict[str, _Repeated] = {}
        labels: dict[str, str] = {}
        reasons: dict[str, str] = {}
        errors: dict[str, float] = {}
        try:
            stage = make()
            errors, reasons, labels = _check(
                stage, _random_batch(pair, 1, min(tokens, _CHECKED_TOKENS), device, seed), device, names
            )
            right = tuple(name for name in names if name not in reasons)
            runs = _steps(stage, _random_batch(pair, batch, tokens, device, seed), device, right)
        except Exception as error:
            reasons = dict.fromkeys(names, failure_reason(error))
        timings = time_by_turns(runs, device, seconds=seconds, is_first_call_counted=True)
        replayed = {name for name, run in runs.items() if run.is_replayed}
        runs.clear()  # and with them the graphs, whose memory the next stage may need
        free_memory()
        for name in names:
            record = Record.of(
                timings.get(name, Failure(reasons.get(name, "not run"))),
                measurement=measurement,
                shape=pair.name,
                contender=f"lawcat ({name})",
                is_ours=True,
                tokens=tokens,
                batch=batch,
                num_tokens_done=batch * tokens,
                backend=labels.get(name, name),
                error=errors.get(name),
            )
            is_replay = record.median_s is not None and name in replayed
            records.append(replace(record, uses_cuda_graph=is_replay))
        if progress is not None:
            progress(f"training, {pair.name}", done, len(stages))
    return records


def _recovery(pair: Pair, tokens: int) -> Stage:
    settings = RecoverySettings()
    return RecoveryStage(RecoveryModel(pair.student, settings), settings, tokens)


def _random_batch(pair: Pair, batch: int, tokens: int, device: torch.device, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, pair.student.config.vocab_size, (batch, tokens), generator=generator)
    weights = torch.ones(batch, tokens)
    return Batch(ids, weights, torch.zeros(batch, tokens, dtype=torch.bool), ("random",) * batch).to(device)


def _check(
    stage: Stage, batch: Batch, device: torch.device, backends: tuple[str, ...]
) -> tuple[dict[str, float], dict[str, str], dict[str, str]]:
    """Return by backend the relative errors of all gradients, why one has no figure, and what really ran."""
    expected = _gradients(stage, batch, device, "reference")
    tolerance = _TOLERANCES[stage.student.dtype]
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    labels: dict[str, str] = {}
    for name in backends:
        try:
            with watch_calls() as ran:
                errors[name] = relative_error(_gradients(stage, batch, device, name), expected)
        except Exception as error:
            reasons[name] = failure_reason(error)
            continue
        if not errors[name] <= tolerance:
            reasons[name] = (
                f"wrong: relative error of the gradients {errors[name]:.2g}, allowed {tolerance:.2g}"
            )
        elif text := ran.not_by(name):
            reasons[name] = text
        labels[name] = ran.label() or name
    return errors, reasons, labels


def _gradients(stage: Stage, batch: Batch, device: torch.device, backend: str) -> Tensor:
    """Return the gradients of all that trains, one after the other."""
    trained = [parameter for group in stage.parameter_groups() for parameter in group["params"]]
    with use_backend(backend):
        stage.backward(batch, Workers(OneProcess(device)))
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.cat([gradient.float().flatten() for gradient in found])
    for parameter in trained:
        parameter.grad = None
    return flat


def _steps(
    stage: Stage, batch: Batch, device: torch.device, backends: tuple[str, ...]
) -> dict[str, _Repeated]:
    """Return what does a step, by the name of the backend."""
    step = TrainingStep(stage, Workers(OneProcess(device)))
    return {name: _Repeated(step, batch, name) for name in backends}


class _Repeated:
    """One step of a stage by a backend, again and again."""

    def __init__(self, step: TrainingStep, batch: Batch, backend: str) -> None:
        self._step, self._batch, self._backend = step, batch, backend
        self._is_first, self._is_captured = True, False

    @property
    def is_replayed(self) -> bool:
        """Whether its calls replay a CUDA graph, which may be given up where memory runs out."""
        return self._is_captured and self._step.num_graphs > 0

    def __call__(self) -> object:
        with use_backend(self._backend):
            if not self._is_first:
                return self._run()
            # On a GPU a step is captured when it has run a few times.
            self._is_first, num_graphs = False, self._step.num_graphs
            for _ in range(STEPS_BEFORE_CAPTURE):
                self._run()
            result = self._run()
            self._is_captured = self._step.num_graphs > num_graphs
            return result

    def _run(self) -> object:
        # So low a rate that the student stays where it is, however often the step is repeated.
        measured = self._step(self._batch, learning_rate_factor=1e-6)
        return measured.tensors()["loss"].item()  # as the training log does


class OneProcess:
    """What ``Workers`` asks of accelerate, on a device that the benchmark chose."""

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_for_everyone(self) -> Any:
        """Return at once."""
