"""The ingredients of training data: each is endless, and gives its sequence i for any i, in any order.

Sequences of a source hang on nothing but their index, the seed and the source's options. So a resumed run
needs no state of the data, and processes that share a batch out just ask for other indices.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lawcat.distill.sequence import PackedSequence
from lawcat.distill.text import require_eos, tokenize_documents
from lawcat.distill.token_cache import fingerprint_of, tokenizer_fingerprint
from lawcat.errors import DataError, MissingDependencyError, did_you_mean
from lawcat.tasks import encode_pairs, encode_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ATTEMPTS = 20

Pairs = Callable[["PreTrainedTokenizerBase", int, int, random.Random], Sequence[tuple[str, str]]]
"""Makes a sample from a tokenizer, the most tokens, a seed, and a generator to choose by.

A sample is a prompt and its answer, and perhaps further ones, each about the text of the first.
"""


class Source(Protocol):
    """One ingredient."""

    name: str

    def sequence(self, index: int) -> PackedSequence:
        """Return sequence `index`, counted from 0, of this source alone."""

    def long_sequence(self, index: int, num_segments: int) -> PackedSequence:
        """Return one of `num_segments * T` tokens; what is asked for at its end may hang on all of it."""

    def describe(self) -> dict[str, Any]:
        """Return what a record of the run says of this data: JSON, with a `sha256`."""


def seed_of(*parts: object) -> int:
    """Return 63 bits that hang on the parts alone, unlike Python's `hash`, which changes from run to run.

    Example:
        >>> seed_of(0, "text") == seed_of(0, "text")
        True
    """
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@lru_cache(maxsize=8)
def shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """Return the numbers below `count` in an order that `seed` gives, on any version of numpy.

    numpy's own generators may change their streams from version to version, and a run resumed after an
    upgrade would go on with other data. Source: the mixing function is SplitMix64's (Steele, Lea and Flood,
    OOPSLA 2014).

    Example:
        >>> sorted(shuffled(5, seed=1).tolist())
        [0, 1, 2, 3, 4]
    """
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.argsort(z, kind="stable")


def _plain_sequence(tokens: NDArray[Any], source: str) -> PackedSequence:
    weight = np.ones(len(tokens), np.float32)
    weight[0] = 0.0
    return PackedSequence(tokens.astype(np.int64), weight, np.zeros(len(tokens), np.bool_), source)


class WindowSource:
    """A given stream of tokens, cut into sequences that come in another order each time round.

    Args:
        name: As the recipe has it.
        arrays: The stream, in pieces that follow one another; not all need fit in memory.
        sequence_length: T.
        seed: Seed of the order.
        record: What `describe` returns.

    Raises:
        DataError: if the stream is shorter than one sequence.
    """

    def __init__(
        self,
        name: str,
        arrays: Sequence[NDArray[Any]],
        sequence_length: int,
        seed: int,
        record: dict[str, Any],
    ) -> None:
        self.name = name
        self._arrays = arrays
        self._ends = np.cumsum([len(array) for array in arrays])
        self._length = sequence_length
        self._seed = seed
        self._record = record
        num_tokens = int(self._ends[-1]) if len(arrays) else 0
        self.num_windows = num_tokens // sequence_length
        if not self.num_windows:
            raise DataError(
                f"The data source {name!r} holds {num_tokens} tokens, fewer than one sequence of "
                f"{sequence_length}. Give more text, or set a smaller sequence_length."
            )

    def sequence(self, index: int) -> PackedSequence:
        """Return sequence `index`; after the last window, the windows come again in a new order."""
        epoch, place = divmod(index, self.num_windows)
        window = int(shuffled(self.num_windows, seed_of(self._seed, "epoch", epoch))[place])
        return _plain_sequence(self._slice(window * self._length, self._length), self.name)

    def long_sequence(self, index: int, num_segments: int) -> PackedSequence:
        """Return the text around window `index`; a stream that is shorter than that comes round again."""
        epoch, place = divmod(index, self.num_windows)
        window = int(shuffled(self.num_windows, seed_of(self._seed, "epoch", epoch))[place])
        total, wanted = int(self._ends[-1]), num_segments * self._length
        start = max(min(window * self._length, total - wanted), 0)
        tokens = np.resize(self._slice(start, min(wanted, total)), wanted)
        return _plain_sequence(tokens, self.name)

    def _slice(self, start: int, count: int) -> NDArray[Any]:
        pieces = []
        i = int(np.searchsorted(self._ends, start, side="right"))
        while count:
            begin = start - (int(self._ends[i - 1]) if i else 0)
            piece = self._arrays[i][begin : begin + count]
            pieces.append(piece)
            start, count, i = start + len(piece), count - len(piece), i + 1
        return np.concatenate(pieces)

    def describe(self) -> dict[str, Any]:
        """Return the record given, with the number of tokens."""
        return {**self._record, "tokens": int(self._ends[-1])}


@dataclass(frozen=True)
class _EncodedSample:
    """A sample's tokens with EOS, and where its answers, and the labels in them, begin and end."""

    tokens: list[int]
    answers: list[tuple[int, int]]
    labels: list[tuple[int, int]]


