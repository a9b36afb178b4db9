"""Batches made by other processes while one is trained on.

A task sample costs some 10 ms at 1K tokens and up to a second at 16K, nearly all of it in Python: one thread
beside the training keeps up with a CPU, not with a GPU.

Not PyTorch's ``DataLoader``: where one of its processes is killed, an error is raised wherever the program
is, in the middle of a step or a checkpoint. Here it is known when that process's next batch is asked for, and
another process makes it.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection

import torch

from lawcat.distill.sequence import Batch
from lawcat.errors import LawcatError, TrainingError

Make = Callable[[int, int, int], Batch]
Request = tuple[int, int, int]
"""First sequence, how many, and of how many segments."""

_MOST_WORKERS = 8
_MOST_REPLACED = 5
_LOOK_EVERY_S = 0.5


def num_data_workers() -> int:
    """Return how many processes make data beside this one: the processors left to it, 8 at most; 0 where
    processes cannot be forked."""
    if "fork" not in multiprocessing.get_all_start_methods() or not hasattr(os, "sched_getaffinity"):
        return 0
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that train together on this machine
    return max(0, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // beside - 1))


def batches_from_processes(
    make: Make, requests: Sequence[Request], num_workers: int
) -> Generator[Batch, None, None]:
    """Yield `make(*request)` of each request, in order; close it where not all are wanted.

    A process that is killed, as where memory runs out, is replaced a few times.

    Args:
        make: Makes a batch; each process has its own copy of all that it refers to.
        requests: What to make.
        num_workers: Processes, at least 1.

    Yields:
        Batches, on the CPU.

    Raises:
        LawcatError: what `make` raises, at its place in the order.
        TrainingError: if processes are killed again and again.
        RuntimeError: if `make` raises anything else, with the place where.
    """
    workers: list[_Worker] = []

    def end() -> None:
        for worker in workers:
            worker.end()

    # Where this generator is not closed before: Python waits for all processes, and these wait for it.
    atexit.register(end)
    num_replaced = 0
    try:
        for turn in range(min(num_workers, len(requests))):
            workers.append(_Worker(make, requests[turn::num_workers]))
        for index in range(len(requests)):
            turn = index % num_workers
            while (made := workers[turn].receive()) is None:
                cause = workers[turn].end()
                if num_replaced == _MOST_REPLACED:
                    raise TrainingError(
                        f"Processes that make training data ended again and again, the last one by {cause}. "
                        "The last checkpoint is good: the same command goes on from there. Where the "
                        "system ends processes, memory has mostly run out: leave more of it, or fewer "
                        "processors, of which each makes data."
                    )
                num_replaced += 1
                warnings.warn(
                    f"a process that makes data ended by {cause}; another one goes on for it", stacklevel=2
                )
                workers[turn] = _Worker(make, requests[index::num_workers])
            if isinstance(made, LawcatError):
                raise made
            if isinstance(made, str):
                raise RuntimeError(f"a process that makes data failed: {made}")
            yield made
    finally:
        end()
        atexit.unregister(end)


class _Worker:
    """A process that makes batches, one after the other and a few ahead of who receives them."""

    def __init__(self, make: Make, requests: Sequence[Request]) -> None:
        # What an earlier stage has left in cycles, CUDA events among it, ends here and not in a copy of this
        # process: to CUDA that is an error, and the copy would be aborted.
        gc.collect()
        # Not through /dev/shm, of which containers often have 64 MB.
        self._results, theirs = multiprocessing.Pipe(duplex=False)
        self._process = multiprocessing.get_context("fork").Process(
            target=_work, args=(os.getpid(), make, requests, theirs), daemon=True
        )
        self._process.start()
        theirs.close()  # so that with the process the pipe ends

    def receive(self) -> Batch | LawcatError | str | None:
        """Return the next batch, or the error in its place; None where the process has ended."""
        try:
            pickled = self._results.recv_bytes()
        except (EOFError, OSError):
            return None
        made: Batch | LawcatError | str = pickle.loads(pickled)
        return made

    def end(self) -> str:
        """End the process, and return what had ended it if it was there no more."""
        self._results.close()
        self._process.kill()  # it writes nothing that could be left by half
        self._process.join()
        code = self._process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _work(parent: int, make: Make, requests: Sequence[Request], results: Connection) -> None:
    """Do all that a process does, and end it."""
    gc.freeze()  # what was alive is not the copy's to end
    # Ctrl-C and SIGTERM reach the whole group; the process that trains decides when these end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else each says that it had to turn it off
    # One waits here and one is on its way: what makes a long sequence need not wait for who reads it.
    ahead: queue.Queue[bytes | None] = queue.Queue(maxsize=1)
    sender = threading.Thread(target=_send, args=(ahead, results), daemon=True)
    sender.start()
    for request in requests:
        ahead.put(pickle.dumps(_made(make, request)))
    ahead.put(None)
    sender.join()
    os._exit(0)  # nor is what else Python ends


def _made(make: Make, request: Request) -> Batch | LawcatError | str:
    try:
        return make(*request)
    except LawcatError as error:
        return error
    except Exception:
        return traceback.format_exc()


def _send(ahead: queue.Queue[bytes | None], results: Connection) -> None:
    try:
        while (made := ahead.get()) is not None:
            results.send_bytes(made)
    except OSError:  # nobody reads it
        os._exit(1)


def _end_after(parent: int) -> None:
    """End this process where its parent is no more: it holds copies of what the parent had open, such as the
    lock on its directory and connections to other processes."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os._exit(1)
