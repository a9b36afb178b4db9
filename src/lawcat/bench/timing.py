"""Times of several functions that do the same work, taken by turns."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lawcat.inference.decode_graph import CudaGraph
from lawcat.memory import free_memory

MAX_REPETITIONS = 50
# Below that a median says little, so they are done even where they take longer than the time given, unless
# one alone takes longer.
MIN_REPETITIONS = 3
# Larger than the last cache of any GPU: what the call before left there is gone.
_FLUSH_BYTES = 256 * 2**20

_PROCESS_STATUS, _PROCESS_REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timing:
    """How long a function took.

    Attributes:
        seconds: Each repetition, in the order they ran.
        first_call_s: The first timed call. It compiles what the check before it did not, graphs too.
        peak_memory_bytes: The most memory in use during a call, above what was held before; None where it
            cannot be known.
        uses_cuda_graph: Whether the repetitions replayed a CUDA graph.
    """

    seconds: tuple[float, ...]
    first_call_s: float
    peak_memory_bytes: int | None = None
    uses_cuda_graph: bool = False

    @property
    def median_s(self) -> float:
        """Return the median repetition."""
        return statistics.median(self.seconds)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """Return the first and the third quartile.

        >>> Timing((1.0, 2.0, 3.0, 4.0, 5.0), 1.0).quartiles_s
        (2.0, 4.0)
        """
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


@dataclass(frozen=True)
class Failure:
    """Why a function has no time."""

    reason: str


class _Runner:
    """One function and what it took so far."""

    def __init__(self, function: Callable[[], object], device: torch.device) -> None:
        self.function, self.device = function, device
        self.seconds: list[float] = []
        self.first_call_s = 0.0
        self.peak_memory_bytes: int | None = None
        self.graph: CudaGraph | None = None

    def prepare(self, cuda_graphs: bool, is_first_call_counted: bool) -> float:
        """Make the first calls and return the seconds that one takes once everything is compiled."""
        with PeakMemory(self.device) as first:
            self.first_call_s = self._wall_s()
        with PeakMemory(self.device) as memory:
            warm_s = self._wall_s()
        self.peak_memory_bytes = memory.peak_bytes
        if is_first_call_counted and first.peak_bytes is not None:
            self.peak_memory_bytes = max(first.peak_bytes, memory.peak_bytes or 0)
        if cuda_graphs:
            self._capture()
            warm_s = self._wall_s()
        return warm_s

    def call(self) -> None:
        if self.graph is None:
            self.function()
        else:
            self.graph.replay()

    def _wall_s(self) -> float:
        synchronize(self.device)
        started = time.perf_counter()
        self.call()
        synchronize(self.device)
        return time.perf_counter() - started

    def _capture(self) -> None:
        graph = CudaGraph(self.device)
        graph.warm_up(self.function)
        synchronize(self.device)
        graph.capture(self.function)
        self.graph = graph


def time_by_turns(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    cuda_graphs: bool = False,
    is_cache_cleared: bool = True,
    is_first_call_counted: bool = False,
) -> dict[str, Timing | Failure]:
    """Return the time of each function, one repetition of each in turn, so that all see the same conditions.

    On a GPU events are read around each call, with the cache of the GPU cleared before it; so the time counts
    launches only where they are slower than the work.

    Args:
        functions: By name; each does the whole of what is timed. What they return is dropped.
        device: Where they run.
        seconds: About how long each may take in all, after its first calls.
        cuda_graphs: Capture each function and time replays; one that cannot be captured fails.
        is_cache_cleared: Whether to clear the cache of the GPU.
        is_first_call_counted: Whether the peak of memory is that of the first call too: later ones do not
            show what that allocates and keeps, as a training step that captures itself does.

    Returns:
        By name a time, or why there is none: a function that raises does not stop the others.

    Raises:
        KeyboardInterrupt: on Ctrl-C.

    Example:
        >>> found = time_by_turns({"nothing": lambda: None}, torch.device("cpu"), seconds=0.01)
        >>> len(found["nothing"].seconds) >= 3
        True
    """
    found: dict[str, Timing | Failure] = {}
    runners: dict[str, _Runner] = {}
    repetitions: dict[str, int] = {}
    for name, function in functions.items():
        runner = _Runner(function, device)
        try:
            warm_s = runner.prepare(cuda_graphs, is_first_call_counted)
        except Exception as error:
            found[name] = Failure(failure_reason(error))
            free_memory()
            continue
        runners[name] = runner
        repetitions[name] = num_repetitions(warm_s, seconds)
    is_cuda = device.type == "cuda"
    flush = (
        torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        if is_cuda and is_cache_cleared
        else None
    )
    gc.collect()
    for turn in range(max(repetitions.values(), default=0)):
        for name in [name for name, count in repetitions.items() if turn < count and name in runners]:
            try:
                runners[name].seconds.append(_one(runners[name], flush))
            except Exception as error:
                found[name] = Failure(failure_reason(error))
                del runners[name]
                free_memory()
    for name, runner in runners.items():
        found[name] = Timing(
            tuple(runner.seconds), runner.first_call_s, runner.peak_memory_bytes, runner.graph is not None
        )
    return {name: found[name] for name in functions}


def _one(runner: _Runner, flush: torch.Tensor | None) -> float:
    if runner.device.type != "cuda":
        started = time.perf_counter()
        runner.call()
        synchronize(runner.device)
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    if flush is not None:
        flush.zero_()
    begin.record()
    runner.call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def num_repetitions(one_s: float, seconds: float) -> int:
    """Return how often a call of ``one_s`` seconds is repeated in a time of ``seconds``.

    >>> num_repetitions(0.1, 1.0), num_repetitions(0.9, 1.0), num_repetitions(5.0, 1.0)
    (10, 3, 1)
    """
    if one_s >= seconds:
        return 1
    return min(max(math.floor(seconds / max(one_s, 1e-6)), MIN_REPETITIONS), MAX_REPETITIONS)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was asked to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def failure_reason(error: BaseException) -> str:
    """Return one line on what went wrong.

    >>> failure_reason(ValueError("first line\\nsecond line"))
    'ValueError: first line'
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "out of memory"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


class PeakMemory:
    """The most memory in use inside the context, above what was in use at its start.

    Of a GPU what tensors take; on a CPU what the process takes from the system. Pages that were freed and
    kept by the allocator would count as in use, and what takes them again as nothing: glibc is made to give
    them back.

    Attributes:
        peak_bytes: Known after the context; None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None
        self.peak_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif self._device.type == "cpu":
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):  # another C library
                ctypes.CDLL(None).malloc_trim(0)
            try:
                _PROCESS_REFERENCES.write_text("5")  # makes the peak the present use
                self._before = _status_bytes("VmRSS")
            except OSError:
                self._before = None
        return self

    def __exit__(self, *unused: object) -> None:
        if self._before is None:
            return
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = _status_bytes("VmHWM")
        self.peak_bytes = max(peak - self._before, 0)


def _status_bytes(field: str) -> int:
    for line in _PROCESS_STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_PROCESS_STATUS} has no {field}")
