"""Running a model over the samples of tasks: batched, resumable, and without hiding what went wrong."""

from __future__ import annotations

import copy
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from lawcat.errors import ConfigurationError, DataError, LawcatError
from lawcat.evaluation.answering import Answer, answer_prompts
from lawcat.evaluation.attention import attention_of
from lawcat.evaluation.fingerprint import json_fingerprint, model_fingerprint, tokenizer_fingerprint
from lawcat.evaluation.lengths import format_length, parse_length
from lawcat.evaluation.memory import MemoryPlan, peak_bytes, plan_memory, reset_peak
from lawcat.evaluation.records import SampleRecord, append_record, open_records, prompt_edges, read_records
from lawcat.evaluation.samples import PreparedSample, SampleCache, made_ahead, tokenize
from lawcat.evaluation.scoring import wilson_interval
from lawcat.memory import free_memory
from lawcat.model.configuration_lawcat import LINEAR
from lawcat.tasks import Sample, Task, TextSource, get_task, resolve_source
from lawcat.versions import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["student", "teacher", "baseline"]

# What a sample costs beside its tokens, as so many of them, for the estimate of the time left.
_TOKENS_A_SAMPLE = 300


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
            "tokens_per_second": self.tokens_per_second,
            "state_bytes": self.state_bytes,
            **({"rules": rules} if (rules := self.rules) else {}),
            "haystack": self.options.get("haystack"),
            **{name: self.options[name] for name in ("noise", "babi") if name in self.options},
            "options": self.options,
            "depths": self._by_depth(),
            "failures": self._failures(),
        }

    @property
    def rules(self) -> dict[str, float]:
        """Accuracy of each of the task's rules on the finished samples, by the rule's name."""
        found: dict[str, list[float]] = {}
        for record in self.finished:
            for name, score in record.rules.items():
                found.setdefault(name, []).append(score)
        return {name: sum(scores) / len(scores) for name, scores in found.items()}

    @property
    def state_bytes(self) -> int | None:
        """The most that the model kept of one sequence after its prompt; None if unknown."""
        return max((one.state_bytes for one in self.finished if one.state_bytes is not None), default=None)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens read and said a second of wall time, over the finished samples."""
        seconds = sum(record.seconds for record in self.finished)
        tokens = sum(record.num_tokens + record.num_new_tokens for record in self.finished)
        return round(tokens / seconds, 1) if seconds else None

    def _failures(self) -> list[dict[str, Any]]:
        return [
            {
                "index": record.index,
                "depth": record.depth,
                "num_tokens": record.num_tokens,
                "prompt_head": record.prompt_head,
                "prompt_tail": record.prompt_tail,
                "wanted": record.wanted,
                "given": record.given,
                "score": None if record.error is not None else record.score,
                "error": record.error,
            }
            for record in self.records
            if record.error is not None or record.score < 1
        ]

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
        settings: How it was run: device, dtype, attention, batch and chunk sizes. They are in no score.
        kind: `"student"` for a model of ours with linear layers, `"teacher"` for one without, `"baseline"`
            for what is measured to compare the student with.
        parameters: How many the model has.
        peak_memory_bytes: Peak of this run, of the GPU or of the process; None if no sample was run.
    """

    model: str
    model_fingerprint: str
    seed: int
    cells: list[CellResult]
    num_resumed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    kind: Kind = "teacher"
    parameters: int | None = None
    peak_memory_bytes: int | None = None

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
        """Return the results as `lawcat eval` writes them; `docs/results.md` says what each field means.

        Args:
            command: How it was called.
        """
        return {
            "schema": 1,
            "model": self.model,
            "kind": self.kind,
            "parameters": self.parameters,
            "versions": versions(),
            "command": command,
            "seed": self.seed,
            "model_fingerprint": self.model_fingerprint,
            "settings": self.settings,
            "peak_memory_bytes": self.peak_memory_bytes,
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
    kind: Kind | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    haystack: TextSource | str | os.PathLike[str] | None = None,
    noise: TextSource | str | os.PathLike[str] | None = None,
    babi: str | os.PathLike[str] | None = None,
    batch_tokens: int | None = None,
    prefill_chunk_tokens: int | None = None,
    output_jsonl: str | os.PathLike[str] | None = None,
    sample_cache: SampleCache | None = None,
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
        lengths: Nominal lengths in tokens: 1024, "1k", "8K". Length 0 ("0k") is for tasks that have one
            (BABILong: the facts alone); others pass over it, if any task has it.
        samples: Samples for each task and length.
        seed: Of the samples.
        name: What results call the model. None takes the name it was loaded by, of a folder the last part.
        kind: What results say it is; None looks at its layers.
        options: Options by task, such as `{"passkey": {"depth": "random"}}`.
        haystack: Text around the needles of those tasks that hide them in prose.
        noise: Text around the facts, for the tasks with an option `noise`.
        babi: Folder of the real bAbI files, for the tasks with an option `babi`.
        batch_tokens: Most tokens of a batch, answers included; a longer single sample still runs. None takes
            what the memory holds (`lawcat.evaluation.memory.plan_memory`).
        prefill_chunk_tokens: Tokens of prompts read at once, of a whole batch together, which bounds the
            memory of long prompts. None takes what the memory holds.
        output_jsonl: A file that every finished sample is added to. Samples found there are not run again
            where model, tokenizer, task, length, index, seed and options are the same.
        sample_cache: Where samples are kept for the next model, whose call is given the same.
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
            "the teacher (--tokenizer)."
        )
    _check_counts(samples=samples, batch_tokens=batch_tokens, prefill_chunk_tokens=prefill_chunk_tokens)
    chosen = [get_task(task) if isinstance(task, str) else task for task in tasks]
    result = empty_result(model, name=name, seed=seed, kind=kind)
    identity = [result.model_fingerprint, tokenizer_fingerprint(tokenizer)]
    outside = {
        "haystack": None if haystack is None else resolve_source(haystack),
        "noise": None if noise is None else resolve_source(noise),
        "babi": None if babi is None else os.fspath(babi),
    }
    cells = _plan(chosen, lengths, samples, seed, identity, options or {}, outside)
    device = model.get_input_embeddings().weight.device
    maker = _Maker(tokenizer, identity[1], seed, sample_cache if sample_cache is not None else SampleCache())
    kept = read_records(output_jsonl) if output_jsonl is not None else {}
    for cell in cells:
        # A length too short or a text that cannot be used should be said now, not after hours of others.
        if not all(key in kept for key in cell.keys):
            maker.try_out(cell)

    clock = _Clock(cells, kept, progress)
    found = [{index: kept[key] for index, key in enumerate(cell.keys) if key in kept} for cell in cells]
    is_to_run = any(len(records) < samples for records in found)
    reset_peak(device)
    run = _Run(
        model=model,
        tokenizer=tokenizer,
        name=result.model,
        plan=plan_memory(
            model, batch_tokens=batch_tokens, prefill_chunk_tokens=prefill_chunk_tokens, probe=is_to_run
        ),
        window=getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )
    overlaps = _overlaps(device)
    if overlaps:
        # Two threads may not use one tokenizer at a time.
        maker = maker.with_tokenizer(copy.deepcopy(tokenizer))
    missing = [[index for index in range(samples) if index not in records] for records in found]
    batches = maker.batches(cells, missing, run.plan)
    with open_records(output_jsonl) as stream, made_ahead(batches, in_background=overlaps) as ready:
        for number, batch in ready:
            for records in run.answer(cells[number], batch):
                for record in records:
                    found[number][record.index] = record
                    if stream is not None:
                        append_record(stream, record)
                clock.tick(cells[number], len(records))
    return replace(
        result,
        cells=[
            CellResult(
                cell.task.name,
                cell.length,
                cell.described,
                cell.task.metrics,
                [records[index] for index in range(samples)],
            )
            for cell, records in zip(cells, found, strict=True)
        ],
        num_resumed=clock.num_kept,
        settings={
            **result.settings,
            "batch_tokens": batch_tokens or "auto",
            "prefill_chunk_tokens": run.plan.prefill_chunk_tokens,
        },
        peak_memory_bytes=peak_bytes(device) if is_to_run else None,
    )