class TaskSource:
    """Task samples of varied length packed into sequences, EOS after each; what is left over counts nothing.

    Half of the time a sample takes all the room there is, so that the longest distances are trained; else its
    length is drawn, and what remains goes to further samples.

    Args:
        name: As the recipe has it.
        pairs: Makes a sample, of values that no evaluation draws (`lawcat.tasks.held_out`).
        tokenizer: The teacher's.
        sequence_length: T.
        seed: Seed of lengths and samples.
        min_sample_tokens: Least length of a sample, EOS included.
        answer_weight: Weight of an answer's tokens and of the EOS after the last.
        context_weight: Weight of a sample's other tokens.
        answer_kl_factor: `PackedSequence.kl_factor` of an answer's tokens and of that EOS.
        label_weight: Weight of the tokens of an answer's label, in place of `answer_weight`.
        find_label: Returns where the label is in an answer's text; None where labels have no weight of their
            own.
        record: What `describe` returns, without the hash.

    Raises:
        ConfigurationError: if the tokenizer has no EOS.
    """

    def __init__(
        self,
        name: str,
        pairs: Pairs,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        seed: int,
        *,
        min_sample_tokens: int,
        answer_weight: float,
        context_weight: float,
        answer_kl_factor: float = 1.0,
        label_weight: float = 1.0,
        find_label: Callable[[str], tuple[int, int]] | None = None,
        record: dict[str, Any],
    ) -> None:
        self.name = name
        self._pairs = pairs
        self._tokenizer = tokenizer
        self._eos = require_eos(tokenizer)
        self._length = sequence_length
        self._seed = seed
        self._least = min_sample_tokens
        self._answer_weight, self._context_weight = answer_weight, context_weight
        self._answer_kl_factor = answer_kl_factor
        self._label_weight, self._find_label = label_weight, find_label
        key = {
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "sequence_length": sequence_length,
            "seed": seed,
            "min_sample_tokens": min_sample_tokens,
        }
        self._record = {**record, "sha256": fingerprint_of(**record, **key)}

    def sequence(self, index: int) -> PackedSequence:
        """Return sequence `index`.

        Raises:
            DataError: if a sequence cannot hold a single sample.
        """
        rng = random.Random(seed_of(self._seed, "lengths", index))
        ids = np.full(self._length, self._eos, np.int64)
        weight = np.zeros(self._length, np.float32)
        is_answer = np.zeros(self._length, np.bool_)
        used = 0
        for number in range(self._length):
            room = self._length - used
            if room < self._least:
                break
            sample = self._sample(index, number, rng, room, required=used == 0)
            if sample is None:
                break
            end = used + len(sample.tokens)
            ids[used:end] = sample.tokens
            weight[used:end] = self._context_weight
            for first, last in sample.answers:
                weight[used + first : used + last] = self._answer_weight
                is_answer[used + first : used + last] = True
            for first, last in sample.labels:
                weight[used + first : used + last] = self._label_weight
            used = end
        weight[0] = 0.0
        return self._packed(ids, weight, is_answer)

    def long_sequence(self, index: int, num_segments: int) -> PackedSequence:
        """Return a single sample as long as all segments, its answers at the very end; only they count.

        Of several answers, those that begin before the last segment do not count either.
        """
        length = num_segments * self._length
        rng = random.Random(seed_of(self._seed, "long", index, num_segments))
        sample = self._required(length - 1, rng, "long", index)
        front = length - len(sample.tokens)  # a sample fits to within a sentence; the rest is EOS, in front
        ids = np.full(length, self._eos, np.int64)
        ids[front:] = sample.tokens
        weight = np.full(length, self._answer_weight, np.float32)
        for first, last in sample.labels:
            weight[front + first : front + last] = self._label_weight
        is_answer = np.zeros(length, np.bool_)
        for first, last in sample.answers:
            if last == len(sample.tokens) or front + first >= length - self._length:
                is_answer[front + first : front + last] = True
        weight[~is_answer] = 0.0
        return self._packed(ids, weight, is_answer)

    def _packed(
        self, ids: NDArray[np.int64], weight: NDArray[np.float32], is_answer: NDArray[np.bool_]
    ) -> PackedSequence:
        kl_factor = np.where(is_answer, np.float32(self._answer_kl_factor), np.float32(1.0))
        return PackedSequence(ids, weight, is_answer, self.name, kl_factor)

    def _sample(
        self, index: int, number: int, rng: random.Random, room: int, *, required: bool
    ) -> _EncodedSample | None:
        """Return a sample; none if the room is too small."""
        lengths = [room]
        if rng.random() < 0.5 and room >= 2 * self._least:
            lengths.insert(0, rng.randint(self._least, room - self._least))
        for length in lengths:
            if length == room and required:
                return self._required(length - 1, rng, index, number)
            # What a question takes depends on its key, so only the attempt tells. The rest of the room may
            # do.
            with suppress(DataError):
                return self._encode(length - 1, seed_of(self._seed, index, number), rng)
        return None

    def _required(self, max_tokens: int, rng: random.Random, *place: object) -> _EncodedSample:
        """Return a sample; where it takes too many tokens, as one in thousands may, another one like it.

        The generator makes the same choices again, so that none of them becomes rarer; one that never fits is
        an error.
        """
        state = rng.getstate()
        for attempt in range(1, _ATTEMPTS):
            with suppress(DataError):
                return self._encode(max_tokens, seed_of(self._seed, *place), rng)
            rng.setstate(state)
            place = (*place[:2], "again", attempt)
        return self._encode(max_tokens, seed_of(self._seed, *place), rng)

    def _encode(self, max_tokens: int, sample_seed: int, rng: random.Random) -> _EncodedSample:
        pairs = self._pairs(self._tokenizer, max_tokens, sample_seed, rng)
        labels: list[tuple[int, int]] = []
        if self._find_label is None:
            tokens, answers = encode_pairs(self._tokenizer, pairs)
        else:
            tokens, answers, labels = _encode_labelled(self._tokenizer, pairs, self._find_label)
        if tokens[-1] != self._eos:
            tokens = [*tokens, self._eos]
        if len(tokens) > max_tokens + 1:
            raise DataError(f"A sample took {len(tokens)} tokens where {max_tokens + 1} were asked for.")
        if labels:  # not the EOS that a tokenizer itself puts behind a label
            labels[-1] = (labels[-1][0], min(labels[-1][1], len(tokens) - 1))
        return _EncodedSample(tokens, [*answers[:-1], (answers[-1][0], len(tokens))], labels)

    def describe(self) -> dict[str, Any]:
        """Return the record given, with the hash of everything the samples hang on."""
        return self._record


