"""The results of one model on disk and in memory: reading, writing, joining and looking them up."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lawcat.errors import ConfigurationError, DataError
from lawcat.evaluation.lengths import format_length
from lawcat.files import write_atomic

if TYPE_CHECKING:
    from lawcat.evaluation.runner import EvaluationResult

Results: TypeAlias = "EvaluationResult | Mapping[str, Any]"
"""What `evaluate` returns, or the same as a results file holds it."""

Payload: TypeAlias = Mapping[str, Any]
"""Results as a results file holds them."""


def write_results(path: str | os.PathLike[str], results: Results, command: str | None = None) -> None:
    """Write a results file, whole or not at all.

    Args:
        path: The JSON file; one that exists is replaced.
        results: Of one model.
        command: How the evaluation was called, where `results` does not say so itself.

    Raises:
        LawcatError: if it cannot be written. An existing file is then as it was.
    """
    write_atomic(path, json.dumps(payload_of(results, command), indent=1, allow_nan=False) + "\n")


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


def payload_of(results: Results, command: str | None = None) -> Payload:
    """Return results as a results file holds them.

    Args:
        results: Of one model.
        command: How it was called, where the results do not say so.
    """
    payload = results if isinstance(results, Mapping) else results.to_json(command)
    return {**payload, "command": command} if command and not payload.get("command") else payload


def payloads_of(results: Sequence[Results]) -> list[Payload]:
    """Return the results of several models as results files hold them.

    Raises:
        ConfigurationError: if there are none, or two are of models of the same name.
    """
    payloads = [payload_of(one) for one in results]
    if not any(payload["results"] or payload.get("perplexity") for payload in payloads):
        raise ConfigurationError("There are no results to report.")
    names = [str(payload["model"]) for payload in payloads]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(
                f"Two results are of a model named {name!r}. Give each a name of its own."
            )
    return payloads


def join_results(payloads: Sequence[Payload]) -> list[Payload]:
    """Return one payload a model, its results from several runs put together.

    Args:
        payloads: Any number for each model; of one model, each has tasks, lengths or perplexities that the
            others have not.

    Returns:
        In the order of each model's first.

    Raises:
        ConfigurationError: if two payloads of one name have other weights or another seed, or answer the same
            task at the same length.

    Example:
        >>> runs = [{"model": "m", "results": [{"task": "a", "length": 8}]},
        ...         {"model": "m", "results": [{"task": "b", "length": 8}]}]
        >>> [cell["task"] for cell in join_results(runs)[0]["results"]]
        ['a', 'b']
    """
    joined: dict[str, dict[str, Any]] = {}
    for payload in payloads:
        name = str(payload["model"])
        before = joined.setdefault(name, {**payload, "results": [], "perplexity": [], "command": None})
        for field, what in (("model_fingerprint", "other weights"), ("seed", "another seed")):
            if before.get(field) != payload.get(field):
                raise ConfigurationError(
                    f"Two results are of a model named {name!r} but with {what} "
                    f"({before.get(field)} and {payload.get(field)}). Report them apart, or give the "
                    "models names of their own, one a file, with --names (names=)."
                )
        for kind in ("results", "perplexity"):
            for cell in payload.get(kind) or []:
                place = (cell.get("task", kind), cell["length"])
                if any((one.get("task", kind), one["length"]) == place for one in before[kind]):
                    raise ConfigurationError(
                        f"Two results have {place[0]} at {format_length(place[1])} of {name!r}. "
                        "Leave one of them out, or give the models names of their own, one a file, with "
                        "--names (names=)."
                    )
                before[kind].append(cell)
        commands = [before["command"], payload.get("command")]
        before["command"] = "\n".join(dict.fromkeys(one for one in commands if one)) or None
    for payload in joined.values():
        if not payload["perplexity"]:
            del payload["perplexity"]
    return list(joined.values())


def task_names(payloads: Sequence[Payload]) -> list[str]:
    """Return the names of all tasks, each once, in the order they come."""
    return list(dict.fromkeys(cell["task"] for payload in payloads for cell in payload["results"]))


def cells_by_length(payload: Payload, task: str) -> dict[int, Mapping[str, Any]]:
    """Return a model's cells of a task, shortest first."""
    cells = [cell for cell in payload["results"] if cell["task"] == task]
    return {cell["length"]: cell for cell in sorted(cells, key=lambda cell: cell["length"])}


def task_lengths(payloads: Sequence[Payload], task: str) -> list[int]:
    """Return the lengths of a task over all models, shortest first.

    Raises:
        ConfigurationError: if no model has results of the task.
    """
    lengths = sorted({length for payload in payloads for length in cells_by_length(payload, task)})
    if not lengths:
        there_are = ", ".join(task_names(payloads))
        raise ConfigurationError(f"There are no results of {task!r}; there are: {there_are}.")
    return lengths


def perplexities_by_length(payload: Payload) -> dict[int, Mapping[str, Any]]:
    """Return a model's perplexities by the length of the window, shortest first."""
    entries = sorted(payload.get("perplexity") or [], key=lambda entry: entry["length"])
    return {entry["length"]: entry for entry in entries}


def depth_accuracies(payload: Payload, task: str) -> dict[tuple[float, int], float]:
    """Return accuracy by depth, to the nearest tenth, and length."""
    return {
        (round(entry["depth"], 1), length): entry["accuracy"]
        for length, cell in cells_by_length(payload, task).items()
        for entry in cell.get("depths") or []
    }


def result_file_name(payload: Payload) -> str:
    """Return what a report calls the results file of a model."""
    return f"results-{slug(str(payload['model']))}.json"


def slug(text: str) -> str:
    """Return a text as a file name or an identifier can hold it.

    Example:
        >>> slug("my/student 1")
        'my-student-1'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "model"
