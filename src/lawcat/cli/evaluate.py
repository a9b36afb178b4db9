"""`lawcat eval`: models on the same samples."""

from __future__ import annotations

import functools
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from lawcat.cli.command_line import command_line
from lawcat.cli.display import Display
from lawcat.convert.families import family_of
from lawcat.convert.initialize import sliding_window_teacher
from lawcat.convert.load import LoadedModel, check_device, check_model, default_device, load_model
from lawcat.convert.shipped import adapter_folder
from lawcat.distill.precision import resolve_precision
from lawcat.errors import ConfigurationError, DataError
from lawcat.evaluation.attention import check_attention, set_attention
from lawcat.evaluation.lengths import parse_lengths
from lawcat.evaluation.measure import check_tasks, measure
from lawcat.evaluation.records import read_records
from lawcat.evaluation.report import markdown_report, read_results, write_report, write_results
from lawcat.evaluation.samples import SampleCache
from lawcat.memory import free_memory

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_dtype(text: str) -> torch.dtype | None:
    """Return the dtype of an option.

    >>> parse_dtype("bfloat16")
    torch.bfloat16
    """
    if text == "fast":
        return resolve_precision("auto", default_device())
    if text not in _DTYPES:
        raise ConfigurationError(f"--dtype {text!r} is not a choice; use {', '.join(_DTYPES)} or fast.")
    return _DTYPES[text]


def parse_options(assignments: list[str]) -> dict[str, dict[str, Any]]:
    """Return the options of tasks, by task; the task itself judges names and values.

    >>> parse_options(["passkey.depth=0.5", "passkey.length_rule=longlora"])
    {'passkey': {'depth': 0.5, 'length_rule': 'longlora'}}
    """
    options: dict[str, dict[str, Any]] = {}
    for text in assignments:
        name, sign, value = text.partition("=")
        task, dot, option = name.strip().rpartition(".")
        if not sign or not dot or not task or not option:
            raise ConfigurationError(
                f"--option {text!r}: give a task, its option and a value, as in passkey.depth=random."
            )
        try:
            options.setdefault(task, {})[option] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigurationError(
                f"--option {text!r}: {value!r} cannot be read as YAML. Put quotation marks around a text "
                "with brackets, braces or colons."
            ) from error
    return options


@dataclass(frozen=True)
class EvaluationCall:
    """What the user asked for: the command's arguments and options, as its help explains them."""

    models: list[str]
    tasks: str
    lengths: str
    samples: int
    seed: int
    output: Path | None
    report: Path | None
    perplexity_tokens: int
    records: Path | None
    haystack: str | None
    noise: str | None
    babi: str | None
    sliding_window: str | None
    sinks: int
    attention: str
    tokenizer: str | None
    options: list[str]
    device: str | None
    dtype: str
    base: str | None


def run_evaluate(call: EvaluationCall) -> None:
    """See the command's help."""
    tasks = check_tasks([task.strip() for task in call.tasks.split(",") if task.strip()])
    lengths = parse_lengths(call.lengths, least=0)
    windows = parse_windows(call.sliding_window)
    options = parse_options(call.options)
    attention = check_attention(call.attention)
    dtype = parse_dtype(call.dtype)
    titles = _titles(call.models)
    check_device(call.device)
    if call.output is not None:
        _check_output(call.output, len(call.models), windows)
    if call.report is not None:
        _check_folder(call.report, "--report")
    num_kept = len(read_records(call.records)) if call.records is not None else 0
    samples = SampleCache()
    payloads: list[dict[str, Any]] = []
    with Display() as display, _shown_once(display):
        _check_models(call, windows, display)
        clock = _CallClock(display, call.models, windows, call.records if num_kept else None)
        try:
            for model, title in zip(call.models, titles, strict=True):
                loaded = load_model(
                    model,
                    dtype=dtype,
                    device=call.device,
                    base=call.base,
                    tokenizer=call.tokenizer,
                    progress=display.message,
                )
                # A baseline is made when its turn comes, so that no more than two models are in memory.
                for name, make in _variants(loaded, title, windows, call.sinks):
                    measured = make()
                    set_attention(measured, attention)
                    clock.begin(name)
                    payload = measure(
                        measured,
                        loaded.tokenizer,
                        name=name,
                        tasks=tasks,
                        lengths=lengths,
                        samples=call.samples,
                        seed=call.seed,
                        perplexity_tokens=call.perplexity_tokens,
                        haystack=call.haystack,
                        noise=call.noise,
                        babi=call.babi,
                        options=options,
                        records=call.records,
                        sample_cache=samples,
                        command=command_line(),
                        progress=clock.update,
                    )
                    if crashed := sum(cell["errors"] for cell in payload["results"]):
                        display.message(f"{name}: {crashed} samples crashed; they are in no score")
                    payloads.append(payload)
                    del measured
                    free_memory()
                del loaded, make
                free_memory()
        except Exception:
            if payloads and call.report is not None:
                page = write_report(call.report, payloads)
                display.message(f"report of what was measured before it went wrong: {page}")
            raise
        if windows and not any(payload["kind"] == "baseline" for payload in payloads):
            display.message("--sliding-window has no effect: there is no softmax model among the models")
        if call.output is not None:
            write_results(call.output, payloads[0])
        if call.report is not None:
            display.message(f"report: {write_report(call.report, payloads)}")
    # With a page to look all else up in, the tables are the last that is seen.
    print(markdown_report(payloads, only_tables=call.report is not None).rstrip())