def _encode_labelled(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    find_label: Callable[[str], tuple[int, int]],
) -> tuple[list[int], list[tuple[int, int]], list[tuple[int, int]]]:
    """Return what `encode_pairs` returns, and where the tokens of each answer's label are."""
    pieces: list[str] = []
    for prompt, answer in pairs:
        first, last = find_label(answer)
        pieces += [prompt, answer[:first], answer[first:last], answer[last:]]
    tokens, ends = encode_pieces(tokenizer, pieces)
    answers = list(zip(ends[::4], ends[3::4], strict=True))
    # A token that spans the end of a label counts as the piece's after it; the label has at least one.
    labels = [(first, max(last, first + 1)) for first, last in zip(ends[1::4], ends[2::4], strict=True)]
    return tokens, answers, labels


class _Stream:
    """Sequences that come one after another, found by number; going far back begins anew."""

    # Processes of one run ask for neighbouring indices, hardly ever for one further back.
    _KEPT = 256

    def __init__(self, begin: Callable[[], Iterator[PackedSequence]]) -> None:
        self._begin = begin
        self._restart()

    def _restart(self) -> None:
        self._sequences = self._begin()
        self._next = 0
        self._recent: deque[PackedSequence] = deque(maxlen=self._KEPT)

    def sequence(self, index: int) -> PackedSequence:
        """Return sequence `index`, reading the stream up to it."""
        if index < self._next - len(self._recent):
            self._restart()
        while self._next <= index:
            self._recent.append(next(self._sequences))
            self._next += 1
        return self._recent[index - self._next]


