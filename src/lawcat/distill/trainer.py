"""The loop that all stages share: data, gradients over processes, clipping, checkpoints, interruption, the
log."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from lawcat.convert.initialize import is_new_parameter
from lawcat.distill.attention_transfer import attention_transfer_losses
from lawcat.distill.checkpoint import TrainingState, capture_rng, restore_rng, save_checkpoint
from lawcat.distill.gate_penalty import GatePenalty
from lawcat.distill.losses import LanguageLosses
from lawcat.distill.mixture import Mixture
from lawcat.distill.recipe import (
    AttentionTransferSettings,
    Recipe,
    RecoverySettings,
    StageSettings,
    TeacherTuningSettings,
)
from lawcat.distill.recovery import RecoveryModel, is_lora_factor
from lawcat.distill.schedule import learning_rate_factor
from lawcat.distill.sequence import Batch
from lawcat.distill.sources import seed_of
from lawcat.distill.text import Progress
from lawcat.distill.training_log import TrainingLog
from lawcat.distill.training_step import Measured, TrainingStep
from lawcat.errors import ConfigurationError, TrainingError
from lawcat.model.modeling_lawcat import LawcatForCausalLM

# Gate statistics read every channel of every token: taken now and then, not at each step.
_GATE_STATISTICS_EVERY = 10
_LONGEST_WAIT = timedelta(days=7)


class Stage(Protocol):
    """One of the stages: what trains, and one step's gradients.

    Attributes:
        number: As logs and checkpoints have it.
        title: What a reader is told.
        uses_softmax: Whether it runs the teacher's softmax attention alone, and so no gates.
        student: What it trains a part of.
    """

    number: int
    title: str
    uses_softmax: bool
    student: LawcatForCausalLM

    @property
    def settings(self) -> StageSettings:
        """The stage's part of the recipe."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups, each with ``params``, a ``name`` and its ``peak`` learning rate."""

    def weight(self, batch: Any) -> Tensor | None:
        """Return the weights of all tokens that train, summed: what the losses are divided by once they are
        summed over the processes, too. None where a loss is no mean over tokens."""

    def backward(self, batch: Any, workers: Workers) -> dict[str, Tensor]:
        """Add this process's gradients and return its losses; both are summed over the processes, later: a
        graph repeats what is done here, so there is no exchange between processes in it."""


# What a step measures of answers: summed over processes, and divided when it is logged.
_RIGHT, _ASKED = "right", "asked"
ANSWER_ACCURACY = "answer_accuracy"


def _measured(losses: LanguageLosses, batch: Batch, num_tokens: int | None = None) -> dict[str, Tensor]:
    """Return weighted means over tokens, ``loss`` and, unless only some are trained, ``cross_entropy`` and
    ``kl``; and of answers' tokens the weight of all and of those that are the likeliest.

    Args:
        losses: Of this process's tokens.
        batch: Those tokens.
        num_tokens: How many at the end of each sequence count; None for all.
    """
    asked = _sum_over(batch.loss_weight * batch.is_answer, num_tokens)
    measured = {"loss": losses.loss.detach(), _RIGHT: losses.right, _ASKED: asked}
    if num_tokens is None:
        measured |= {"cross_entropy": losses.cross_entropy, "kl": losses.kl}
    return measured


def _log_row(values: dict[str, Tensor]) -> dict[str, Any]:
    """Return a step's numbers as they are logged, with the share of answers' tokens that are right."""
    row: dict[str, Any] = {name: value.tolist() for name, value in values.items()}
    right, asked = row.pop(_RIGHT, 0.0), row.pop(_ASKED, 0.0)
    return row | ({ANSWER_ACCURACY: right / asked} if asked else {})


