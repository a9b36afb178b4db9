"""Samples made ready for a model: tokenized by batches, kept for the next model, made while one computes."""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lawcat.tasks import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

# So many texts are tokenized at once, in as many threads as the tokenizer has; their intermediate forms take
# a hundred bytes a token.
_TEXTS_AT_ONCE = 32


@dataclass(frozen=True)
class PreparedSample:
    """A sample with what does not depend on the model.

    Args:
        sample: The sample.
        rules: Headline score of each of its task's rules, by the rule's name.
    """

    sample: Sample
    rules: dict[str, float]
    _ids: list[NDArray[np.int32]] = field(default_factory=list, compare=False, repr=False)

    @property
    def token_ids(self) -> list[int]:
        """The prompt's tokens; empty before `tokenize`."""
        return [int(token) for token in self._ids[0]] if self._ids else []

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory, its tokens included."""
        return 1000 + len(self.sample.prompt) + 4 * self.sample.num_tokens


def tokenize(tokenizer: PreTrainedTokenizerBase, samples: Sequence[PreparedSample]) -> None:
    """Tokenize the prompts of samples that are not tokenized yet.

    Args:
        tokenizer: The tokenizer they were made with.
        samples: Any number.
    """
    waiting = [one for one in samples if not one._ids]
    for start in range(0, len(waiting), _TEXTS_AT_ONCE):
        part = waiting[start : start + _TEXTS_AT_ONCE]
        encoded = tokenizer([one.sample.prompt for one in part], verbose=False)
        for one, ids in zip(part, encoded.input_ids, strict=True):
            one._ids.append(np.asarray(ids, dtype=np.int32))


class SampleCache:
    """Samples by what they were made from, so that several models answer the same ones made once.

    Args:
        max_bytes: What they may take; the ones used longest ago go first.

    Example:
        >>> cache = SampleCache(max_bytes=0)
        >>> cache.put("key", PreparedSample(Sample("t", 8, 0, 0, "?", ("!",), 1, 1), {}))
        >>> cache.get("key") is None
        True
    """

    def __init__(self, max_bytes: int = 2**29) -> None:
        self.max_bytes = max_bytes
        self._num_bytes = 0
        self._samples: OrderedDict[Any, PreparedSample] = OrderedDict()

    def get(self, key: Any) -> PreparedSample | None:
        """Return the sample of a key, or None."""
        if key not in self._samples:
            return None
        self._samples.move_to_end(key)
        return self._samples[key]

    def put(self, key: Any, sample: PreparedSample) -> None:
        """Keep a sample."""
        if key in self._samples:
            self._num_bytes -= self._samples.pop(key).num_bytes
        self._samples[key] = sample
        self._num_bytes += sample.num_bytes
        while self._num_bytes > self.max_bytes:
            self._num_bytes -= self._samples.popitem(last=False)[1].num_bytes


@contextmanager
def made_ahead(items: Iterator[T], *, in_background: bool) -> Iterator[Iterator[T]]:
    """Let the next item be made while the present one is used.

    Args:
        items: Made one by one.
        in_background: Whether to, in a thread. For a GPU's sake: on a CPU the two would take each other's
            time, and OpenMP's barriers make that many times worse.

    Yields:
        The same items in the same order; an error in making one is raised where it would have come.
    """
    if not in_background:
        yield items
        return
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=1)
    is_over = threading.Event()

    def put(item: T | None, error: BaseException | None) -> bool:
        while not is_over.is_set():
            try:
                ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(item, None):
                    return
        except BaseException as error:
            put(None, error)
        else:
            put(None, StopIteration())

    def take() -> Iterator[T]:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            assert item is not None
            yield item

    thread = threading.Thread(target=make, name="samples", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        is_over.set()
        thread.join()
