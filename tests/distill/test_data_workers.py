"""Batches from other processes: the same, in order, whatever ends them."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from filelock import FileLock

from lawcat.distill import data_workers
from lawcat.distill import mixture as mixture_module
from lawcat.distill.data_workers import batches_from_processes, num_data_workers
from lawcat.distill.mixture import build_mixture
from lawcat.distill.recipe import Recipe
from lawcat.distill.sequence import Batch
from lawcat.errors import DataError, TrainingError
from tiny_teachers import spelling_tokenizer, write_text

needs_fork = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes are not forked here")


def numbered(first: int, count: int, segments: int) -> Batch:
    """Return a batch that says what was asked for, and by which process it was made."""
    if first == 13:
        raise DataError("unlucky")
    ids = torch.full((count, segments), first)
    return Batch(ids, torch.full((count, segments), float(os.getpid())), ids > 0, ("numbered",) * count)


REQUESTS = [(first, 1 + first % 3, 2 + first % 2) for first in range(12)]


@needs_fork
@pytest.mark.parametrize("num_workers", [1, 2])
def test_they_come_in_order_from_processes(num_workers: int) -> None:
    before = torch.get_rng_state()
    found = list(batches_from_processes(numbered, REQUESTS, num_workers))
    assert [(int(batch.input_ids[0, 0]), *batch.input_ids.shape) for batch in found] == REQUESTS
    makers = {batch.loss_weight[0, 0].item() for batch in found}
    assert len(makers) == num_workers
    assert os.getpid() not in makers
    assert torch.equal(torch.get_rng_state(), before)
    assert list(batches_from_processes(numbered, [], num_workers)) == []


class Cyclic:
    """Held by itself alone, like what a stage leaves; says which process has ended it."""

    ALIVE: ClassVar[dict[str, Cyclic]] = {}

    def __init__(self, ended: Path) -> None:
        self.itself, self.ended = self, ended

    def __del__(self) -> None:
        with self.ended.open("a") as file:
            file.write(f"{os.getpid()}\n")


def collecting(first: int, count: int, segments: int) -> Batch:
    """Return a batch after all that can be ended was."""
    Cyclic.ALIVE.clear()
    gc.collect()
    return numbered(first, count, segments)


@needs_fork
@pytest.mark.parametrize("is_alive", [False, True])
def test_they_end_nothing_of_the_process_they_are_copies_of(tmp_path: Path, is_alive: bool) -> None:
    """To CUDA's objects, events for one, that would be an error, and the copy is aborted."""
    ended = tmp_path / "ended"
    gc.disable()
    try:
        cyclic = Cyclic(ended)
        if is_alive:
            Cyclic.ALIVE["it"] = cyclic
        del cyclic
        assert len(list(batches_from_processes(collecting, REQUESTS, 2))) == len(REQUESTS)
    finally:
        gc.enable()
        Cyclic.ALIVE.clear()
        gc.collect()
    assert ended.read_text().split() == [str(os.getpid())]


