"""Batches made by other processes while one is trained on.

A task sample costs some 10 ms at 1K tokens and up to a second at 16K, nearly all of it in Python: one thread
beside the training keeps up with a CPU, not with a GPU.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lawcat.distill.sequence import Batch
from lawcat.errors import LawcatError

Request = tuple[int, int, int]
"""First sequence, how many, and of how many segments."""

_MOST_WORKERS = 8
_LOOK_EVERY_S = 0.5


def num_data_workers() -> int:
    """Return how many processes make data beside this one: the processors left to it, 8 at most; 0 where
    processes cannot be forked."""
    if "fork" not in multiprocessing.get_all_start_methods() or not hasattr(os, "sched_getaffinity"):
        return 0
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that train together on this machine
    return max(0, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // beside - 1))


def batches_from_processes(
    make: Callable[[int, int, int], Batch], requests: Sequence[Request], num_workers: int
) -> Iterator[Batch]:
    """Yield `make(*request)` of each request, in order.

    Args:
        make: Makes a batch; each process has its own copy of all that it refers to.
        requests: What to make.
        num_workers: Processes, at least 1.

    Yields:
        Batches, on the CPU.

    Raises:
        LawcatError: what `make` raises, at its place in the order.
    """
    loader = DataLoader(
        _Requests(make, requests),
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context="fork",
        worker_init_fn=partial(_begin_worker, os.getpid()),
        # Of its own, or it would draw from the generators that a resumed run restores.
        generator=torch.Generator(),
    )
    # What the stage before has left in cycles, CUDA events among it, ends here and not in a copy of this
    # process: to CUDA that is an error, and the copy would be aborted.
    gc.collect()
    for pickled in loader:
        made = pickle.loads(pickled)
        if isinstance(made, LawcatError):
            raise made
        yield made


class _Requests(Dataset[Any]):
    def __init__(self, make: Callable[[int, int, int], Batch], requests: Sequence[Request]) -> None:
        self._make, self._requests = make, requests

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index: int) -> bytes:
        made: Batch | LawcatError
        try:
            made = self._make(*self._requests[index])
        except LawcatError as error:  # as a value: raised here, its message would get a traceback inside
            made = error
        # Tensors as such would go through /dev/shm, of which containers often have 64 MB.
        return pickle.dumps(made)


def _begin_worker(parent: int, number: int) -> None:
    gc.freeze()  # what was alive is not the copy's to end either
    # Ctrl-C and SIGTERM reach the whole group; the process that trains decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else each says that it had to turn it off
    # By itself a worker whose parent was killed waits for ever for somebody to read its batches.
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: int) -> None:
    """End this process where its parent is no more: it holds copies of what the parent had open, such as the
    lock on its directory and connections to other processes."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os._exit(1)