class TeacherTuningStage:
    """Stage 0: the LoRA factors of stage 2 in the teacher's softmax attention; see ``recovery.py``.

    From here on nothing but them trains, until another stage is made.
    """

    number, title, uses_softmax = 0, "teacher tuning", True

    def __init__(self, recovery: RecoveryModel, settings: TeacherTuningSettings) -> None:
        self.student, self.settings = recovery.student, settings
        self._recovery = recovery
        recovery.train_factors()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the LoRA factors."""
        factors = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        return [{"name": "base", "params": factors, "peak": self.settings.learning_rate}]

    def weight(self, batch: Any) -> Tensor:
        """Return the sum of weights."""
        return _sum_over(batch.loss_weight)

    def backward(self, batch: Any, workers: Workers) -> dict[str, Tensor]:
        """Return what ``_measured`` says."""
        losses = self._recovery.losses(
            batch.input_ids,
            batch.loss_weight,
            batch.kl_factor,
            batch.is_answer,
            total_weight=_total_weight(self, batch),
            uses_softmax=self.uses_softmax,
        )
        torch.autograd.backward(losses.loss)
        return _measured(losses, batch)


class AttentionTransferStage:
    """Stage 1; see ``attention_transfer.py``. LoRA factors that stage 0 has left are part of the teacher."""

    number, title, uses_softmax = 1, "attention transfer", False

    def __init__(self, student: LawcatForCausalLM, settings: AttentionTransferSettings) -> None:
        self.student, self.settings = student, settings
        self._penalty = GatePenalty(student, settings.gate_penalty)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(is_new_parameter(name))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the new parameters, the only ones that train here."""
        trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        return [{"name": "new", "params": trained, "peak": self.settings.learning_rate}]

    def weight(self, batch: Any) -> None:
        """Return None: the loss is a mean over sequences, of which each process has as many."""

    def backward(self, batch: Any, workers: Workers) -> dict[str, Tensor]:
        """Return ``loss``, the mean over layers, ``layer_losses`` and, where it counts, ``answer_loss``."""
        share = 1.0 / workers.count
        weight = self.settings.answer_weight or 0.0
        answer_losses: list[Tensor] = []
        with self._penalty.watching():
            losses = attention_transfer_losses(
                self.student,
                batch.input_ids,
                gradient_scale=share,
                penalty=self._penalty,
                answer_weight=weight,
                loss_weight=batch.loss_weight * batch.is_answer if weight else None,
                answer_losses=answer_losses,
            )
        losses = losses * share
        measured = {"loss": losses.mean(), "layer_losses": losses}
        if answer_losses:
            measured["answer_loss"] = torch.stack(answer_losses).mean() * share
        return measured


class RecoveryStage:
    """Stage 2; see ``recovery.py``."""

    number, title, uses_softmax = 2, "recovery", False

    def __init__(self, recovery: RecoveryModel, settings: RecoverySettings, sequence_length: int) -> None:
        self.student, self.settings = recovery.student, settings
        self._sequence_length = sequence_length
        self._recovery = recovery
        self._penalty = GatePenalty(recovery.student, settings.gate_penalty)
        recovery.train_all()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return new parameters and LoRA factors (or the teacher's weights)."""
        return self._recovery.parameter_groups()

    def _is_carried(self, batch: Any) -> bool:
        """Return whether a state is carried over, in longer sequences than the recipe's."""
        is_carried: bool = batch.input_ids.shape[1] > self._sequence_length
        return is_carried

    def weight(self, batch: Any) -> Tensor:
        """Return the sum of weights of those tokens that the gradient reaches."""
        return _sum_over(batch.loss_weight, self._sequence_length if self._is_carried(batch) else None)

    def backward(self, batch: Any, workers: Workers) -> dict[str, Tensor]:
        """Return what ``_measured`` says."""
        length, total_weight = self._sequence_length, _total_weight(self, batch)
        if self._is_carried(batch):
            with self._penalty.watching():
                losses = self._recovery.carried_losses(
                    batch.input_ids, batch.loss_weight, length, batch.is_answer, total_weight=total_weight
                )
                self._backward(losses.loss, workers)
            return _measured(losses, batch, length)
        with self._penalty.watching():
            losses = self._recovery.losses(
                batch.input_ids,
                batch.loss_weight,
                batch.kl_factor,
                batch.is_answer,
                total_weight=total_weight,
            )
            self._backward(losses.loss, workers)
        return _measured(losses, batch)

    def _backward(self, loss: Tensor, workers: Workers) -> None:
        penalty = self._penalty.take(is_mean_over_layers=True)
        torch.autograd.backward(loss + penalty / workers.count)


def _sum_over(weight: Tensor, num_tokens: int | None = None) -> Tensor:
    """Return the sum of weights [B, T] over the tokens that are predicted from one before them.

    Args:
        weight: Of each token.
        num_tokens: How many at the end of each sequence are looked at; None for all.
    """
    first = 1 if num_tokens is None else weight.shape[1] - num_tokens + 1
    return weight[:, first:].sum()


def _total_weight(stage: TeacherTuningStage | RecoveryStage, batch: Any) -> Tensor:
    return stage.weight(batch) if batch.total_weight is None else batch.total_weight


class Workers:
    """The processes that train together, one a device; accelerate started them, or there is just this one."""

    def __init__(self, accelerator: Any) -> None:
        self.device: torch.device = accelerator.device
        self.count: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.is_main: bool = accelerator.is_main_process
        # What GPUs exchange comes after all that they have queued, and the CPU would wait for it. Nor may
        # such an exchange take longer than some minutes, and what the first process does alone may.
        self._between_cpus: Any = None
        if self.count > 1:
            self._between_cpus = torch.distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)

    def add_up(self, tensor: Tensor) -> Tensor:
        """Return a tensor of this process's device when it has become its sum over all processes."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process; no GPU is waited for."""
        if self.count == 1:
            return flag
        number = torch.tensor(int(flag))
        torch.distributed.all_reduce(number, group=self._between_cpus)
        return bool(number)

    def wait(self) -> None:
        """Wait until every process is here, be it for hours, as where the first one reads text."""
        self.any(False)