class HubSource:
    """A data set of the hub, streamed in its own order and begun again at its end.

    A stream cannot be entered in the middle: to go on at sequence i, the i before it are read again. Indices
    that grow cost one pass.

    Args:
        name: As the recipe has it.
        dataset: The data set's name.
        subset: Its configuration, or None.
        split: Its split.
        revision: Branch, tag or commit, or None for the newest.
        text_field: The field of a row that holds the text.
        tokenizer: The teacher's.
        sequence_length: T.

    Raises:
        MissingDependencyError: if the package `datasets` is not installed.
        DataError: if the data set cannot be opened, a row has no text, or all of it is shorter than one
            sequence.
    """

    _ROWS = 64

    def __init__(
        self,
        name: str,
        dataset: str,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        *,
        subset: str | None = None,
        split: str = "train",
        revision: str | None = None,
        text_field: str = "text",
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise MissingDependencyError(
                "datasets", "distill", f"Streaming the data set {dataset!r}"
            ) from error
        self.name = name
        self._dataset = dataset
        self._field = text_field
        self._tokenizer = tokenizer
        self._length = sequence_length
        self._record = {"dataset": dataset, "subset": subset, "split": split, "revision": revision}
        try:
            self._rows = datasets.load_dataset(
                dataset, subset, split=split, revision=revision, streaming=True
            )
        except Exception as error:  # whatever the hub, the network or the data set's own code raises
            raise DataError(f"The data set {dataset!r} cannot be opened: {error}") from error
        # Two, as the turns of long sequences are other ones: their numbers may be far ahead.
        self._short, self._long = _Stream(self._sequences), _Stream(self._sequences)

    def sequence(self, index: int) -> PackedSequence:
        """Return sequence `index`, reading the stream up to it."""
        return self._short.sequence(index)

    def long_sequence(self, index: int, num_segments: int) -> PackedSequence:
        """Return the sequences from `index` on, one after another."""
        pieces = [self._long.sequence(index + i) for i in range(num_segments)]
        return _plain_sequence(np.concatenate([piece.input_ids for piece in pieces]), self.name)

    def _sequences(self) -> Iterator[PackedSequence]:
        left = np.zeros(0, np.int64)
        for _ in repeat(None):
            had = False
            for texts in self._text_batches():
                tokens = np.concatenate([left, tokenize_documents(self._tokenizer, iter(texts))])
                full = len(tokens) // self._length * self._length
                for start in range(0, full, self._length):
                    had = True
                    yield _plain_sequence(tokens[start : start + self._length], self.name)
                left = tokens[full:]
            if not had:
                raise DataError(
                    f"The data set {self._dataset!r} holds less text than one sequence of {self._length} "
                    "tokens. Choose another, or set a smaller sequence_length."
                )

    def _text_batches(self) -> Iterator[list[str]]:
        texts: list[str] = []
        for row in self._rows:
            if not isinstance(row.get(self._field), str):
                fields = [str(field) for field in row]
                raise DataError(
                    f"The data set {self._dataset!r} has no text in a field {self._field!r}; it has "
                    f"{', '.join(map(repr, fields))}. Set text_field.{did_you_mean(self._field, fields)}"
                )
            texts.append(row[self._field])
            if len(texts) == self._ROWS:
                yield texts
                texts = []
        if texts:
            yield texts

    def describe(self) -> dict[str, Any]:
        """Return the data set's name and revision; the hash is of these, as a stream is never seen whole."""
        return {**self._record, "sha256": fingerprint_of(**self._record)}