class Dying:
    """Makes large batches, each by a process that is killed so many times."""

    def __init__(self, folder: Path, deaths: dict[int, int]) -> None:
        self.folder, self.deaths = folder, deaths

    def __call__(self, first: int, count: int, segments: int) -> Batch:
        file = self.folder / str(first)
        died = int(file.read_text()) if file.exists() else 0
        if died < self.deaths.get(first, 0):
            file.write_text(str(died + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return numbered(first, count, segments * 10_000)


@needs_fork
def test_processes_that_are_killed_are_replaced(tmp_path: Path) -> None:
    def run() -> Iterator[Batch]:
        for number, batch in enumerate(batches_from_processes(Dying(tmp_path, {0: 1, 7: 2}), REQUESTS, 2)):
            if number == 3:  # while nobody waits for a batch, and in the middle of handing one over
                time.sleep(0.2)
                for process in multiprocessing.active_children():
                    process.kill()
                time.sleep(0.2)
            yield batch

    with pytest.warns(UserWarning, match="a process that makes data ended by SIGKILL; another") as told:
        found = list(run())
    sizes = [(int(batch.input_ids[0, 0]), *batch.input_ids.shape) for batch in found]
    assert sizes == [(first, count, segments * 10_000) for first, count, segments in REQUESTS]
    assert 4 <= len(told) <= 5  # one of two may have been on its way to its last death when it was killed
    assert multiprocessing.active_children() == []


@needs_fork
def test_processes_that_are_killed_again_and_again(tmp_path: Path) -> None:
    found: list[float] = []

    def run() -> None:
        for batch in batches_from_processes(Dying(tmp_path, {5: 1000}), REQUESTS, 2):
            found.append(batch.input_ids[0, 0].item())

    message = r"the last one by SIGKILL\. .*the same command goes on"
    with pytest.warns(UserWarning, match="SIGKILL") as told, pytest.raises(TrainingError, match=message):
        run()
    assert found == [0, 1, 2, 3, 4][: len(found)]
    assert len(told) == data_workers._MOST_REPLACED
    assert (tmp_path / "5").read_text() == str(data_workers._MOST_REPLACED + 1)
    assert multiprocessing.active_children() == []


@needs_fork
def test_other_errors_are_no_reason_to_begin_again() -> None:
    def make(first: int, count: int, segments: int) -> Batch:
        raise RuntimeError("of another kind")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match=r"(?s)that makes data failed: .* line .*: of another kind"):
            next(batches_from_processes(make, REQUESTS, 1))
    assert multiprocessing.active_children() == []


@needs_fork
def test_an_error_is_raised_at_its_place_with_its_own_message() -> None:
    batches = batches_from_processes(numbered, [(1, 1, 1), (13, 1, 1), (2, 1, 1)], 2)
    assert next(batches).input_ids.item() == 1
    with pytest.raises(DataError, match=r"^unlucky$"):
        next(batches)


@needs_fork
def test_a_mixture_with_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_text(tmp_path / "text.txt")
    recipe = Recipe.from_dict(
        {
            "name": "t",
            "sequence_length": 512,
            "data": [{"provider": "text", "path": str(text)}, {"provider": "passkey"}],
        }
    )
    made = build_mixture(recipe, spelling_tokenizer(), cache_dir=tmp_path)
    plain = build_mixture(recipe, spelling_tokenizer(), cache_dir=tmp_path)
    asked: list[int] = []

    def watched(make: object, requests: list[tuple[int, int, int]], num_workers: int) -> object:
        asked.append(num_workers)
        return batches_from_processes(made.batch, requests, num_workers)

    monkeypatch.setattr(mixture_module, "batches_from_processes", watched)
    monkeypatch.setattr(mixture_module, "num_data_workers", lambda: 2)
    requests = [(6, 2, 1), (8, 1, 2), (9, 2, 1)]
    for request, batch in zip(requests, made.batches(requests), strict=True):
        expected = plain.batch(*request)
        assert torch.equal(batch.input_ids, expected.input_ids)
        assert torch.equal(batch.loss_weight, expected.loss_weight)
        assert batch.sources == expected.sources
    list(made.batches(requests, ahead=False))
    assert asked == [2]
    monkeypatch.setattr(mixture_module, "num_data_workers", lambda: 0)
    assert len(list(made.batches(requests))) == 3
    assert asked == [2]


@pytest.mark.parametrize(
    ("cores", "beside", "expected"), [(1, 1, 0), (2, 1, 1), (16, 1, 8), (16, 4, 3), (4, 8, 0)]
)
@needs_fork
def test_how_many(monkeypatch: pytest.MonkeyPatch, cores: int, beside: int, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(beside))
    assert num_data_workers() == expected


ENDLESS = """
import os, signal, sys, time
import torch
from filelock import FileLock
from lawcat.distill.data_workers import batches_from_processes
from lawcat.distill.sequence import Batch

def make(first, count, segments):
    ids = torch.full((16, 1024), os.getpid())  # more than a pipe holds
    return Batch(ids, ids.float(), ids > 0, ("x",) * 16)

lock = FileLock(sys.argv[1])
lock.acquire()
stopped = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *arguments: stopped.append(1))
for batch in batches_from_processes(make, [(0, 1, 1)] * 100_000, 2):
    print(batch.input_ids[0, 0].item(), flush=True)
    if stopped:
        print("stopped", flush=True)
        break
    time.sleep(0.01)
"""


@needs_fork
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_all_of_them_leaves_none_behind(number: int, tmp_path: Path) -> None:
    """Nor a lock that one of them would hold on to, as a run has one."""
    child = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path / "lock")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdout is not None
    workers = {int(line) for line in itertools.islice(child.stdout, 6)}
    assert len(workers) == 2
    if number == signal.SIGKILL:
        child.kill()
    else:
        os.killpg(child.pid, number)
    output, errors = child.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert output.endswith(b"stopped\n"), errors
        assert child.returncode == 0, errors
        assert not errors
    deadline = time.monotonic() + 20
    while (alive := [worker for worker in workers if _is_alive(worker)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for worker in alive:
        os.kill(worker, signal.SIGKILL)
    assert not alive
    FileLock(tmp_path / "lock").acquire(timeout=0)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
