"""The training data of a run: sequences of several sources in fixed proportions, each found by its number.

Nothing here has a place that moves on: sequence i is the same whoever asks for it and whenever. A resumed run
goes on at the next number, and processes share a batch out by asking for parts of its numbers.

Training and evaluation are kept apart in two ways. Task samples hold only keys, numbers and words that
`lawcat.tasks.held_out` does not reserve for evaluation. Text is what the user names; it must not be text that
is evaluated on, which lawcat cannot know.
"""

from __future__ import annotations

import hashlib
import os
import random
from array import array
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import lcm
from typing import TYPE_CHECKING, Any, TypeVar

from numpy.typing import NDArray
from torch import nn

from lawcat.distill.data_workers import batches_from_processes, num_data_workers
from lawcat.distill.recipe import DataSource, Recipe
from lawcat.distill.sequence import Batch, PackedSequence
from lawcat.distill.sources import HubSource, Pairs, Source, TaskSource, WindowSource, seed_of
from lawcat.distill.text import Progress, find_files, read_documents, tokenize_files
from lawcat.distill.token_cache import fingerprint_of, tokenizer_fingerprint
from lawcat.errors import ConfigurationError, DataError
from lawcat.files import sha256_file
from lawcat.tasks import (
    babilong_training_label,
    babilong_training_pairs,
    niah_training_pairs,
    passkey_training_pair,
)
from lawcat.tasks.babilong import NOISE_SHARES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")


