"""Results for people and programs: a JSON file, a markdown page, plots."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lawcat.errors import ConfigurationError, DataError, MissingDependencyError
from lawcat.evaluation.lengths import format_length
from lawcat.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lawcat.evaluation.runner import EvaluationResult

Results: TypeAlias = "EvaluationResult | Mapping[str, Any]"
"""What `evaluate` returns, or the same as a results file holds it."""

_FORMATS = (".svg", ".png")


def write_results(path: str | os.PathLike[str], results: Results, command: str | None = None) -> None:
    """Write a results file, whole or not at all.

    Args:
        path: The JSON file; one that exists is replaced.
        results: Of one model.
        command: How the evaluation was called, where `results` does not say so itself.

    Raises:
        LawcatError: if it cannot be written. An existing file is then as it was.
    """
    write_atomic(path, json.dumps(_payload(results, command), indent=1, allow_nan=False) + "\n")


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a results file.

    Args:
        path: A file that `write_results` wrote.

    Returns:
        `{"schema": 1, "model": ..., "versions": ..., "results": [...]}`.

    Raises:
        DataError: if the file is missing, damaged or something else.
    """
    try:
        payload = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{os.fspath(path)} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise DataError(f"{os.fspath(path)} is not a results file: it is not JSON ({error}).") from error
    if (
        not isinstance(payload, dict)
        or payload.get("schema") != 1
        or not isinstance(payload.get("results"), list)
    ):
        raise DataError(
            f"{os.fspath(path)} is not a results file of schema 1. Give one that 'lawcat eval' wrote."
        )
    return payload


