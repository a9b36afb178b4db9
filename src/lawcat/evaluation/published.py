"""Accuracies that others published, to hold measured ones against; the two are never mixed."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class PublishedRow:
    """A model on a task, as published.

    Args:
        task: Name of the task as ours is called.
        model: Name of the model.
        training: What it was trained on: `"from scratch"`, `"zero-shot"`, ...
        accuracy: Percent by nominal length in tokens; only lengths that were published.
        source: Where it was published.
        url: Its address, or None.
        conditions: How it was measured: length fit, training, number of samples, as far as stated.
        plotted: Whether plots show it; tables show all.
    """

    task: str
    model: str
    training: str
    accuracy: dict[int, float]
    source: str
    url: str | None
    conditions: str
    plotted: bool


def published_rows(task: str) -> tuple[PublishedRow, ...]:
    """Return what others published on a task.

    Args:
        task: Name of a task.

    Returns:
        Rows, those that plots show first; none for a task without published numbers.

    Source: tables of the papers that each row names, by way of public transcriptions.

    Example:
        >>> [row.accuracy[8192] for row in published_rows("niah_single_2") if row.plotted]
        [17.0, 14.4, 29.6]
    """
    return tuple(row for row in _all_rows() if row.task == task)


@functools.cache
def _all_rows() -> tuple[PublishedRow, ...]:
    content = json.loads(files("lawcat.evaluation").joinpath("published.json").read_text(encoding="utf-8"))
    rows = []
    for row in content["rows"]:
        source = content["sources"][row["source"]]
        for task, values in row["accuracy"].items():
            pairs = zip(content["lengths"][row["lengths"]], values, strict=True)
            rows.append(
                PublishedRow(
                    task=task,
                    model=row["model"],
                    training=row["training"],
                    accuracy={length: float(value) for length, value in pairs if value is not None},
                    source=source["title"],
                    url=source["url"],
                    conditions=source["conditions"],
                    plotted=row["plotted"],
                )
            )
    return tuple(sorted(rows, key=lambda row: not row.plotted))