class Interruption:
    """Ctrl-C or SIGTERM: a training step in hand is finished and saved first; all else stops at once.

    Attributes:
        requested: Whether one of the two came during training.
    """

    def __init__(self) -> None:
        self.requested = False
        self._is_training = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[Interruption]:
        """Within this context the two signals raise KeyboardInterrupt, or wait as ``after_step`` has it."""

        def handle(number: int, frame: FrameType | None) -> None:
            if not self._is_training or (self.requested and number == signal.SIGINT):
                raise KeyboardInterrupt
            self.requested = True
            # Not print(), which may not be entered again when it was interrupted itself.
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")

        previous: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # not the main thread: whoever runs us there has the signals
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[int(number)] = signal.signal(number, handle)
        try:
            yield self
        finally:
            for signal_number, handler in previous.items():
                signal.signal(signal_number, handler)

    @contextlib.contextmanager
    def after_step(self) -> Iterator[None]:
        """Within this context a signal sets ``requested``, and only a second Ctrl-C stops at once."""
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = False
        if self.requested:
            raise KeyboardInterrupt


@dataclass
class StageContext:
    """What a stage needs from the run around it."""

    recipe: Recipe
    recipe_fingerprint: str
    teacher_fingerprint: str
    mixture: Mixture
    first_sequence: int
    checkpoints: Path
    log: TrainingLog | None
    workers: Workers
    interruption: Interruption
    progress: Progress | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def trained(student: LawcatForCausalLM) -> dict[str, Tensor]:
    """Return what training has moved or moves, by name: the parameters that train, and LoRA factors, which
    stage 1 holds as stage 0 has left them."""
    return {name: p for name, p in student.named_parameters() if p.requires_grad or is_lora_factor(name)}


def train_stage(stage: Stage, context: StageContext, resume_from: TrainingState | None) -> None:
    """Run a stage to its end, from its start or from a checkpoint of it.

    Args:
        stage: What to train.
        context: The run around it.
        resume_from: A checkpoint of this stage, already checked against recipe and teacher.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when the state has been saved.
        TrainingError: when a loss or gradient is not finite; the last checkpoint is good.
        ConfigurationError: when the batch cannot be shared out evenly.
    """
    settings, workers = stage.settings, context.workers
    for name in ("batch_sequences", "carried_sequences"):
        count = getattr(settings, name, None)
        if count is not None and count % workers.count:
            raise ConfigurationError(
                f"{name}={count} cannot be shared by {workers.count} processes; make it a multiple."
            )
    student = stage.student
    training_step = TrainingStep(stage, workers)
    start = 0
    if resume_from is not None:
        start = resume_from.step
        with torch.no_grad():
            for name, parameter in trained(student).items():
                parameter.copy_(resume_from.parameters[name])
        training_step.load_state_dict(resume_from.optimizer)
        restore_rng(resume_from.rng)

    losses: list[float] = resume_from.losses if resume_from is not None else []

    def save(step: int) -> None:
        if workers.is_main:
            state = TrainingState(
                stage=stage.number,
                step=step,
                recipe_fingerprint=context.recipe_fingerprint,
                teacher_fingerprint=context.teacher_fingerprint,
                parameters={name: p.detach() for name, p in trained(student).items()},
                optimizer=training_step.state_dict(),
                rng=capture_rng(),
                data_index=_first_sequence(context, settings, step),
                losses=losses[-10:],
                extra=context.extra,
            )
            save_checkpoint(context.checkpoints, state, keep=context.recipe.checkpoint.keep)
        workers.wait()

    def report(step: int, batch: Batch, measured: Measured) -> None:
        """Log a step once it is done, or stop the run there."""
        values = measured.tensors()
        if not measured.is_finite():
            raise _not_finite(training_step, stage, step, values, batch)
        losses.append(values["loss"].item())
        seconds = measured.seconds()
        tokens = batch.input_ids.numel() * workers.count
        row: dict[str, Any] = {
            **_log_row(values),
            "learning_rate": settings.learning_rate * learning_rate_factor(step, settings),
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(workers.device),
        }
        if context.log is not None:
            context.log.write(stage.number, step + 1, row)
        if context.progress is not None:
            answers = {"answers right": row[ANSWER_ACCURACY]} if ANSWER_ACCURACY in row else {}
            shown = {"loss": losses[-1], **answers, "tokens/s": row["tokens_per_s"]}
            context.progress(f"stage {stage.number}: {stage.title}", step + 1, settings.steps, shown)

    requests = [_request(context, settings, step) for step in range(start, settings.steps)]
    queued: deque[tuple[int, Batch, Measured]] = deque()
    with contextlib.ExitStack() as at_end:
        at_end.callback(training_step.release)
        at_end.enter_context(context.interruption.after_step())
        batches = context.mixture.batches(requests, ahead=workers.device.type != "cpu")
        # Not when the last traceback goes: processes that make data would keep this one from its end.
        at_end.enter_context(contextlib.closing(batches))
        for step, batch in enumerate(batches, start):
            is_due = step % _GATE_STATISTICS_EVERY == 0 or step == settings.steps - 1
            measured = training_step(
                batch,
                learning_rate_factor=learning_rate_factor(step, settings),
                # A step that watches gates is captured as a graph of its own.
                watches_gates=is_due and not stage.uses_softmax,
            )
            queued.append((step, batch, measured))
            # While a GPU does a step, the one before it is looked at and the next is queued.
            if len(queued) > int(training_step.is_queued):
                report(*queued.popleft())
            stopping = workers.any(context.interruption.requested)
            is_due = (step + 1) % context.recipe.checkpoint.every_steps == 0
            if is_due or stopping or step + 1 == settings.steps:
                while queued:
                    report(*queued.popleft())
                save(step + 1)
            if stopping:
                raise KeyboardInterrupt


