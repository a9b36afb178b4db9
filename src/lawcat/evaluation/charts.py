"""What a plot shows, apart from how it is drawn: the page and the image files draw the same charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lawcat.evaluation.lengths import format_length
from lawcat.evaluation.published import published_rows
from lawcat.evaluation.results import Payload, cells_by_length, perplexities_by_length, task_lengths
from lawcat.files import human_bytes

Kind = Literal["measured", "published", "rule"]


@dataclass(frozen=True)
class Point:
    """A place on a line.

    Args:
        x: Tokens, 0 or more.
        y: Value.
        low: Lower end of its interval, or None.
        high: Upper end, or None.
        note: What it is, in words.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Line:
    """Points of one name.

    Args:
        name: What the legend says.
        kind: Measured here, published by others, or a rule that needs no model.
        style: Number of its colour and marker: the same model has the same number in every chart.
        points: Smallest x first.
    """

    name: str
    kind: Kind
    style: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Chart:
    """Lines over tokens.

    Args:
        title: What it shows.
        x_label: What x is.
        y_label: What y is.
        lines: Measured ones first.
        ticks: Where x is labelled.
        is_percent: Whether y runs from 0 to 100; else it is logarithmic.
        format_y: Text of a value on the y axis.
    """

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    ticks: tuple[int, ...]
    is_percent: bool = True
    format_y: Callable[[float], str] = lambda value: f"{value:g}"


def accuracy_chart(payloads: Sequence[Payload], task: str) -> Chart:
    """Return accuracy by length with intervals, rules on the same samples, and what others published.

    Published lines are cut to the lengths that were measured.

    Raises:
        ConfigurationError: if no model has results of the task.
    """
    lengths = task_lengths(payloads, task)
    lines = []
    for style, payload in enumerate(payloads):
        points = tuple(
            _accuracy_point(payload["model"], length, cell)
            for length, cell in cells_by_length(payload, task).items()
            if cell["accuracy"] is not None
        )
        lines.append(Line(str(payload["model"]), "measured", style, points))
    for style, (name, values) in enumerate(rule_accuracies(payloads, task).items()):
        rule = tuple(
            Point(length, 100 * value, note=f"{name} at {format_length(length)}: {100 * value:.0f}%")
            for length, value in sorted(values.items())
        )
        lines.append(Line(f"rule: {name}", "rule", style, rule))
    for style, row in enumerate(row for row in published_rows(task) if row.plotted):
        # 1000 tokens of one benchmark and 1024 of another are the same place to a reader.
        points = tuple(
            Point(length, value, note=f"{row.model} at {format_length(length)}: {value:g}% ({row.source})")
            for length, value in sorted(row.accuracy.items())
            if 0.9 * lengths[0] <= length <= 1.1 * lengths[-1]
        )
        lines.append(Line(f"{row.model}, {row.training}", "published", style, points))
    return Chart(
        title=f"{task}: accuracy by length",
        x_label="length (tokens)",
        y_label="accuracy (%)",
        lines=tuple(line for line in lines if line.points),
        ticks=tuple(lengths),
        format_y=lambda value: f"{value:.0f}",
    )


def rule_accuracies(payloads: Sequence[Payload], task: str) -> dict[str, dict[int, float]]:
    """Return, by name and length, how right rules are that need no model, on the samples of the task."""
    rules: dict[str, dict[int, float]] = {}
    for payload in payloads:
        for length, cell in cells_by_length(payload, task).items():
            for name, accuracy in (cell.get("rules") or {}).items():
                if accuracy is not None:
                    rules.setdefault(name, {}).setdefault(length, accuracy)
    return rules


def perplexity_chart(payloads: Sequence[Payload]) -> Chart:
    """Return perplexity by the length of the window."""
    return _log_chart(
        payloads,
        "Perplexity by length of the window",
        "length (tokens)",
        "perplexity",
        lambda payload: {
            length: entry["perplexity"] for length, entry in perplexities_by_length(payload).items()
        },
        lambda value: f"{value:,.4g}",
    )


