"""Variants of one recipe trained beside each other, and measured on the same samples.

``<out>/<variant>`` is a student like any other, ``<out>/<variant>-seed1`` the same from another seed. What
has been done is read from there, so a call that was interrupted goes on, and several processes that are given
the same ``<out>`` share the work.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lawcat.convert.teacher import resolve_teacher
from lawcat.distill.assessment import EVALUATION_FOLDER, assess, measured, stored_results
from lawcat.distill.linearize import RUN_NAME, check_config, end_process_group, linearize
from lawcat.distill.recipe import Matrix, Recipe, Variant, dotted_keys
from lawcat.distill.text import Progress
from lawcat.errors import BusyError, ConfigurationError, LawcatError
from lawcat.evaluation.lengths import format_length
from lawcat.evaluation.report import write_report
from lawcat.files import is_being_written, write_atomic
from lawcat.memory import free_memory

MATRIX_NAME = "matrix.json"
TABLE_NAME = "matrix.md"
REPORT_FOLDER = "report"

State = Literal["finished", "failed", "busy", "not finished"]


@dataclass(frozen=True)
class MatrixRun:
    """One student of a matrix.

    Attributes:
        variant: Name of its variant.
        seed: Its seed.
        whole: The recipe with the matrix.
        overrides: What the variant changes, by dotted key.
        path: Its directory.
        state: ``"finished"``; ``"failed"``; ``"busy"`` where another process trains it; ``"not finished"``.
        error: What went wrong with it, be it in training or when it was measured.
        trace: Where in the program, if it was no error of lawcat's own.
    """

    variant: str
    seed: int
    whole: Recipe
    overrides: Mapping[str, Any]
    path: Path
    state: State = "not finished"
    error: str | None = None
    trace: str | None = None

    @property
    def name(self) -> str:
        """The name of its directory, which is what tables and results call it."""
        return self.path.name

    @cached_property
    def recipe(self) -> Recipe:
        """Its own recipe, all overrides applied.

        Raises:
            ConfigurationError: if what is set for all variants cannot be combined with this one; which nobody
                has asked for then.
        """
        return self.whole.variant(self.variant, self.seed)


@dataclass(frozen=True)
class MatrixResult:
    """What `linearize_matrix` left.

    Attributes:
        path: The directory that holds the students, ``matrix.md``, ``matrix.json`` and ``report``.
        runs: All students of the matrix, in its order, also those that this call was not asked for.
        failed: Those of this call with which something went wrong.
        table: The summary, in Markdown.
    """

    path: Path
    runs: tuple[MatrixRun, ...]
    failed: tuple[MatrixRun, ...]
    table: str


def linearize_matrix(
    teacher: str,
    out: str | Path,
    recipe: str | Path | Recipe,
    *,
    variants: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    evaluate: bool = True,
    progress: Progress | None = None,
    message: Callable[[str], None] = lambda text: None,
    tensorboard: bool = False,
    **overrides: Any,
) -> MatrixResult:
    """Train the variants of a recipe one after another, then measure them and their teacher.

    What is finished is not done again; what was interrupted goes on. A variant that another process trains at
    the moment is passed over. One that fails is told, and the others go on; only where several processes
    train one student together does an error end them all. Their group ends with the training.

    Args:
        teacher: As in `lawcat.linearize`.
        out: Directory of the whole; must not exist, unless from this matrix.
        recipe: A recipe, the name of a shipped one, or a YAML file. One without a matrix is taken for a
            matrix with one variant, named after it.
        variants: Names of those to train; ``None`` is all.
        seeds: Seeds to train each with; ``None`` is what the recipe says. A student of the recipe's own seed
            has no seed in its name.
        evaluate: Whether they are measured as the recipe says, and a report is written.
        progress: Called after each step, as in `lawcat.linearize`.
        message: Called with a line of text when something begins.
        tensorboard: As in `lawcat.linearize`.
        overrides: Fields to change in all variants.

    Returns:
        All students of the matrix and what is known of them.

    Raises:
        LawcatError: for a teacher, recipe, variant or directory that cannot be used.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when the work so far is saved.

    Example:
        >>> from lawcat.distill.matrix import linearize_matrix
        >>> linearize_matrix("smollm2-135m-instruct", "out/ablations", "ablations")  # doctest: +SKIP
    """
    settings = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if overrides:
        settings = settings.with_overrides(dotted_keys(overrides))
    directory = Path(out)
    settings, asked = plan(settings, directory, variants, seeds)
    is_main = not int(os.environ.get("RANK", "0"))
    if not is_main:  # of several processes that train together, one tells and writes
        progress, message = None, _silent
    record = _read_record(directory) if is_main else None

    def check(config: Any) -> None:
        for run in asked:
            try:
                check_config(run.recipe)(config)
            except ConfigurationError as error:
                raise ConfigurationError(f"variant {run.name}: {error}") from error

    source = resolve_teacher(teacher, progress=message, check_config=check)
    if is_main:
        _begin(directory, record, settings, source.fingerprint)
    done: dict[str, MatrixRun] = {}
    for number, run in enumerate(asked, 1):
        message(f"variant {number} of {len(asked)}: {run.name}")
        done[run.name] = _train(run, teacher, progress=progress, message=message, tensorboard=tensorboard)
        free_memory()
        if is_main:
            _summarize(directory, settings, source.fingerprint, done)
    end_process_group()  # one of them measures, and the others would wait for it at their end
    if is_main and evaluate and (settings.evaluation.tasks or settings.evaluation.perplexity_tokens):
        shared = directory / EVALUATION_FOLDER
        for run in asked:
            if done[run.name].state == "finished":
                done[run.name] = _measure(done[run.name], teacher, shared, progress, message)
                _summarize(directory, settings, source.fingerprint, done)
        _write_report(directory, settings, teacher, shared, progress, message)
    if not is_main:
        return MatrixResult(directory, tuple(done.values()), (), "")
    return _summarize(directory, settings, source.fingerprint, done)


def _silent(text: str) -> None:
    """Say nothing."""


def plan(
    recipe: Recipe,
    out: Path,
    variants: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> tuple[Recipe, list[MatrixRun]]:
    """Return a recipe with a matrix, and the runs that are asked of it, in the order of the matrix.

    Args:
        recipe: A recipe; one without a matrix gets one with a single variant.
        out: Directory of the whole.
        variants: Names of variants; ``None`` is all.
        seeds: Seeds; ``None`` is what the recipe says.

    Raises:
        ConfigurationError: for a variant that does not exist or cannot be combined with what is set for all,
            or seeds that cannot be.
    """
    if recipe.matrix is None:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", recipe.name).strip("-._") or "student"
        recipe = replace(recipe, matrix=Matrix((Variant(name, {}),)))
    matrix = recipe.matrix
    assert matrix is not None
    if variants is not None and not variants:
        raise ConfigurationError(f"No variant is named; there are {', '.join(matrix.names)}.")
    for name in matrix.names if variants is None else variants:
        recipe.variant(name)
    if seeds is not None and (not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0):
        raise ConfigurationError(f"seeds: got {list(seeds)}; give at least one, each once and 0 or more.")
    runs = []
    for variant in matrix.variants:
        if variants is None or variant.name in variants:
            for seed in seeds or variant.seeds or matrix.seeds or (recipe.seed,):
                runs.append(_run(recipe, variant, seed, out))
    return recipe, runs


def _run(recipe: Recipe, variant: Variant, seed: int, out: Path) -> MatrixRun:
    folder = variant.name if seed == recipe.seed else f"{variant.name}-seed{seed}"
    return MatrixRun(variant.name, seed, recipe, dict(variant.overrides), out / folder)


def _read_record(directory: Path) -> dict[str, Any] | None:
    """Return what was written of a matrix before; None where there is nothing yet."""
    if not os.path.lexists(directory):
        return None
    try:
        record = json.loads((directory / MATRIX_NAME).read_bytes())
        if record["schema"] == 1 and isinstance(record["runs"], list):
            return dict(record)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if directory.is_dir() and all(is_being_written(path) for path in directory.iterdir()):
        return None
    raise ConfigurationError(
        f"{directory} exists and does not hold the students of a matrix; nothing was overwritten. Choose "
        "another output directory."
    )


def _begin(directory: Path, record: dict[str, Any] | None, recipe: Recipe, teacher: str) -> None:
    if record is not None and record.get("teacher") != teacher:
        raise ConfigurationError(
            f"{directory} holds the students of another teacher; nothing was overwritten. Choose another "
            "output directory."
        )
    if record is None:
        _write_record(directory, recipe, teacher, [])


def _train(run: MatrixRun, teacher: str, **options: Any) -> MatrixRun:
    try:
        linearize(teacher, run.path, run.recipe, **options)
    except BusyError as error:
        options["message"](f"{run.name}: {error}")
        return replace(run, state="busy")
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise  # the other processes of this run wait for this one, and would for ever
        return _failed(replace(run, state="failed"), error, options["message"])
    return replace(run, state="finished")


def _failed(run: MatrixRun, error: Exception, message: Callable[[str], None]) -> MatrixRun:
    if isinstance(error, LawcatError):
        told, trace = str(error), None
    else:
        told = f"{type(error).__name__}: {error}".strip().rstrip(":")
        trace = "".join(traceback.format_exception(error))
    message(f"{run.name} FAILED: {told}")
    return replace(run, error=told, trace=trace)


def _measure(
    run: MatrixRun,
    teacher: str,
    shared: Path,
    progress: Progress | None,
    message: Callable[[str], None],
) -> MatrixRun:
    try:
        assess(
            run.path,
            teacher,
            run.recipe,
            name=run.name,
            teacher_folder=shared,
            progress=progress,
            message=message,
        )
    except Exception as error:
        return _failed(run, error, message)
    return run


def _write_report(
    directory: Path,
    recipe: Recipe,
    teacher: str,
    shared: Path,
    progress: Progress | None,
    message: Callable[[str], None],
) -> None:
    students = [_results(run) for run in _known_runs(directory, recipe)]
    payloads = [payload for payload in students if payload is not None]
    if not payloads:
        return
    try:
        payloads.insert(0, measured(teacher, "teacher", shared, recipe, progress, message))
        message(f"report: {write_report(directory / REPORT_FOLDER, payloads)}")
    except Exception as error:  # all that it would show is kept, and a report can be made of it later
        message(f"no report: {error}")


def _known_runs(directory: Path, recipe: Recipe) -> list[MatrixRun]:
    """Return the runs that the recipe asks for, and those of other seeds that are there."""
    matrix = recipe.matrix
    assert matrix is not None
    runs = []
    for variant in matrix.variants:
        seeds = list(variant.seeds or matrix.seeds or (recipe.seed,))
        ending = re.compile(re.escape(variant.name) + r"-seed(\d+)(\.training)?")
        there = [path.name for path in directory.iterdir()] if directory.is_dir() else []
        matches = [ending.fullmatch(name) for name in there]
        found = {int(match[1]) for match in matches if match}
        if variant.name in there or f"{variant.name}.training" in there:
            found.add(recipe.seed)
        seeds += sorted(found - set(seeds))
        runs += [_run(recipe, variant, seed, directory) for seed in seeds]
    return runs


def _results(run: MatrixRun) -> dict[str, Any] | None:
    file = run.path / EVALUATION_FOLDER / "student.json"
    found = stored_results(file, run.whole.evaluation)
    return found if found is not None and found["model"] == run.name else None


def _summarize(directory: Path, recipe: Recipe, teacher: str, done: Mapping[str, MatrixRun]) -> MatrixResult:
    """Write and return what is known of all students, be they of this call, an earlier or another one."""
    record = _read_record(directory) or {}
    earlier = {entry.get("name"): entry for entry in record.get("runs", ())}
    runs, entries = [], []
    for known in _known_runs(directory, recipe):
        run = done.get(known.name, known)
        if run.state in ("not finished", "busy") and (run.path / RUN_NAME).is_file():
            run = replace(run, state="finished")
        elif known.name not in done and (error := earlier.get(known.name, {}).get("error")):
            run = replace(run, state="failed", error=error, trace=earlier[known.name].get("trace"))
        runs.append(run)
        entries.append(_entry(run))
    teacher_results = stored_results(directory / EVALUATION_FOLDER / "teacher.json", recipe.evaluation)
    table = matrix_table(recipe, entries, teacher_results)
    _write_record(directory, recipe, teacher, entries)
    write_atomic(directory / TABLE_NAME, table)
    failed = tuple(run for run in done.values() if run.error is not None)
    return MatrixResult(directory, tuple(runs), failed, table)


def _write_record(directory: Path, recipe: Recipe, teacher: str, entries: list[dict[str, Any]]) -> None:
    record = {"schema": 1, "teacher": teacher, "recipe": recipe.to_dict(), "runs": entries}
    write_atomic(directory / MATRIX_NAME, json.dumps(record, indent=1) + "\n")


def _entry(run: MatrixRun) -> dict[str, Any]:
    """Return what the record says of a run: what it is, what it cost, what was measured."""
    entry: dict[str, Any] = {
        "name": run.name,
        "variant": run.variant,
        "seed": run.seed,
        "overrides": dict(run.overrides),
        "state": run.state,
        "error": run.error,
        "trace": run.trace,
    }
    try:
        record = json.loads((run.path / RUN_NAME).read_bytes())
        stages = record["stages"].values()
        entry |= {
            "training_s": round(sum(stage["seconds"] for stage in stages), 1),
            "trained_tokens": sum(stage["trained_tokens"] for stage in stages),
            "read_tokens": sum(stage["tokens"] for stage in stages),
            "last_losses": {number: stage["last_loss"] for number, stage in record["stages"].items()},
            "device": record["device"],
            "precision": record["precision"],
        }
    except (OSError, ValueError, KeyError, TypeError):
        return entry
    if (found := _results(run)) is not None:
        wanted = ("task", "length", "samples", "accuracy", "ci95", "errors", "beyond_window")
        entry["results"] = [{name: cell.get(name) for name in wanted} for cell in found["results"]]
        entry["perplexity"] = [
            {"length": one["length"], "perplexity": one["perplexity"]} for one in found.get("perplexity", ())
        ]
    return entry


def matrix_table(
    recipe: Recipe, entries: Sequence[Mapping[str, Any]], teacher: Mapping[str, Any] | None
) -> str:
    """Return the summary of a matrix in Markdown: what each variant is and cost, and a table for each task.

    Args:
        recipe: The recipe with its matrix.
        entries: The runs, as ``matrix.json`` has them.
        teacher: The teacher's results, for a row of its own.
    """
    lines = [f"# {recipe.name}", ""]
    lines += [recipe.description, ""] if recipe.description else []
    lines += [
        "| variant | seed | differs in | tokens trained / read | training | stage-1 error | state |",
        "| --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for entry in entries:
        tokens = seconds = error = "-"
        if "trained_tokens" in entry:
            tokens = f"{entry['trained_tokens']:,} / {entry['read_tokens']:,}"
            seconds = f"{entry['training_s']:,.0f} s"
            error = _number(entry["last_losses"].get("1"), ".3f")
        differs = ", ".join(
            f"`{key}: {_plain(value)}`".replace("|", "\\|") for key, value in entry["overrides"].items()
        )
        lines.append(
            f"| {entry['variant']} | {entry['seed']} | {differs or '-'} | {tokens} | {seconds} | {error} | "
            f"{entry['state']} |"
        )
    rows = [{"name": "teacher", "variant": "teacher", **teacher}] if teacher is not None else []
    rows += [dict(entry) for entry in entries if "results" in entry]
    tasks = dict.fromkeys(cell["task"] for row in rows for cell in row["results"])
    for task in tasks:
        lines += ["", f"## {task}", "", "Accuracy in percent, with Wilson's 95% interval."]
        cells = [{c["length"]: c for c in row["results"] if c["task"] == task} for row in rows]
        lines += _length_table(rows, cells, _accuracy, "accuracy", percent=True)
    if any(row.get("perplexity") for row in rows):
        lines += ["", "## perplexity"]
        cells = [{one["length"]: one for one in row.get("perplexity", ())} for row in rows]
        lines += _length_table(
            rows, cells, lambda cell: _number(cell["perplexity"], ".2f"), "perplexity", percent=False
        )
    failures = [entry for entry in entries if entry["error"]]
    if failures:
        lines += ["", "## Failed", ""]
        lines += [f"- {entry['name']}: {_one_line(entry['error'])}" for entry in failures]
    return "\n".join(lines) + "\n"


def _length_table(
    rows: Sequence[Mapping[str, Any]],
    cells: Sequence[Mapping[int, Mapping[str, Any]]],
    show: Callable[[Mapping[str, Any]], str],
    key: str,
    *,
    percent: bool,
) -> list[str]:
    """Return a table of lengths across, and under the seeds of a variant their mean and range."""
    lengths = sorted({length for by_length in cells for length in by_length})
    lines = ["", f"| variant | {' | '.join(map(format_length, lengths))} |"]
    lines.append(f"| --- {'| ---: ' * len(lengths)}|")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [(row, found) for row, found in zip(rows, cells, strict=True) if row["variant"] == variant]
        for row, found in own:
            shown = [show(found[length]) if length in found else "-" for length in lengths]
            lines.append(f"| {row['name']} | {' | '.join(shown)} |")
        if len(own) > 1:
            means = []
            for length in lengths:
                values = [found[length][key] for _, found in own if length in found]
                means.append(_mean_and_range([v for v in values if v is not None], percent))
            lines.append(f"| *{variant}, {len(own)} seeds: mean (range)* | {' | '.join(means)} |")
    return lines


def _mean_and_range(values: Sequence[float], percent: bool) -> str:
    if not values:
        return "-"
    scale, form = (100, ".0f") if percent else (1, ".2f")
    mean, low, high = (scale * value for value in (statistics.fmean(values), min(values), max(values)))
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def _accuracy(cell: Mapping[str, Any]) -> str:
    if cell["accuracy"] is None:
        return "crashed"
    low, high = cell["ci95"]
    return f"{100 * cell['accuracy']:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())