def _request(context: StageContext, settings: StageSettings, step: int) -> tuple[int, int, int]:
    """Return what this process reads in a step: first sequence, how many, and of how many segments."""
    count, num_segments = settings.batch_sequences, 1
    if isinstance(settings, RecoverySettings) and settings.carried_segments:
        rng = random.Random(seed_of(context.recipe.seed, "carried", step))
        if rng.random() < settings.carried_share:
            count = settings.carried_sequences or count
            longest = settings.carried_segments
            doublings = {min(2**power - 1, longest) for power in range(1, longest.bit_length() + 1)}
            num_segments = 1 + rng.choice(sorted(doublings))
    share = count // context.workers.count
    first = _first_sequence(context, settings, step) + context.workers.index * share
    return first, share, num_segments


def _first_sequence(context: StageContext, settings: StageSettings, step: int) -> int:
    """Return the number of a step's first sequence; no two steps share one, be it a long or a short."""
    carried = getattr(settings, "carried_sequences", None) or 0
    return context.first_sequence + step * max(settings.batch_sequences, carried)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: the GPU's, or this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _not_finite(
    training_step: TrainingStep, stage: Stage, step: int, values: dict[str, Tensor], batch: Batch
) -> TrainingError:
    """Return the error of a step whose numbers are not all finite, which names the layer they came from.

    The parameters are still those of that step.
    """
    batch = batch.to(next(stage.student.parameters()).device)
    with stage.student.teacher_mode() if stage.uses_softmax else contextlib.nullcontext():
        where = _first_layer_not_finite(values, stage.student, batch.input_ids)
    what = f"loss is not finite, first in {where}"
    if where is None:
        if training_step.is_queued:  # the gradients are no more there
            training_step.compute_gradients(batch)
        what = f"gradient is not finite{_where_gradient(stage.student)}"
    return TrainingError(
        f"stage {stage.number}, step {step + 1}: the {what}. Checkpoints from before that are kept. The same "
        "recipe would come to the same end: begin anew in another output directory with a lower learning "
        "rate or a smaller max_grad_norm, or with precision: float32."
    )


def _first_layer_not_finite(
    measured: dict[str, Tensor], student: LawcatForCausalLM, input_ids: Tensor
) -> str | None:
    if "layer_losses" in measured:
        linear = [i for i, attention in enumerate(student.attention_modules()) if attention.is_linear]
        finite = torch.isfinite(measured["layer_losses"]).tolist()
        bad = [i for i, is_finite in zip(linear, finite, strict=True) if not is_finite]
        return f"layer {bad[0]}" if bad else None
    if torch.isfinite(measured["loss"]):
        return None
    found: list[int] = []

    def look(index: int) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            if not torch.isfinite(output).all():
                found.append(index)

        return hook

    handles = [layer.register_forward_hook(look(i)) for i, layer in enumerate(student.model.layers)]
    try:
        with torch.no_grad():
            student.model(input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return f"layer {found[0]}" if found else "the output head"


def _where_gradient(student: LawcatForCausalLM) -> str:
    for name, parameter in student.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f" in {name}"
    return ""