class Turns:
    """Who gives sequence i: so that each has had its share at every point, to about one sequence.

    Args:
        weights: One a source; a source of weight 0 has no turn.
        seed: Seed of the order among equal claims.

    Example:
        >>> turns = Turns([1, 1], seed=0)
        >>> sorted(turns.turn(i) for i in range(4))
        [(0, 0), (0, 1), (1, 0), (1, 1)]
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        # In whole numbers, so that no rounding ever moves a turn. repr gives the decimal that the user wrote.
        exact = [Fraction(repr(float(weight))) for weight in weights]
        scale = lcm(*(weight.denominator for weight in exact))
        self.shares = [int(weight * scale) for weight in exact]
        self.order = list(range(len(exact)))
        random.Random(seed_of(seed, "turns")).shuffle(self.order)
        self._chosen = array("H")
        self._local = array("Q")
        self._counts = [0] * len(exact)
        self._claims = [0] * len(exact)

    def turn(self, index: int) -> tuple[int, int]:
        """Return which source gives sequence `index`, by its number, and how many it gave before."""
        total = sum(self.shares)
        while len(self._chosen) <= index:
            for i, share in enumerate(self.shares):
                self._claims[i] += share
            best = max((i for i in self.order if self.shares[i]), key=self._claims.__getitem__)
            self._claims[best] -= total
            self._chosen.append(best)
            self._local.append(self._counts[best])
            self._counts[best] += 1
        return self._chosen[index], self._local[index]


class Mixture:
    """Endless training data: sequence i of all, for any i; `Turns` says whose it is.

    Args:
        sources: The ingredients, each with its weight.
        sequence_length: T.
        seed: Seed of the turns.
        carried_weights: The sources' weights in long sequences; None for the same.

    Example:
        >>> mixture = build_mixture(recipe, tokenizer)  # doctest: +SKIP
        >>> mixture.batch(0, 2).input_ids.shape  # doctest: +SKIP
        torch.Size([2, 1024])
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, float]],
        sequence_length: int,
        seed: int,
        carried_weights: Sequence[float] | None = None,
    ) -> None:
        self.sequence_length = sequence_length
        self._sources = [source for source, _ in sources]
        self._weights = [weight for _, weight in sources]
        self._turns = Turns(self._weights, seed)
        self._carried_turns = Turns(carried_weights or self._weights, seed)

    def turn(self, index: int) -> tuple[int, int]:
        """Return which source gives sequence `index`, by its number, and how many it gave before."""
        return self._turns.turn(index)

    def sequence(self, index: int, num_segments: int = 1) -> PackedSequence:
        """Return sequence `index`, counted from 0, of `num_segments * sequence_length` tokens.

        Raises:
            DataError: if its source has no such data.
        """
        if num_segments == 1:
            number, local = self._turns.turn(index)
            return self._sources[number].sequence(local)
        number, local = self._carried_turns.turn(index)
        return self._sources[number].long_sequence(local, num_segments)

    def batch(self, first_index: int, count: int, num_segments: int = 1) -> Batch:
        """Return `count` sequences from `first_index` on.

        Args:
            first_index: Number of the first.
            count: At least 1.
            num_segments: Their length in units of `sequence_length`.

        Returns:
            The batch, on the CPU.

        Raises:
            DataError: as `sequence`.
        """
        indices = range(first_index, first_index + count)
        return Batch.stack([self.sequence(index, num_segments) for index in indices])

    def batches(
        self, requests: Iterable[tuple[int, int, int]], *, ahead: bool = True
    ) -> Generator[Batch, None, None]:
        """Yield `batch(*request)` for each request, made while those before are in use.

        Where there is task data, by other processes (`data_workers.py`), or else by a thread: a hub's stream
        would be read by each process, and text is only cut. The batches are the same as `batch` gives; until
        the generator is closed, nothing else may read the mixture.

        Args:
            requests: First index, count and number of segments of each batch.
            ahead: Make them ahead. Not where the CPU itself trains: PyTorch's threads wait for each other at
                every operation, and one of them losing its core to the tokenizer stalls them all.

        Yields:
            Batches, on the CPU.

        Raises:
            DataError: as `sequence`.
        """
        if not ahead:
            yield from (self.batch(*request) for request in requests)
            return
        streams = any(isinstance(source, HubSource) for source in self._sources)
        if self.has_task_data and not streams and (num_workers := num_data_workers()):
            yield from batches_from_processes(self.batch, list(requests), num_workers)
            return
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="lawcat-data") as executor:
            pending = None
            for request in requests:
                following = executor.submit(self.batch, *request)
                if pending is not None:
                    yield pending.result()
                pending = following
            if pending is not None:
                yield pending.result()

    @property
    def has_task_data(self) -> bool:
        """Whether samples of evaluation tasks are in the mix, which every table of results must say."""
        return any(isinstance(source, TaskSource) for source in self._sources)

    def describe(self) -> dict[str, Any]:
        """Return the record of this data: JSON, with a hash of all and of each source."""
        total = sum(self._turns.shares)
        sources = [
            {"name": source.name, "share": share / total, **source.describe()}
            for source, share in zip(self._sources, self._turns.shares, strict=True)
        ]
        return {
            "sequence_length": self.sequence_length,
            "has_task_data": self.has_task_data,
            "sha256": fingerprint_of(
                sources=sources, order=self._turns.order, sequence_length=self.sequence_length
            ),
            "sources": sources,
        }


def build_mixture(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    teacher: Callable[[], nn.Module] | None = None,
    teacher_fingerprint: str | None = None,
    progress: Progress | None = None,
) -> Mixture:
    """Return a recipe's training data; text is tokenized and the teacher's sampled unless the cache has it.

    Args:
        recipe: Its `data`, `seed`, `sequence_length`, and the token weights of `recovery`.
        tokenizer: The teacher's.
        cache_dir: Root of the cache; see `lawcat.convert.cache_dir.cache_dir`.
        teacher: Returns the teacher's model, on the device where it should sample. Called only if a source of
            provider teacher is not in the cache.
        teacher_fingerprint: SHA-256 that stands for the teacher; without it the teacher is needed to look
            into the cache.
        progress: Called while files are read and text is sampled.

    Returns:
        The data.

    Raises:
        ConfigurationError: if the tokenizer has no EOS, or the teacher is needed and not given.
        DataError: for files or data sets that are missing, damaged, empty or too short.
        MissingDependencyError: if a data set is streamed and `datasets` is not installed.
        LawcatError: if the cache cannot be written.

    Example:
        >>> recipe = Recipe.load("quick")
        >>> mixture = build_mixture(recipe, tokenizer, teacher=lambda: model)  # doctest: +SKIP
    """
    sources: list[tuple[Source, float]] = []
    for i, (source, name) in enumerate(zip(recipe.data, _unique_names(recipe.data), strict=True)):
        builder = _Builder(
            name,
            recipe,
            tokenizer,
            seed_of(recipe.seed, name),
            cache_dir,
            teacher,
            teacher_fingerprint,
            progress,
        )
        try:
            sources.append((builder.build(source), source.weight))
        except DataError as error:
            raise DataError(f"data.{i} ({name}): {error}") from error
    carried = [s.weight if s.carried_weight is None else s.carried_weight for s in recipe.data]
    return Mixture(sources, recipe.sequence_length, recipe.seed, carried)