def position_chart(payloads: Sequence[Payload]) -> Chart:
    """Return perplexity by position in each model's longest window."""

    def positions(payload: Payload) -> dict[int, float | None]:
        entries = list(perplexities_by_length(payload).values())
        return {one["end"]: one["perplexity"] for one in entries[-1]["positions"]} if entries else {}

    return _log_chart(
        payloads,
        "Perplexity by position in the longest window",
        "position (tokens read)",
        "perplexity",
        positions,
        lambda value: f"{value:,.4g}",
    )


def seconds_chart(payloads: Sequence[Payload]) -> Chart:
    """Return wall time of a sample by length, over the tasks that every model was measured on there."""
    shared = _shared_places(payloads)

    def seconds(payload: Payload) -> dict[int, float | None]:
        by_length: dict[int, list[float]] = {}
        for cell in payload["results"]:
            value = seconds_a_sample(cell)
            if (cell["task"], cell["length"]) in shared and value:
                by_length.setdefault(cell["length"], []).append(value)
        return {length: sum(found) / len(found) for length, found in sorted(by_length.items())}

    return _log_chart(
        payloads,
        "Wall time of a sample",
        "length (tokens)",
        "seconds",
        seconds,
        lambda value: f"{value:.3g} s",
    )


def state_chart(payloads: Sequence[Payload]) -> Chart:
    """Return the memory that a sequence's cache or state takes, by length."""

    def state(payload: Payload) -> dict[int, float | None]:
        found: dict[int, float | None] = {}
        for cell in payload["results"]:
            if cell.get("state_bytes"):
                found[cell["length"]] = max(found.get(cell["length"]) or 0, cell["state_bytes"])
        return dict(sorted(found.items()))

    return _log_chart(
        payloads,
        "State memory of a sequence",
        "length (tokens)",
        "bytes",
        state,
        lambda value: human_bytes(round(value)).replace(".0 ", " "),
    )


def seconds_a_sample(cell: Mapping[str, Any]) -> float | None:
    """Return the wall time of one sample of a cell, in seconds, or None where it is not known."""
    asked = cell["samples"] + cell.get("errors", 0)
    return cell["seconds"] / asked if asked and cell.get("seconds") is not None else None


def tokens_a_second(cell: Mapping[str, Any]) -> float | None:
    """Return how many tokens of prompts were read a second, or None where it is not known."""
    if cell.get("tokens_per_second") is not None:
        return float(cell["tokens_per_second"])
    # The time of crashed samples is in `seconds`, their tokens are not in the mean.
    if cell.get("errors") or not cell.get("seconds") or cell.get("mean_tokens") is None:
        return None
    return float(cell["mean_tokens"] * cell["samples"] / cell["seconds"])


def _accuracy_point(model: str, length: int, cell: Mapping[str, Any]) -> Point:
    value, (low, high) = 100 * cell["accuracy"], (100 * end for end in cell["ci95"])
    note = f"{model} at {format_length(length)}: {value:.0f}% [{low:.0f}, {high:.0f}], n = {cell['samples']}"
    return Point(length, value, low, high, note)


def _shared_places(payloads: Sequence[Payload]) -> set[tuple[str, int]]:
    places = [
        {(cell["task"], cell["length"]) for cell in one["results"]} for one in payloads if one["results"]
    ]
    return set.intersection(*places) if places else set()


def _log_chart(
    payloads: Sequence[Payload],
    title: str,
    x_label: str,
    y_label: str,
    values_of: Callable[[Payload], Mapping[int, float | None]],
    format_y: Callable[[float], str],
) -> Chart:
    lines = []
    for style, payload in enumerate(payloads):
        points = tuple(
            Point(x, y, note=f"{payload['model']} at {format_length(x)}: {format_y(y)}")
            for x, y in values_of(payload).items()
            if y is not None and y > 0
        )
        if points:
            lines.append(Line(str(payload["model"]), "measured", style, points))
    ticks = sorted({int(point.x) for line in lines for point in line.points})
    return Chart(title, x_label, y_label, tuple(lines), tuple(ticks), is_percent=False, format_y=format_y)
