"""Training steps as CUDA graphs: one launch for a whole step, instead of ten thousand.

A small model's step takes the GPU less time than Python takes to launch its kernels. A graph repeats what it
has captured at the same addresses, so a batch is first copied to where the captured one lay.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lawcat.distill.sequence import Batch
from lawcat.errors import ConfigurationError
from lawcat.inference.decode_graph import CudaGraph
from lawcat.memory import free_memory
from lawcat.ops import choose_backend

ENVIRONMENT_VARIABLE = "LAWCAT_CUDA_GRAPHS"

# The first steps of a shape run as they are: kernels are compiled then, libraries make their handles, and the
# optimizer its state.
STEPS_BEFORE_CAPTURE = 2
# Each holds its gradients and results, and a graph of tens of thousands of launches.
_MOST_GRAPHS = 16


class Graph(Protocol):
    """What repeats a function's work; ``CudaGraph`` is one."""

    def capture(self, function: Callable[[], Any]) -> None:
        """Take note of what the function does; whether that is done now as well is open."""

    def replay(self) -> Any:
        """Do it, and return what the function returned."""


def graphs_for(device: torch.device) -> Callable[[], Graph] | None:
    """Return what makes graphs of training steps, or None where steps run as they are.

    The environment variable ``LAWCAT_CUDA_GRAPHS=off`` turns graphs off.

    Args:
        device: Where training runs.

    Raises:
        ConfigurationError: where the variable is neither ``auto`` nor ``off``.
    """
    wanted = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if wanted not in ("auto", "off"):
        raise ConfigurationError(f"{ENVIRONMENT_VARIABLE}={wanted!r} is neither 'auto' nor 'off'.")
    if wanted == "off" or device.type != "cuda":
        return None
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(device, pool=pool)


@dataclass(frozen=True)
class _Captured:
    graph: Graph
    batch: Batch


class StepGraphs:
    """Runs a function of a batch, and from a graph once batches of a shape have come a few times.

    Where a call runs out of memory that graphs hold, they are given up and it runs again. Of several
    processes one may do so, or fail to capture, and the others not: they do not know of it.

    Args:
        function: Its work must be the same for all batches of a shape, and may be begun anew where memory has
            run out; so it has no exchange with other processes, which would wait for it. Its result is one
            of tensors, which the next call may write over.
        device: Where the batch goes.
        make_graph: Makes an unused graph, of one pool of memory with those before; None runs the function.

    Example:
        >>> graphs = StepGraphs(lambda batch, flag: batch.input_ids.sum(), torch.device("cpu"))
        >>> ids = torch.tensor([[1, 2]])
        >>> graphs(Batch(ids, torch.ones(1, 2), ids > 1, ("text",)))
        tensor(3)
    """

    def __init__(
        self,
        function: Callable[[Batch, bool], Any],
        device: torch.device,
        make_graph: Callable[[], Graph] | None = None,
    ) -> None:
        self._function, self._device, self._make_graph = function, device, make_graph
        self._seen: Counter[object] = Counter()
        self._captured: dict[object, _Captured] = {}
        self._inputs: dict[object, Batch] = {}

    def __call__(self, batch: Batch, flag: bool = False) -> Any:
        """Return the function's result for a batch, which may be on the CPU.

        Args:
            batch: What the function reads.
            flag: Handed to the function; its work may be another for each of the two.
        """
        shape = tuple((name, t.shape, t.dtype) for name, t in batch.tensors().items())
        backend = choose_backend("auto", self._device.type)
        key = shape, flag, backend
        captured = self._captured.get(key)
        # The definition of the operator, token by token, is too much of a graph.
        if captured is None and backend != "reference" and self._is_due(key):
            captured = self._capture(key, self._static_batch(shape, batch), flag)
        if captured is None:
            self._seen[key] += 1
            return self._run(batch, flag)
        _copy(batch, captured.batch)
        return captured.graph.replay()

    @property
    def num_graphs(self) -> int:
        """How many graphs there are."""
        return len(self._captured)

    def release(self) -> None:
        """Forget all graphs and the memory that they hold."""
        if self._captured and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # one may be at work in that memory
        self._captured.clear()
        self._inputs.clear()
        self._seen.clear()

    def _run(self, batch: Batch, flag: bool) -> Any:
        try:
            return self._function(_on_device(batch, self._device), flag)
        except torch.OutOfMemoryError:
            if not self._captured:
                raise
        # Graphs keep what a step takes, and a step beside them takes as much again. Not in the handler: its
        # error holds what that step had made.
        self._make_graph = None
        self.release()
        free_memory()
        warnings.warn("training goes on without CUDA graphs: there is no memory for them", stacklevel=4)
        return self._function(_on_device(batch, self._device), flag)

    def _is_due(self, key: object) -> bool:
        if self._make_graph is None or len(self._captured) >= _MOST_GRAPHS:
            return False
        return self._seen[key] >= STEPS_BEFORE_CAPTURE

    def _static_batch(self, shape: object, batch: Batch) -> Batch:
        """Return the tensors that every graph of a shape reads."""
        if shape not in self._inputs:
            # Its values now: what is captured may be looked at, as an index, before the first copy.
            self._inputs[shape] = batch.map(lambda tensor: tensor.to(self._device, copy=True))
        return self._inputs[shape]

    def _capture(self, key: object, batch: Batch, flag: bool) -> _Captured | None:
        assert self._make_graph is not None
        graph = self._make_graph()
        try:
            graph.capture(lambda: self._function(batch, flag))
        except Exception as error:  # what is captured may not wait for the GPU, for one
            self._make_graph = None
            # The end of a capture that failed fails, too, and does not say why.
            warnings.warn(f"training goes on without CUDA graphs: {error.__context__ or error}", stacklevel=4)
            return None
        self._captured[key] = _Captured(graph, batch)
        return self._captured[key]


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, which is not waited for."""
    return _pinned(tensor, device).to(device, non_blocking=True)


def _on_device(batch: Batch, device: torch.device) -> Batch:
    return batch.map(lambda tensor: on_device(tensor, device))


def _copy(batch: Batch, to: Batch) -> None:
    places = to.tensors()
    for name, tensor in batch.tensors().items():
        places[name].copy_(_pinned(tensor, places[name].device), non_blocking=True)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor in memory that the device, a GPU, reads by itself: its copy is not waited for."""
    return tensor.pin_memory() if (tensor.device.type, device.type) == ("cpu", "cuda") else tensor