def parse_windows(text: str | None) -> list[int]:
    """Return the widths of `--sliding-window`.

    >>> parse_windows("64,512"), parse_windows(None)
    ([64, 512], [])
    """
    if text is None:
        return []
    try:
        return parse_lengths(text)
    except ConfigurationError as error:
        raise ConfigurationError(f"--sliding-window: {error}") from error


def _variants(
    loaded: LoadedModel, title: str, windows: list[int], sinks: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield title, lambda: loaded.model
    if loaded.kind != "teacher":
        return
    for window in windows:
        name = f"{title} + window {window} + {sinks} sinks"
        yield name, functools.partial(sliding_window_teacher, loaded.model, window=window, num_sinks=sinks)


def _check_models(call: EvaluationCall, windows: list[int], display: Display) -> None:
    """Find out now what is wrong with the last model, and not after hours of measuring the others."""
    for model in call.models:
        config = check_model(model, base=call.base, tokenizer=call.tokenizer, progress=display.message)
        if windows and config.model_type != "lawcat" and adapter_folder(model) is None:
            family_of(config)


def _check_output(output: Path, num_models: int, windows: list[int]) -> None:
    if num_models > 1 or windows:
        raise ConfigurationError(
            "--output takes the results of one model; for several, use --report DIRECTORY."
        )
    _check_folder(output.parent, "--output")
    if output.exists():
        try:
            read_results(output)
        except DataError as error:
            raise DataError(f"--output would replace a file that is no results file: {error}") from error


def _check_folder(folder: Path, option: str) -> None:
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        reason = "may not be written to" if place.is_dir() else "is not a folder"
        raise ConfigurationError(f"{option}: nothing can be put into {folder}, because {place} {reason}.")


@contextmanager
def _shown_once(display: Display) -> Iterator[None]:
    """Show a warning of ours as a line, once however many models it is given for."""
    shown: set[str] = set()
    with warnings.catch_warnings():
        show_others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, UserWarning) or "lawcat" not in str(place[0]):
                show_others(message, category, *place, **more)
            elif str(message) not in shown:
                shown.add(str(message))
                display.message(f"note: {message}")

        warnings.showwarning = show
        yield


class _CallClock:
    """Shows how far the whole call is: the models to come are taken to cost as much as the present one."""

    def __init__(self, display: Display, models: list[str], windows: list[int], kept: Path | None) -> None:
        self.display = display
        self.kept = kept
        # Which models are teachers shows when they are loaded; most calls name one.
        self.num_models = len(models) + len(windows)
        self.num_begun = 0
        self.started = 0.0
        self.name = ""
        self.is_told = False

    def begin(self, name: str) -> None:
        """Note that a model begins."""
        self.num_begun += 1
        self.num_models = max(self.num_models, self.num_begun)
        self.name, self.started, self.is_told = name, time.monotonic(), False

    def update(self, title: str, done: int, total: int, measured: dict[str, float]) -> None:
        """Show progress of the present model, with the time left for all."""
        if self.kept is not None and not self.is_told and title.endswith(": samples"):
            self.is_told = True
            if done == 0:
                self.display.message(
                    f"{self.kept} holds no answers of {self.name} to these questions, but of another run; "
                    "they stay, and this run's are added"
                )
        if "seconds_left" in measured:
            left = measured["seconds_left"]
            others = self.num_models - self.num_begun
            whole = time.monotonic() - self.started + left
            measured = {"seconds_left": left + others * whole}
        if self.num_models > 1:
            title = f"{self.num_begun} of {self.num_models}, {title}"
        self.display.update(title, done, total, measured)


def _titles(models: list[str]) -> list[str]:
    """Return what each model is called: the last part of its path, or all of it where two would be alike."""
    short = [Path(model).name for model in models]
    if len(set(models)) < len(models):
        raise ConfigurationError("a model is named twice; name each one once.")
    return short if len(set(short)) == len(short) else models
