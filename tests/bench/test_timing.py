"""Times by turns: order, repetitions, failures, memory."""

from __future__ import annotations

import time

import pytest
import torch

from lawcat.bench.limits import Limits
from lawcat.bench.timing import (
    MAX_REPETITIONS,
    Failure,
    PeakMemory,
    Timing,
    failure_reason,
    num_repetitions,
    time_by_turns,
)

CPU = torch.device("cpu")


def test_one_repetition_of_each_in_turn() -> None:
    calls: list[str] = []

    def waits(name: str, seconds: float):
        def run() -> None:
            calls.append(name)
            time.sleep(seconds)

        return run

    found = time_by_turns({"a": waits("a", 0.004), "b": waits("b", 0.01)}, CPU, seconds=0.05)
    assert calls[:4] == ["a", "a", "b", "b"], "first calls"
    turns = calls[4:]
    assert turns[:6] == ["a", "b"] * 3
    a, b = found["a"], found["b"]
    assert isinstance(a, Timing)
    assert isinstance(b, Timing)
    assert 3 <= len(b.seconds) <= 5 < len(a.seconds) <= 12
    assert turns.count("a") == len(a.seconds)
    assert 0.004 <= a.median_s < 0.01 <= b.median_s < 0.03
    low, high = a.quartiles_s
    assert low <= a.median_s <= high
    assert not a.uses_cuda_graph


def test_one_that_fails_does_not_stop_the_others() -> None:
    count = 0

    def fails_later() -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise RuntimeError("at the fourth call\nand more")

    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    found = time_by_turns({"fails": fails, "later": fails_later, "works": lambda: None}, CPU, seconds=0.01)
    assert list(found) == ["fails", "later", "works"]
    assert found["fails"] == Failure("out of memory")
    assert found["later"] == Failure("RuntimeError: at the fourth call")
    assert isinstance(found["works"], Timing)
    assert len(found["works"].seconds) == MAX_REPETITIONS


def test_ctrl_c_is_no_failure() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        time_by_turns({"a": interrupted}, CPU, seconds=0.01)


@pytest.mark.parametrize(
    ("one_s", "expected"), [(2.0, 1), (1.0, 1), (0.99, 3), (0.2, 5), (1e-9, MAX_REPETITIONS)]
)
def test_number_of_repetitions(one_s: float, expected: int) -> None:
    assert num_repetitions(one_s, 1.0) == expected


def test_quartiles_of_few() -> None:
    assert Timing((2.0,), 1.0).quartiles_s == (2.0, 2.0)
    assert Timing((1.0, 3.0), 1.0).quartiles_s == (1.5, 2.5)


def test_reason_without_a_text() -> None:
    assert failure_reason(ZeroDivisionError()) == "ZeroDivisionError"


def test_peak_memory_of_the_process() -> None:
    with PeakMemory(CPU) as memory:
        tensor = torch.ones(16 * 2**20)  # 64 MiB, written
        del tensor
    if memory.peak_bytes is None:
        pytest.skip("this system does not tell")
    assert 50e6 < memory.peak_bytes < 100e6


def test_peak_memory_that_was_in_use_before() -> None:
    """The allocator keeps what is freed: what took it a second time seemed to take nothing."""

    def work() -> None:
        tensors = [torch.ones(8 * 2**10) for _ in range(1000)]  # 32 MB, each too small to be mapped by itself
        del tensors

    for _ in range(2):
        with PeakMemory(CPU) as memory:
            work()
        if memory.peak_bytes is None:
            pytest.skip("this system does not tell")
        assert 25e6 < memory.peak_bytes < 60e6


def test_memory_that_the_first_call_takes_and_keeps() -> None:
    """As a training step's: its optimizer's, its graph's."""
    kept: list[torch.Tensor] = []

    def run() -> None:
        if not kept:
            kept.append(torch.ones(16 * 2**20))  # 64 MiB, written

    peaks = {}
    for is_first_call_counted in (False, True):
        kept.clear()
        found = time_by_turns({"run": run}, CPU, seconds=0.001, is_first_call_counted=is_first_call_counted)[
            "run"
        ]
        assert isinstance(found, Timing)
        peaks[is_first_call_counted] = found.peak_memory_bytes
    if peaks[True] is None:
        pytest.skip("this system does not tell")
    assert peaks[False] < 20e6
    assert 50e6 < peaks[True] < 100e6


def test_what_would_take_far_too_long_is_left_out() -> None:
    limits = Limits(seconds=0.1)
    assert limits.reason("a", 1024) is None
    limits.saw("a", 1024, 0.1)
    assert limits.reason("a", 8192) is None, "linear in the length as far as is known"
    limits.saw("a", 2048, 0.4)
    assert limits.reason("a", 4096) == "would take about 2 s a call; raise --seconds to measure it"
    assert limits.reason("b", 4096) is None
    limits.saw("b", 1024, 0.5)
    limits.saw("b", 2048, 0.4)
    assert limits.reason("b", 1 << 20) is None, "one that gets no slower"
