"""One step of any stage: gradients, clipping, the optimizer, and what is measured.

On a GPU nothing here waits for it: a step is queued while the one before it runs. Whether losses and
gradients are finite is therefore decided on the GPU, too: after a number that is not one, no step changes a
parameter.

Of several processes each has a part of a step's sequences. What they give is summed in one exchange, after
which all do the same: the numbers are the same everywhere, and so is what is decided by them. A graph repeats
what comes before the exchange, or the whole step where there is none.
"""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lawcat.distill.gate_statistics import GateStatistics
from lawcat.distill.sequence import Batch
from lawcat.distill.step_graph import Graph, StepGraphs, graphs_for, on_device

if TYPE_CHECKING:
    from lawcat.distill.trainer import Stage, Workers

GRADIENT_NORM = "grad_norm"


@dataclass(frozen=True)
class Measured:
    """What a step measured, on its way from the device.

    Args:
        values: All numbers in one tensor, on the CPU once ``arrived`` has returned.
        shapes: Name and shape of what is in it, one after the other.
        num_losses: How many of those decide whether the step is finite.
        arrived: Waits until the numbers are there.
        seconds: Returns how long the step took, from the end of the one before it, once it is done.
    """

    values: Tensor
    shapes: tuple[tuple[str, torch.Size], ...]
    num_losses: int
    arrived: Callable[[], object] = lambda: None
    seconds: Callable[[], float] = lambda: 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Return the numbers by name, on the CPU, once they are there."""
        self.arrived()
        pieces = torch.split(self.values, [math.prod(shape) for _, shape in self.shapes])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes, pieces, strict=True)}

    def is_finite(self) -> bool:
        """Return whether all losses and the gradient are, once they are there."""
        return all(bool(torch.isfinite(t).all()) for t in list(self.tensors().values())[: self.num_losses])


@dataclass(frozen=True)
class _Part:
    """What the sequences of one process among several give.

    Args:
        summands: The gradients of all parameters and the losses, one after the other, float32.
        losses: Name and shape of those in it.
        gates: Gate statistics, which are not exchanged.
    """

    summands: Tensor
    losses: dict[str, torch.Size]
    gates: dict[str, Tensor]


class TrainingStep:
    """Trains a stage, a batch at a time.

    Args:
        stage: What to train.
        workers: The processes that train together.
        is_queued: Whether steps are queued without a look at their outcome; on a GPU when None.
        make_graph: Makes graphs that repeat a step; as ``graphs_for`` says when None.

    Attributes:
        parameters: Those that train.
        is_queued: See above.

    Example:
        >>> step = TrainingStep(stage, workers)  # doctest: +SKIP
        >>> step(batch, learning_rate_factor=0.5).tensors()["loss"]  # doctest: +SKIP
        tensor(0.7139)
    """

    def __init__(
        self,
        stage: Stage,
        workers: Workers,
        *,
        is_queued: bool | None = None,
        make_graph: Callable[[], Graph] | None = None,
    ) -> None:
        self._stage, self._workers = stage, workers
        device = workers.device
        self.is_queued = device.type == "cuda" if is_queued is None else is_queued
        make_graph = make_graph or graphs_for(device)
        settings = stage.settings
        groups = stage.parameter_groups()
        self.parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        # A graph reads the learning rate where it lay when it was captured.
        self._rates = [torch.zeros((), device=device) for _ in groups] if self.is_queued else None
        self._options: dict[str, Any] = {}
        if self.is_queued:
            self._options = {"fused": True, "capturable": make_graph is not None}
        self._optimizer = torch.optim.AdamW(
            [{"params": g["params"], "lr": g["peak"], "peak": g["peak"]} for g in groups],
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            **self._options,
        )
        self._is_broken = torch.zeros((), device=device)
        if self.is_queued:
            # The fused kernel leaves all as it is where this is 1; gradient scaling made it so.
            self._optimizer.found_inf = self._is_broken  # type: ignore[attr-defined]
            self._optimizer._warned_capturable_if_run_uncaptured = True
        self._summands: dict[int, Tensor] = {}
        work = TrainingStep._step if workers.count == 1 else TrainingStep._part
        # By a weak reference: in a cycle, memory and events of a GPU would outlive the stage.
        self._graphs = StepGraphs(partial(work, cast(TrainingStep, weakref.proxy(self))), device, make_graph)
        self._ended = _Moment(device)

    def __call__(self, batch: Batch, *, learning_rate_factor: float, watches_gates: bool = False) -> Measured:
        """Do a step, or queue it, and return what it measures; parameters stay where that is not finite.

        Args:
            batch: This process's sequences, on any device.
            learning_rate_factor: Learning rates over their peaks.
            watches_gates: Whether gate statistics are taken.
        """
        self._set_learning_rates(learning_rate_factor)
        measured: Measured
        if self._workers.count == 1:
            measured = self._graphs(batch, watches_gates)
        else:
            measured = self._exchange(self._graphs(self._with_total_weight(batch), watches_gates))
        values = measured.values
        if not self.is_queued:
            if measured.is_finite():
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)
        elif values.device.type == "cuda":
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values.copy_(measured.values, non_blocking=True)
        else:
            values = values.clone()
        began, self._ended = self._ended, _Moment(self._workers.device)
        seconds = partial(self._ended.seconds_since, began)
        return replace(measured, values=values, arrived=self._ended.wait, seconds=seconds)

    @property
    def num_graphs(self) -> int:
        """How many kinds of steps are replayed."""
        return self._graphs.num_graphs

    def release(self) -> None:
        """Give back the memory of replayed steps; later steps begin anew."""
        self._graphs.release()

    def compute_gradients(self, batch: Batch) -> None:
        """Set the gradients to those of a batch, this process's own, and leave all else as it is."""
        self.release()  # they need the memory that a step takes
        self._optimizer.zero_grad(set_to_none=True)
        self._stage.backward(self._with_total_weight(batch).to(self._workers.device), self._workers)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, the same on any device."""
        state = self._optimizer.state_dict()
        for group in state["param_groups"]:
            group |= {"lr": float(group["lr"]), "fused": None, "capturable": False}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned, also on another device."""
        self.release()  # they write to the state that was
        groups = [{**group, **self._options} for group in state["param_groups"]]
        self._optimizer.load_state_dict({**state, "param_groups": groups})

    def _set_learning_rates(self, factor: float) -> None:
        for index, group in enumerate(self._optimizer.param_groups):
            rate = group["peak"] * factor
            if self._rates is None:
                group["lr"] = rate
            else:
                group["lr"] = self._rates[index].fill_(rate)

    def _with_total_weight(self, batch: Batch) -> Batch:
        """Return the batch with what its losses are divided by, which the other processes have a part in."""
        weight = self._stage.weight(batch) if self._workers.count > 1 else None
        if weight is None:
            return batch
        return replace(batch, total_weight=self._workers.add_up(on_device(weight, self._workers.device)))

    def _step(self, batch: Batch, watches_gates: bool) -> Measured:
        """Do a step of one process: what its graph repeats."""
        return self._update(*self._backward(batch, watches_gates))

    def _part(self, batch: Batch, watches_gates: bool) -> _Part:
        """Do what one of several processes does by itself: what its graph repeats."""
        losses, gates = self._backward(batch, watches_gates)
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = [piece.flatten().float() for piece in (*pieces, *losses.values())]
        size = sum(piece.numel() for piece in flat)
        # One place for all graphs: each would else hold a copy of all gradients. A step runs before any is
        # captured, so that no graph's own memory is meant.
        if size not in self._summands:
            self._summands[size] = torch.empty(size, device=self._workers.device)
        summands = torch.cat(flat, out=self._summands[size])
        self._optimizer.zero_grad(set_to_none=True)
        return _Part(summands, {name: value.shape for name, value in losses.items()}, gates)

    def _exchange(self, part: _Part) -> Measured:
        """Sum what the processes have, and do with it what one does that has all.

        The sum takes the summands' place, and gradients are views of it: a copy would be as large as all that
        trains.
        """
        shapes = [p.shape for p in self.parameters] + [*part.losses.values()]
        summed = torch.split(self._workers.add_up(part.summands), [shape.numel() for shape in shapes])
        pieces = [piece.view(shape) for piece, shape in zip(summed, shapes, strict=True)]
        num_parameters = len(self.parameters)
        for parameter, gradient in zip(self.parameters, pieces[:num_parameters], strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        losses = dict(zip(part.losses, pieces[num_parameters:], strict=True))
        return self._update(losses, part.gates)

    def _backward(self, batch: Batch, watches_gates: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute gradients, and return losses and gate statistics."""
        if self.is_queued:  # what a capture that failed has left
            self._optimizer.zero_grad(set_to_none=True)
        gates = GateStatistics()
        with gates.watching(self._stage.student) if watches_gates else contextlib.nullcontext():
            losses = self._stage.backward(batch, self._workers)
        return {name: value.float() for name, value in losses.items()}, gates.tensors()

    def _update(self, losses: dict[str, Tensor], gates: dict[str, Tensor]) -> Measured:
        """Clip the gradients, move the parameters by them where steps are queued, and return what there is to
        tell."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self._stage.settings.max_grad_norm)
        measured = losses | {GRADIENT_NORM: norm.float()}
        num_losses = len(measured)
        if self.is_queued:
            losses_and_norm = torch.cat([t.flatten() for t in measured.values()])
            is_broken = ~torch.isfinite(losses_and_norm).all()
            self._is_broken.copy_(torch.maximum(self._is_broken, is_broken.float()))
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        measured |= gates
        values = torch.cat([t.flatten() for t in measured.values()])
        return Measured(values, tuple((name, t.shape) for name, t in measured.items()), num_losses)


class _Moment:
    """When a device has done all that is queued by now, by its own clock.

    The CPU's would not do: it queues a step while the one before runs, and where that takes it long, as the
    first of a shape does, the time would count as that of the step before.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()
        self._time = time.perf_counter()

    def wait(self) -> None:
        """Wait until it has come."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: _Moment) -> float:
        """Return the seconds from an earlier moment to this one, which is waited for."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self.wait()
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1000
