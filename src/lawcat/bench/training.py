"""Steps of the two training stages, by distillation's own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lawcat.bench.limits import timed_backends
from lawcat.bench.models import Pair
from lawcat.bench.operators import Progress
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
    for done, (measurement, make) in enumerate(stages, 1):
        runs: dict[str, Callable[[], object]] = {}
        reason = "not run"
        try:
            runs = _steps(make(), _random_batch(pair, batch, tokens, device, seed), device, names)
        except Exception as error:
            reason = failure_reason(error)
        timings = time_by_turns(runs, device, seconds=seconds)
        runs.clear()  # and with them the graphs, whose memory the next stage may need
        free_memory()
        for name in names:
            records.append(
                Record.of(
                    timings.get(name, Failure(reason)),
                    measurement=measurement,
                    shape=pair.name,
                    contender=f"lawcat ({name})",
                    is_ours=True,
                    tokens=tokens,
                    batch=batch,
                    num_tokens_done=batch * tokens,
                    backend=name,
                )
            )
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


def _steps(
    stage: Stage, batch: Batch, device: torch.device, backends: tuple[str, ...]
) -> dict[str, Callable[[], object]]:
    """Return what does a step, by the name of the backend."""
    step = TrainingStep(stage, Workers(OneProcess(device)))

    def run() -> object:
        # So low a rate that the student stays where it is, however often the step is repeated.
        return step(batch, learning_rate_factor=1e-6).tensors()["loss"].item()  # as the training log does

    return {name: _with_backend(run, name) for name in backends}


def _with_backend(step: Callable[[], object], name: str) -> Callable[[], object]:
    is_first = True

    def run() -> object:
        nonlocal is_first
        with use_backend(name):
            # On a GPU a step is captured when it has run a few times.
            for _ in range(STEPS_BEFORE_CAPTURE if is_first else 0):
                step()
            is_first = False
            return step()

    return run


class OneProcess:
    """What ``Workers`` asks of accelerate, on a device that the benchmark chose."""

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_for_everyone(self) -> Any:
        """Return at once."""
