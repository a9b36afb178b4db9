"""What a reader of results has to know: what went wrong, and how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lawcat.evaluation.lengths import format_length
from lawcat.evaluation.results import Results, cells_by_length, payload_of, task_names
from lawcat.files import human_bytes


def report_notes(results: Results) -> list[str]:
    """Return, a sentence each, what a reader of the numbers has to know: crashes, windows, repeated text.

    Args:
        results: Of one model.

    Returns:
        Sentences; none if there is nothing to say.
    """
    payload = payload_of(results)
    notes = []
    for cell in payload["results"]:
        where = f"{payload['model']}, {cell['task']} at {format_length(cell['length'])}"
        if cell.get("errors"):
            total = cell["errors"] + cell["samples"]
            notes.append(f"{where}: {cell['errors']} of {total} samples crashed and are in no score.")
        if cell.get("beyond_window"):
            notes.append(f"{where}: prompts are longer than the window the model declares; none was cut.")
        if cell.get("haystack_repeats"):
            repeats = cell["haystack_repeats"]
            times = "once" if repeats == 1 else f"{repeats} times"
            notes.append(f"{where}: the haystack was too short; prompts repeat it {times}.")
    return notes


def provenance(results: Results) -> list[tuple[str, str]]:
    """Return how results were made: pairs of what and its value, a command's what being `"command"`.

    Args:
        results: Of one model.
    """
    payload = payload_of(results)
    sizes = [cell["samples"] + cell.get("errors", 0) for cell in payload["results"]] or [0]
    lines = [
        ("samples a cell", f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"),
        ("seed", str(payload.get("seed"))),
        ("versions", _pairs(payload.get("versions"))),
        ("settings", _pairs(payload.get("settings"))),
        ("model fingerprint", str(payload.get("model_fingerprint") or "")),
    ]
    if payload.get("peak_memory_bytes"):
        lines.append(("peak memory", human_bytes(int(payload["peak_memory_bytes"]))))
    lines += [("command", command) for command in str(payload.get("command") or "").splitlines()]
    haystacks = {
        (cell["task"], cell["haystack"]["name"], cell["haystack"]["sha256"])
        for cell in payload["results"]
        if cell.get("haystack")
    }
    for task, name, sha256 in sorted(haystacks):
        lines.append((f"{task}: haystack", f"{name}, SHA-256 {sha256[:16]}..."))
    for task in task_names([payload]):
        options: dict[str, Any] = {}
        for cell in cells_by_length(payload, task).values():
            options |= {key: value for key, value in (cell.get("options") or {}).items() if key != "haystack"}
        if options:
            lines.append((f"{task}: options", _pairs(options)))
        tokens = ", ".join(
            f"{format_length(length)}: {cell['mean_tokens']:.0f}"
            for length, cell in cells_by_length(payload, task).items()
            if cell.get("mean_tokens") is not None
        )
        if tokens:
            lines.append((f"{task}: true mean length of the prompts in tokens", tokens))
    return [(what, value) for what, value in lines if value]


def _pairs(values: Any) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in (values or {}).items())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping) and value.keys() == {"name", "sha256"}:  # a text
        return f"{value['name']} (SHA-256 {value['sha256'][:16]}...)"
    return str(value)
