"""Results for people: a self-contained HTML page, and a markdown twin with its plots as files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from lawcat.errors import ConfigurationError
from lawcat.evaluation.charts import rule_accuracies, tokens_a_second
from lawcat.evaluation.comparison import HOW_COMPARED, Comparison, compare_models, comparison_notes
from lawcat.evaluation.lengths import format_length
from lawcat.evaluation.notes import provenance, report_notes
from lawcat.evaluation.plots import plot_accuracy, plot_heatmap
from lawcat.evaluation.published import published_rows
from lawcat.evaluation.results import (
    Payload,
    Results,
    cells_by_length,
    join_results,
    payloads_of,
    perplexities_by_length,
    read_results,
    result_file_name,
    slug,
    task_lengths,
    task_names,
    write_results,
)
from lawcat.files import human_bytes, write_atomic


def write_report(
    folder: str | os.PathLike[str], results: Sequence[Results], *, image_format: str = "svg"
) -> Path:
    """Write `report.html`, `report.md` with its plots, and `results-MODEL.json` of each model, into a folder.

    Args:
        folder: Made if it does not exist; files of the same names in it are replaced.
        results: One a model.
        image_format: Of the markdown page's plots: `"svg"` or `"png"`.

    Returns:
        Path of `report.html`, which needs none of the other files.

    Raises:
        ConfigurationError: for no results, two models of one name, or another format.
        MissingDependencyError: without matplotlib, which draws the markdown page's plots; `report.html` is
            written by then.
        LawcatError: if a file cannot be written.
    """
    # Imported here, because a page is asked for less often than a table.
    from lawcat.evaluation.html_report import html_report

    payloads = payloads_of(results)
    root = Path(folder)
    for payload in payloads:
        write_results(root / result_file_name(payload), payload)
    page = root / "report.html"
    write_atomic(page, html_report(payloads))
    images: dict[str, list[str]] = {}
    for task in task_names(payloads):
        names = images.setdefault(task, [])
        names.append(f"{slug(task)}.{image_format}")
        plot_accuracy(payloads, task, root / names[-1])
        for payload in payloads:
            if any(cell.get("depths") for cell in cells_by_length(payload, task).values()):
                names.append(f"{slug(task)}-{slug(payload['model'])}.{image_format}")
                plot_heatmap(payload, task, root / names[-1])
    write_atomic(root / "report.md", markdown_report(payloads, images=images, details=True))
    return page


def report_from_files(
    paths: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    image_format: str = "svg",
) -> Path:
    """Write a report of results that were stored, as by several runs.

    Args:
        paths: Results files. Those of one model are put together; models stand in the order of the files, and
            where none says that it is a student, the others are compared with the first.
        folder: As of `write_report`.
        names: What the model of each file is called, in place of the name that it was measured under.
        image_format: As of `write_report`.

    Returns:
        Path of `report.html`.

    Raises:
        DataError: if a file is missing, damaged or something else.
        ConfigurationError: for no files, not one name a file, or files that cannot be of one model though
            they say so.
        MissingDependencyError: without matplotlib.
        LawcatError: if a file cannot be written.
    """
    if not paths:
        raise ConfigurationError("There are no results to report. Give files that 'lawcat eval' wrote.")
    payloads = [read_results(path) for path in paths]
    if names is not None:
        if len(names) != len(payloads) or not all(names):
            got = ", ".join(map(repr, names)) or "none"
            raise ConfigurationError(f"names: got {got} for {len(payloads)} files; give one name a file.")
        payloads = [{**payload, "model": name} for payload, name in zip(payloads, names, strict=True)]
    return write_report(folder, join_results(payloads), image_format=image_format)


def markdown_report(
    results: Sequence[Results],
    *,
    images: Mapping[str, Sequence[str]] | None = None,
    details: bool = False,
    only_tables: bool = False,
) -> str:
    """Return a page with a table for each task, models down and lengths across, and what to know about them.

    Args:
        results: One a model.
        images: File names of plots to show under a task.
        details: Whether it also has what others published, and time and memory of every cell.
        only_tables: Whether it leaves out who first beats whom and how it was made, for a terminal beside a
            page that has both.

    Returns:
        Markdown.

    Raises:
        ConfigurationError: if `results` is empty.
    """
    payloads = payloads_of(results)
    lines: list[str] = (
        [] if only_tables else ["# Evaluation", "", *_comparison_table(compare_models(payloads))]
    )
    for task in task_names(payloads):
        lengths = task_lengths(payloads, task)
        cells = [cell for payload in payloads for cell in cells_by_length(payload, task).values()]
        starred = any(cell.get("beyond_window") for cell in cells)
        lines += [
            f"## {task}",
            "",
            f"{cells[0]['metric']} in percent, with Wilson's 95% interval."
            + (" A star: prompts longer than the window the model declares." if starred else ""),
            "",
        ]
        rows = []
        for payload in payloads:
            found = cells_by_length(payload, task)
            rows.append([payload["model"], *(_percent(found.get(length)) for length in lengths)])
        for name, values in rule_accuracies(payloads, task).items():
            shares = [f"{100 * values[length]:.0f}" if length in values else "-" for length in lengths]
            rows.append([f"*rule: {name}*", *shares])
        lines += _table(["model", *map(format_length, lengths)], rows)
        names = (images or {}).get(task, [])
        lines += [*(f"![{Path(name).stem}]({name})" for name in names), ""] if names else []
        lines += _published_table(task) if details else []
    lines += _perplexity_table(payloads)
    lines += _cost_table(payloads) if details else []
    notes = [note for payload in payloads for note in report_notes(payload)] + comparison_notes(payloads)
    lines += ["## What to know", "", *(f"- {note}" for note in notes), ""] if notes else []
    if not only_tables:
        lines += _how_it_was_made(payloads)
    return "\n".join(lines) + "\n"


def _how_it_was_made(payloads: Sequence[Payload]) -> list[str]:
    lines = ["## How it was made", ""]
    for payload in payloads:
        for what, value in provenance(payload):
            value = f"`{value}`" if what == "command" else value
            lines.append(f"- {payload['model']}, {what}: {value}")
    return lines


def _comparison_table(comparisons: Sequence[Comparison]) -> list[str]:
    if not comparisons:
        return []

    def at(length: int | None) -> str:
        return "-" if length is None else format_length(length)

    rows = [
        [
            one.task,
            one.model,
            one.baseline,
            at(one.first_beats),
            at(one.first_loses),
            at(one.first_ahead),
            at(one.first_behind),
        ]
        for one in comparisons
    ]
    head = [
        "task",
        "model",
        "against",
        "first beats at",
        "first loses at",
        "first ahead at",
        "first behind at",
    ]
    return ["## Where each first beats and first loses", "", HOW_COMPARED, "", *_table(head, rows, text=3)]


def _published_table(task: str) -> list[str]:
    rows = published_rows(task)
    if not rows:
        return []
    lengths = sorted({length for row in rows for length in row.accuracy})
    cells = [
        [
            row.model,
            row.training,
            row.source,
            *(f"{row.accuracy[length]:g}" if length in row.accuracy else "-" for length in lengths),
        ]
        for row in rows
    ]
    conditions = dict.fromkeys(f"{row.source}: {row.conditions}." for row in rows)
    return [
        f"Published by others on {task}, not measured here:",
        "",
        *_table(["model", "training", "source", *map(format_length, lengths)], cells, text=3),
        *(f"- {line}" for line in conditions),
        "",
    ]


def _perplexity_table(payloads: Sequence[Payload]) -> list[str]:
    found = {payload["model"]: perplexities_by_length(payload) for payload in payloads}
    lengths = sorted({length for by_length in found.values() for length in by_length})
    if not lengths:
        return []
    text = next(one["source"] for by_length in found.values() for one in by_length.values())
    rows = []
    for model, by_length in found.items():
        values = [by_length.get(length, {}).get("perplexity") for length in lengths]
        rows.append([model, *("-" if value is None else f"{value:.1f}" for value in values)])
    return [
        "## perplexity",
        "",
        f"By length of the window, on {text['name']} (SHA-256 {text['sha256'][:16]}...).",
        "",
        *_table(["model", *map(format_length, lengths)], rows),
    ]


def _cost_table(payloads: Sequence[Payload]) -> list[str]:
    rows = []
    for task in task_names(payloads):
        for length in task_lengths(payloads, task):
            for payload in payloads:
                cell = cells_by_length(payload, task).get(length)
                if cell is None or not cell.get("seconds"):
                    continue
                speed, state = tokens_a_second(cell), cell.get("state_bytes")
                rows.append(
                    [
                        task,
                        format_length(length),
                        payload["model"],
                        _percent(cell),
                        f"{cell['seconds']:.1f}",
                        "-" if speed is None else f"{speed:,.0f}",
                        "-" if state is None else human_bytes(state),
                    ]
                )
    head = ["task", "length", "model", "accuracy", "seconds", "tokens/s", "state of a sequence"]
    return ["## Time and memory", "", *_table(head, rows, text=3)] if rows else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 1) -> list[str]:
    """Return a table whose first `text` columns are text, the others numbers."""
    align = "| " + " | ".join(["---"] * text + ["---:"] * (len(head) - text)) + " |"
    # A bar in a model's name would end its cell.
    body = [f"| {' | '.join(str(value).replace('|', chr(92) + '|') for value in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", align, *body, ""]


def _percent(cell: Payload | None) -> str:
    if cell is None:
        return "-"
    if cell["accuracy"] is None:
        return "crashed"
    low, high = cell["ci95"]
    mark = " \\*" if cell.get("beyond_window") else ""
    return f"{100 * cell['accuracy']:.0f} [{100 * low:.0f}, {100 * high:.0f}]{mark}"


__all__ = [
    "markdown_report",
    "plot_accuracy",
    "plot_heatmap",
    "read_results",
    "report_from_files",
    "report_notes",
    "write_report",
    "write_results",
]