def empty_result(
    model: PreTrainedModel, *, name: str | None = None, seed: int = 0, kind: Kind | None = None
) -> EvaluationResult:
    """Return the result of a model without any samples: what is said of the model itself.

    Args:
        model: A causal language model of transformers.
        name: As of `evaluate`.
        seed: Of the samples.
        kind: As of `evaluate`.
    """
    return EvaluationResult(
        model=name or _name_of(model),
        model_fingerprint=model_fingerprint(model),
        seed=seed,
        cells=[],
        settings={
            "device": _describe_device(model.get_input_embeddings().weight.device),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "attention": attention_of(model),
        },
        kind=kind or kind_of(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def kind_of(model: PreTrainedModel) -> Kind:
    """Return what a model is by its layers.

    Args:
        model: A causal language model of transformers.

    Returns:
        `"student"` with linear layers of ours, `"baseline"` with none but sliding windows of ours, else
        `"teacher"`.
    """
    types = set(model.config.layer_types or ()) if model.config.model_type == "lawcat" else set()
    if LINEAR in types:
        return "student"
    return "baseline" if "sliding_attention" in types else "teacher"


def _overlaps(device: torch.device) -> bool:
    """Return whether samples can be made while the model is at work."""
    return device.type != "cpu"


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


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
    outside: Mapping[str, TextSource | str | None],
) -> list[_Cell]:
    """Return the cells in the order they will run, every option checked."""
    by_name = {task.name: task for task in tasks}
    if not by_name or not lengths:
        raise ConfigurationError("There is nothing to evaluate. Name at least one task and one length.")
    if strangers := sorted(options.keys() - by_name.keys()):
        raise ConfigurationError(
            f"There are options for {strangers[0]!r}, which is not among the tasks: {', '.join(by_name)}."
        )
    given = {option: value for option, value in outside.items() if value is not None}
    _warn_of_no_effect(given, list(by_name.values()))
    parsed = list(dict.fromkeys(parse_length(one, least=0) for one in lengths))
    with_zero = [task.name for task in by_name.values() if task.has_zero_length]
    cells = []
    for task in by_name.values():
        taken = {option: value for option, value in given.items() if _takes(task, option)}
        own = {**taken, **options.get(task.name, {})}
        resolved = task.resolve_options(own)
        described = {
            key: value.describe() if hasattr(value, "describe") else value for key, value in resolved.items()
        }
        for length in parsed:
            if length == 0 and with_zero and task.name not in with_zero:
                continue
            asked = [*identity, task.name, task.version, length, seed, described]
            keys = [json_fingerprint([*asked, index]) for index in range(samples)]
            cells.append(_Cell(task, length, resolved, described, keys))
    return cells


def _takes(task: Task, option: str) -> bool:
    return task.uses_prose if option == "haystack" else option in task.default_options


def _warn_of_no_effect(given: Mapping[str, TextSource | str], tasks: Sequence[Task]) -> None:
    uses = {
        "haystack": "hides a needle in prose",
        "noise": "hides facts in noise",
        "babi": "asks bAbI's questions",
    }
    for option, value in given.items():
        if not any(_takes(task, option) for task in tasks):
            name = value.name if isinstance(value, TextSource) else os.path.basename(os.path.normpath(value))
            warnings.warn(
                f"The {option} {name!r} has no effect: none of the tasks "
                f"({', '.join(task.name for task in tasks)}) {uses[option]}.",
                stacklevel=4,
            )


@dataclass(frozen=True)
class _Maker:
    """Makes samples, or finds those that were made for another model."""

    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    seed: int
    cache: SampleCache

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> _Maker:
        """Return the same with a copy of the tokenizer."""
        return _Maker(tokenizer, self.fingerprint, self.seed, self.cache)

    def try_out(self, cell: _Cell) -> None:
        """Make the first and the last sample of a cell, and raise what is wrong with it as a whole.

        The last, because files of questions may hold fewer than are asked for.
        """
        for index in {0, len(cell.keys) - 1}:
            try:
                self.make(cell, index)
            except DataError as error:  # which names no task: several may be asked for
                raise DataError(f"{cell.task.name} at {format_length(cell.length)}: {error}") from error
            except LawcatError:
                raise
            except Exception:
                # A crash in one sample is recorded when its turn comes.
                continue

    def make(self, cell: _Cell, index: int) -> PreparedSample:
        """Return a sample."""
        task = cell.task
        key = json_fingerprint(
            [self.fingerprint, task.name, task.version, cell.described, cell.length, self.seed, index]
        )
        known = self.cache.get(key)
        if known is None:
            sample = task.generate(self.tokenizer, cell.length, index, self.seed, **cell.options)
            said = task.rule_answers(sample)
            rules = {name: task.score(sample, answer)[task.metrics[0]] for name, answer in said.items()}
            known = PreparedSample(sample, rules)
            self.cache.put(key, known)
        return known

    def batches(
        self, cells: Sequence[_Cell], indices: Sequence[Sequence[int]], plan: MemoryPlan
    ) -> Iterator[tuple[int, list[PreparedSample] | _Unmade]]:
        """Yield the number of a cell and a batch of its samples, or one that could not be made."""
        for number, cell in enumerate(cells):
            batch: list[PreparedSample] = []
            widest = 0
            for index in indices[number]:
                try:
                    made = self.make(cell, index)
                except Exception as error:
                    sample = Sample(cell.task.name, cell.length, index, self.seed, "", (), 0, 0)
                    yield number, _Unmade(sample, _describe(error))
                    continue
                widest = max(widest, made.sample.num_tokens + made.sample.max_new_tokens)
                if batch and len(batch) >= plan.rows(widest):
                    yield number, self._tokenized(batch)
                    batch, widest = [], made.sample.num_tokens + made.sample.max_new_tokens
                batch.append(made)
            if batch:
                yield number, self._tokenized(batch)

    def _tokenized(self, batch: list[PreparedSample]) -> list[PreparedSample]:
        tokenize(self.tokenizer, batch)
        return batch


@dataclass(frozen=True)
class _Unmade:
    """A sample whose making crashed."""

    sample: Sample
    error: str


@dataclass
class _Run:
    """A model at work, with what does not change from cell to cell."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    plan: MemoryPlan
    window: int | None
    # Once a batch did not fit into memory, none of its tokens is tried again.
    fitting_tokens: float = math.inf

    def answer(self, cell: _Cell, batch: list[PreparedSample] | _Unmade) -> Iterator[list[SampleRecord]]:
        """Yield a record for each sample, in one or more parts."""
        if isinstance(batch, _Unmade):
            yield [self._record(cell, PreparedSample(batch.sample, {}), 0.0, error=batch.error)]
        elif len(batch) > 1 and len(batch) * _widest(batch) > self.fitting_tokens:
            yield from self._answer_halves(cell, batch)
        else:
            yield from self._answer_batch(cell, batch)

    def _answer_batch(self, cell: _Cell, batch: list[PreparedSample]) -> Iterator[list[SampleRecord]]:
        start = time.perf_counter()
        answers, error = self._try(cell, batch)
        seconds = (time.perf_counter() - start) / len(batch)
        if error is None:
            pairs = zip(batch, answers, strict=True)
            yield [self._record(cell, sample, seconds, answer=answer) for sample, answer in pairs]
        elif len(batch) == 1:
            yield [self._record(cell, batch[0], seconds, error=_describe(error))]
        else:
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
                self.fitting_tokens = min(self.fitting_tokens, len(batch) * _widest(batch) - 1)
            yield from self._answer_halves(cell, batch)

    def _answer_halves(self, cell: _Cell, batch: list[PreparedSample]) -> Iterator[list[SampleRecord]]:
        # Finds the sample that crashes, and goes on in less memory where that was the trouble.
        half = len(batch) // 2
        yield from self.answer(cell, batch[:half])
        yield from self.answer(cell, batch[half:])

    def _try(self, cell: _Cell, batch: list[PreparedSample]) -> tuple[list[Answer], Exception | None]:
        try:
            answers = answer_prompts(
                self.model,
                self.tokenizer,
                [one.token_ids for one in batch],
                max_new_tokens=max(one.sample.max_new_tokens for one in batch),
                is_answered=lambda row, text: cell.task.is_answered(batch[row].sample, text),
                prefill_chunk_tokens=self.plan.prefill_chunk_tokens,
                mask_entries=self.plan.mask_entries,
            )
        except Exception as error:
            # Its frames hold the tensors of the batch.
            crash = error.with_traceback(None)
        else:
            return answers, None
        free_memory()
        return [], crash

    def _record(
        self,
        cell: _Cell,
        prepared: PreparedSample,
        seconds: float,
        *,
        answer: Answer | None = None,
        error: str | None = None,
    ) -> SampleRecord:
        sample = prepared.sample
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
            rules=prepared.rules,
            state_bytes=answer.state_bytes if answer else None,
        )


def _widest(batch: Sequence[PreparedSample]) -> int:
    return max(one.sample.num_tokens + one.sample.max_new_tokens for one in batch)


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
        self.tokens_left = sum(_cost(cell) for cell in cells for key in cell.keys if key not in kept)
        self.tokens_read = 0
        self.start = time.perf_counter()
        self._call(cells[0], None)

    def tick(self, cell: _Cell, num_samples: int) -> None:
        """Count finished samples of a cell and report."""
        self.done += num_samples
        self.tokens_read += num_samples * _cost(cell)
        self.tokens_left -= num_samples * _cost(cell)
        seconds = time.perf_counter() - self.start
        self._call(cell, seconds * self.tokens_left / self.tokens_read)

    def _call(self, cell: _Cell, seconds_left: float | None) -> None:
        if self.report is not None:
            self.report(Progress(self.done, self.total, seconds_left, cell.task.name, cell.length))


def _cost(cell: _Cell) -> int:
    return cell.length + _TOKENS_A_SAMPLE


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