def check_files(recipe: Recipe) -> None:
    """Find a recipe's files without reading them, so that a wrong path shows before a teacher is loaded.

    Raises:
        DataError: for one that matches no file, or whose ending is not one that can be read.
    """
    for i, (source, name) in enumerate(zip(recipe.data, _unique_names(recipe.data), strict=True)):
        try:
            find_files(source.paths)
        except DataError as error:
            raise DataError(f"data.{i} ({name}): {error} Set it with --set data.{i}.path=FILES.") from error


def _unique_names(data: Sequence[DataSource]) -> list[str]:
    """Return a name for each source: the recipe's, or the provider's, numbered from the second on."""
    names: list[str] = []
    for source in data:
        wanted = source.name or source.provider
        name, number = wanted, 2
        while name in names:
            name, number = f"{wanted}-{number}", number + 1
        names.append(name)
    return names


@dataclass(frozen=True)
class _Builder:
    """Makes one source of a recipe."""

    name: str
    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    seed: int
    cache_dir: str | os.PathLike[str] | None
    teacher: Callable[[], nn.Module] | None
    teacher_fingerprint: str | None
    progress: Progress | None

    def build(self, source: DataSource) -> Source:
        make: dict[str, Callable[[DataSource], Source]] = {
            "text": self._text,
            "teacher": self._teacher,
            "hub": self._hub,
            "passkey": self._task,
            "needle": self._task,
            "babilong": self._task,
        }
        return make[source.provider](source)

    def _text(self, source: DataSource) -> Source:
        files = tokenize_files(
            find_files(source.paths),
            self.tokenizer,
            text_field=source.text_field,
            cache_dir=self.cache_dir,
            progress=self.progress,
        )
        # Names without folders: the record goes out with the model, and where files lay is nobody's business.
        record = {
            "provider": "text",
            "files": [{"name": file.path.name, "sha256": file.sha256} for file in files],
            "sha256": fingerprint_of(
                files=[file.sha256 for file in files],
                tokenizer=tokenizer_fingerprint(self.tokenizer),
                text_field=source.text_field,
                seed=self.seed,
            ),
        }
        return self._windows([file.tokens for file in files], record)

    def _teacher(self, source: DataSource) -> Source:
        from lawcat.distill.sampling import sample_teacher_text

        if self.teacher is None:
            raise ConfigurationError(
                f"The data source {self.name!r} is the teacher's own text, and no teacher is given here. "
                "Pass teacher=, or name other data."
            )
        tokens = sample_teacher_text(
            self.teacher,
            self.tokenizer,
            num_tokens=source.num_tokens,
            seed=self.recipe.seed,
            sequence_tokens=self.recipe.sequence_length,
            temperature=source.temperature,
            top_p=source.top_p,
            precision=self.recipe.precision,
            fingerprint=self.teacher_fingerprint,
            cache_dir=self.cache_dir,
            progress=self.progress,
        )
        content = hashlib.sha256(tokens.astype("<u4").tobytes()).hexdigest()
        record = {
            "provider": "teacher",
            "temperature": source.temperature,
            "top_p": source.top_p,
            "sha256": fingerprint_of(tokens=content, seed=self.seed),
        }
        return self._windows([tokens], record)

    def _windows(self, arrays: Sequence[NDArray[Any]], record: dict[str, Any]) -> Source:
        return WindowSource(self.name, arrays, self.recipe.sequence_length, self.seed, record)

    def _hub(self, source: DataSource) -> Source:
        assert source.dataset is not None
        return HubSource(
            self.name,
            source.dataset,
            self.tokenizer,
            self.recipe.sequence_length,
            subset=source.subset,
            split=source.split,
            revision=source.revision,
            text_field=source.text_field,
        )

    def _task(self, source: DataSource) -> Source:
        record: dict[str, Any] = {"provider": source.provider}
        pairs: Pairs = _passkey_pairs
        if source.provider != "passkey":
            prose = self.recipe.prose_sources(source)
            files = [(path, given.text_field) for given in prose for path in find_files(given.paths)]
            documents = [text for path, field in files for text in read_documents(path, field)]
            text = "\n\n".join(documents)
            record["files"] = [{"name": path.name, "sha256": sha256_file(path)} for path, _ in files]
            if source.provider == "needle":
                pairs = partial(_needle_pairs, text, source)
                for choice in ("value_kinds", "haystacks", "num_keys"):
                    record[choice] = list(getattr(source, choice))
            else:
                length = self.recipe.sequence_length
                pairs = partial(_babilong_pairs, text if files else None, source, length)
                record["tasks"] = list(source.tasks)
                if source.noise_shares not in (None, NOISE_SHARES):
                    record["noise_shares"] = list(source.noise_shares)
            # Left out where they are 1, as in records of before there were these options.
            record |= {name: n for name in ("needles", "questions") if (n := getattr(source, name)) > 1}
        recovery = self.recipe.recovery
        answer_weight = _given(source.answer_weight, recovery.answer_weight)
        label_weight = _given(source.label_weight, answer_weight)
        kl_factor = _given(source.answer_kl_weight, 1.0)
        # Likewise left out where they say nothing new.
        record |= {"answer_weight": answer_weight} if answer_weight != recovery.answer_weight else {}
        record |= {"label_weight": label_weight} if label_weight != answer_weight else {}
        record |= {"answer_kl_weight": kl_factor} if kl_factor != 1 else {}
        return TaskSource(
            self.name,
            pairs,
            self.tokenizer,
            self.recipe.sequence_length,
            self.seed,
            min_sample_tokens=source.min_sample_tokens,
            answer_weight=answer_weight,
            context_weight=recovery.context_weight,
            answer_kl_factor=kl_factor,
            label_weight=label_weight,
            find_label=babilong_training_label if label_weight != answer_weight else None,
            record=record,
        )


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _passkey_pairs(
    tokenizer: PreTrainedTokenizerBase, max_tokens: int, seed: int, rng: random.Random
) -> list[tuple[str, str]]:
    return [passkey_training_pair(tokenizer, max_tokens, 0, seed)]