def markdown_report(results: Sequence[Results], *, images: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return a page with a table for each task, models down and lengths across, and what to know about them.

    Args:
        results: One a model.
        images: File names of plots to show under a task.

    Returns:
        Markdown.

    Raises:
        ConfigurationError: if `results` is empty.
    """
    payloads = _payloads(results)
    lines = ["# Evaluation", ""]
    for task in _tasks(payloads):
        lengths = _lengths(payloads, task)
        cells = [cell for payload in payloads for cell in _cells(payload, task).values()]
        starred = any(cell.get("beyond_window") for cell in cells)
        lines += [
            f"## {task}",
            "",
            f"{cells[0]['metric']} in percent, with Wilson's 95% interval."
            + (" A star: prompts longer than the window the model declares." if starred else ""),
            "",
            f"| model | {' | '.join(map(format_length, lengths))} |",
            f"| --- {'| ---: ' * len(lengths)}|",
        ]
        for payload in payloads:
            found = _cells(payload, task)
            row = [_percent(found.get(length)) for length in lengths]
            lines.append(f"| {payload['model']} | {' | '.join(row)} |")
        lines.append("")
        lines += [f"![{Path(name).stem}]({name})" for name in (images or {}).get(task, [])]
        lines += [""] if (images or {}).get(task) else []
    lines += _perplexity_table(payloads)
    notes = [note for payload in payloads for note in report_notes(payload)]
    lines += ["## What to know", "", *(f"- {note}" for note in notes), ""] if notes else []
    lines += ["## How it was made", ""]
    for payload in payloads:
        lines += [f"- {line}" for line in _provenance(payload)]
    return "\n".join(lines) + "\n"


def report_notes(results: Results) -> list[str]:
    """Return, a sentence each, what a reader of the numbers has to know: crashes, windows, repeated text.

    Args:
        results: Of one model.

    Returns:
        Sentences; none if there is nothing to say.
    """
    payload = _payload(results)
    notes = []
    for cell in payload["results"]:
        where = f"{payload['model']}, {cell['task']} at {format_length(cell['length'])}"
        if cell.get("errors"):
            total = cell["errors"] + cell["samples"]
            notes.append(f"{where}: {cell['errors']} of {total} samples crashed and are in no score.")
        if cell.get("beyond_window"):
            notes.append(f"{where}: prompts are longer than the window the model declares; none was cut.")
        if cell.get("haystack_repeats"):
            times = cell["haystack_repeats"]
            notes.append(f"{where}: the haystack was too short; prompts repeat it {times} times.")
    return notes


def plot_accuracy(results: Sequence[Results], task: str, path: str | os.PathLike[str]) -> None:
    """Draw accuracy by length, a line a model, with intervals.

    Args:
        results: One a model.
        task: Which task.
        path: `.svg` or `.png`.

    Raises:
        ConfigurationError: for another ending, or a task that is not in the results.
        MissingDependencyError: without matplotlib.
        LawcatError: if the file cannot be written.
    """
    payloads = _payloads(results)
    lengths = _lengths(payloads, task)
    figure = _figure(7, 4)
    axes = figure.add_subplot()
    for number, payload in enumerate(payloads):
        cells = [cell for _, cell in sorted(_cells(payload, task).items()) if cell["accuracy"] is not None]
        if not cells:
            continue
        accuracy = [100 * cell["accuracy"] for cell in cells]
        below = [100 * (cell["accuracy"] - cell["ci95"][0]) for cell in cells]
        above = [100 * (cell["ci95"][1] - cell["accuracy"]) for cell in cells]
        # A little apart, so that the bars of two models at the same length can be told apart.
        places = [cell["length"] * 1.02 ** (number - (len(payloads) - 1) / 2) for cell in cells]
        axes.errorbar(places, accuracy, yerr=[below, above], marker="o", capsize=3, label=payload["model"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [format_length(length) for length in lengths])
    axes.minorticks_off()
    axes.set(xlabel="length (tokens)", ylabel="accuracy (%)", ylim=(-3, 103), title=task)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_heatmap(results: Results, task: str, path: str | os.PathLike[str]) -> None:
    """Draw accuracy by length and depth of the needle.

    Args:
        results: Of one model.
        task: Which task.
        path: `.svg` or `.png`.

    Raises:
        ConfigurationError: for another ending, or a task that is not in the results or has no depths.
        MissingDependencyError: without matplotlib.
        LawcatError: if the file cannot be written.
    """
    payload = _payload(results)
    lengths = _lengths([payload], task)
    cells = _cells(payload, task)
    found = {
        (round(entry["depth"], 1), length): entry["accuracy"]
        for length in lengths
        for entry in cells[length].get("depths", [])
    }
    if not found:
        raise ConfigurationError(f"The samples of {task!r} have no depth, so there is no heatmap of it.")
    depths = [step / 10 for step in range(11)]
    grid = [[100 * found.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    figure = _figure(2.2 + 0.7 * len(lengths), 4.4)
    from matplotlib import colormaps

    axes = figure.add_subplot()
    colors = colormaps["viridis"].with_extremes(bad="0.85")
    image = axes.imshow(grid, vmin=0, vmax=100, cmap=colors, aspect="auto")
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if value == value:
                color = "black" if value > 55 else "white"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(lengths)), [format_length(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
    axes.set(xlabel="length (tokens)", ylabel="depth (%)", title=f"{task}, {payload['model']}")
    figure.colorbar(image, label="accuracy (%)")
    _save(figure, path)


def write_report(
    folder: str | os.PathLike[str], results: Sequence[Results], *, image_format: str = "svg"
) -> Path:
    """Write `report.md` with its plots, and `results-MODEL.json` of each model, into a folder.

    Args:
        folder: Made if it does not exist; files of the same names in it are replaced.
        results: One a model.
        image_format: `"svg"` or `"png"`.

    Returns:
        Path of the page.

    Raises:
        ConfigurationError: for no results, or another format.
        MissingDependencyError: without matplotlib.
        LawcatError: if a file cannot be written.
    """
    payloads = _payloads(results)
    root = Path(folder)
    images: dict[str, list[str]] = {}
    for task in _tasks(payloads):
        names = images.setdefault(task, [])
        names.append(f"{_slug(task)}.{image_format}")
        plot_accuracy(payloads, task, root / names[-1])
        for payload in payloads:
            if any(cell.get("depths") for cell in _cells(payload, task).values()):
                names.append(f"{_slug(task)}-{_slug(payload['model'])}.{image_format}")
                plot_heatmap(payload, task, root / names[-1])
    for payload in payloads:
        write_results(root / f"results-{_slug(payload['model'])}.json", payload)
    page = root / "report.md"
    write_atomic(page, markdown_report(payloads, images=images))
    return page


def _payload(results: Results, command: str | None = None) -> Mapping[str, Any]:
    payload = results if isinstance(results, Mapping) else results.to_json(command)
    return {**payload, "command": command} if command and not payload.get("command") else payload


def _payloads(results: Sequence[Results]) -> list[Mapping[str, Any]]:
    payloads = [_payload(one) for one in results]
    if not any(payload["results"] or payload.get("perplexity") for payload in payloads):
        raise ConfigurationError("There are no results to report.")
    names = [str(payload["model"]) for payload in payloads]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(
                f"Two results are of a model named {name!r}. Give each a name of its own."
            )
    return payloads


def _tasks(payloads: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(cell["task"] for payload in payloads for cell in payload["results"]))


def _cells(payload: Mapping[str, Any], task: str) -> dict[int, Mapping[str, Any]]:
    return {cell["length"]: cell for cell in payload["results"] if cell["task"] == task}


def _lengths(payloads: Sequence[Mapping[str, Any]], task: str) -> list[int]:
    lengths = sorted({length for payload in payloads for length in _cells(payload, task)})
    if not lengths:
        there_are = ", ".join(_tasks(payloads))
        raise ConfigurationError(f"There are no results of {task!r}; there are: {there_are}.")
    return lengths


def _perplexity_table(payloads: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {p["model"]: {one["length"]: one for one in p.get("perplexity", [])} for p in payloads}
    lengths = sorted({length for by_length in found.values() for length in by_length})
    if not lengths:
        return []
    text = next(one["source"] for by_length in found.values() for one in by_length.values())
    lines = [
        "## perplexity",
        "",
        f"By length of the window, on {text['name']} (SHA-256 {text['sha256'][:16]}...).",
        "",
        f"| model | {' | '.join(map(format_length, lengths))} |",
        f"| --- {'| ---: ' * len(lengths)}|",
    ]
    for model, by_length in found.items():
        cells = [by_length.get(length, {}).get("perplexity") for length in lengths]
        lines.append(f"| {model} | {' | '.join('-' if c is None else f'{c:.1f}' for c in cells)} |")
    return [*lines, ""]


def _percent(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "-"
    if cell["accuracy"] is None:
        return "crashed"
    low, high = cell["ci95"]
    mark = " \\*" if cell.get("beyond_window") else ""
    return f"{100 * cell['accuracy']:.0f} [{100 * low:.0f}, {100 * high:.0f}]{mark}"


def _provenance(payload: Mapping[str, Any]) -> list[str]:
    lines = []
    versions = ", ".join(f"{name} {version}" for name, version in payload.get("versions", {}).items())
    model = payload["model"]
    sizes = [cell["samples"] + cell.get("errors", 0) for cell in payload["results"]] or [0]
    samples = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    lines.append(f"{model}: {samples} samples a cell, seed {payload.get('seed')}; {versions}.")
    if payload.get("command"):
        lines.append(f"{model}: `{payload['command']}`")
    haystacks = {
        (cell["task"], cell["haystack"]["name"], cell["haystack"]["sha256"])
        for cell in payload["results"]
        if cell.get("haystack")
    }
    for task, name, sha256 in sorted(haystacks):
        lines.append(f"{model}, {task}: haystack {name}, SHA-256 {sha256[:16]}...")
    for task in _tasks([payload]):
        cells = _cells(payload, task).items()
        tokens = ", ".join(
            f"{format_length(length)}: {cell['mean_tokens']:.0f}"
            for length, cell in sorted(cells)
            if cell.get("mean_tokens") is not None
        )
        if tokens:
            lines.append(f"{model}, {task}: true mean length of the prompts in tokens, {tokens}.")
    return lines


def _figure(width: float, height: float) -> Figure:
    try:
        # Not pyplot, which would look for a screen.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "eval", "Drawing plots") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    from matplotlib import rc_context

    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise ConfigurationError(f"A plot cannot be written as {suffix!r}; use one of {', '.join(_FORMATS)}.")
    buffer = io.BytesIO()
    # Without a date and with a fixed salt the same results give the same file.
    metadata = {"Date": None} if suffix == ".svg" else {}
    with rc_context({"svg.hashsalt": "lawcat"}):
        figure.savefig(buffer, format=suffix[1:], dpi=150, metadata=metadata)
    write_atomic(path, buffer.getvalue())


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "model"