def _needle_pairs(
    prose: str,
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    seed: int,
    rng: random.Random,
) -> list[tuple[str, str]]:
    kind = rng.choice(source.value_kinds)
    haystack, num_keys = rng.choice(source.haystacks), rng.choice(source.num_keys)
    make = partial(niah_training_pairs, tokenizer, prose, max_tokens, 0, seed, kind=kind, haystack=haystack)
    # Half of the samples stay as they are evaluated, with a single needle.
    if source.needles > 1 and rng.random() < 0.5:
        for questions in range(source.needles, 1, -1):
            # What a question takes depends on its key, so only the attempt tells whether there is room.
            with suppress(DataError):
                return make(num_keys=max(num_keys, questions), questions=questions)
    return make(num_keys=num_keys)


def _babilong_pairs(
    prose: str | None,
    source: DataSource,
    sequence_length: int,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    seed: int,
    rng: random.Random,
) -> list[tuple[str, str]]:
    return babilong_training_pairs(
        tokenizer,
        max_tokens,
        0,
        seed,
        qa=rng.choice(source.tasks),
        text=prose,
        # A sequence of several segments is for the distance alone.
        fill=max_tokens >= sequence_length,
        questions=source.questions,
        noise_shares=_given(source.noise_shares, NOISE_SHARES),
    )
