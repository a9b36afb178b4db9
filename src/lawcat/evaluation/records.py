"""Finished samples on disk: one JSON object a line, found again by what they answer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

from lawcat.errors import DataError
from lawcat.files import clear_write_errors

RECORD_FORMAT = "lawcat-sample-1"
_BEGINNING = json.dumps({"format": RECORD_FORMAT})[:-1]
_EDGE_CHARS = 200


@dataclass(frozen=True)
class SampleRecord:
    """One sample and what became of it.

    Args:
        key: Hash of model, tokenizer, task, length, index, seed and options: the same key, the same answer.
        model: Name of the model.
        task: Name of the task.
        length: Nominal length in tokens.
        index: Which sample.
        seed: The run's seed.
        scores: Every metric, headline first; empty where the sample crashed.
        wanted: What the answer must hold.
        given: What the model said.
        depth: Where the answer stood, 0 to 1, or None.
        num_tokens: Tokens of the prompt.
        num_new_tokens: Tokens of the answer.
        beyond_window: Whether the prompt is longer than the model's `max_position_embeddings`.
        seconds: Wall time, a batch's shared evenly among its samples.
        prompt_head: The prompt's first 200 characters.
        prompt_tail: Its last 200.
        error: What went wrong, or None.
        metadata: The sample's own.
        rules: Headline score of each rule of the task on this sample, by the rule's name.
        state_bytes: What the model kept of this sequence after its prompt; None where that is unknown.
    """

    key: str
    model: str
    task: str
    length: int
    index: int
    seed: int
    scores: dict[str, float]
    wanted: list[str]
    given: str
    depth: float | None
    num_tokens: int
    num_new_tokens: int
    beyond_window: bool
    seconds: float
    prompt_head: str
    prompt_tail: str
    error: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    rules: dict[str, float] = field(default_factory=dict)
    state_bytes: int | None = None

    @property
    def score(self) -> float:
        """The headline metric; 0 for a sample that crashed."""
        return next(iter(self.scores.values()), 0.0)


def prompt_edges(prompt: str) -> tuple[str, str]:
    """Return the first and last 200 characters of a prompt."""
    return prompt[:_EDGE_CHARS], prompt[-_EDGE_CHARS:]


def read_records(path: str | os.PathLike[str]) -> dict[str, SampleRecord]:
    """Return the finished samples of a file by their keys; crashed ones are left out, to be tried again.

    Args:
        path: A file that `append_record` wrote. It need not exist. A last line that was cut off, as by a
            kill, is passed over.

    Returns:
        The latest record of each key.

    Raises:
        DataError: if the file cannot be read or holds something else.
    """
    found: dict[str, SampleRecord] = {}
    for number, line in _lines(path):
        if _is_cut_off(line):
            break
        try:
            record = _record_of(json.loads(line))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{os.fspath(path)}, line {number}: not a record of lawcat's evaluation ({error}). Nothing "
                "was changed. Name another file for this run's samples."
            ) from error
        if record.error is None:
            found[record.key] = record
    return found


@contextmanager
def open_records(path: str | os.PathLike[str] | None) -> Iterator[TextIO | None]:
    """Open a file to append records to; None opens nothing.

    Args:
        path: As of `read_records`, which should have read it before. A cut-off last line is removed.

    Yields:
        The file for `append_record`.

    Raises:
        LawcatError: if it cannot be written.
    """
    if path is None:
        yield None
        return
    with clear_write_errors(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        _mend_last_line(path)
        stream = open(path, "a", encoding="utf-8")  # noqa: SIM115
    try:
        yield stream
    finally:
        with clear_write_errors(path):  # what could not be written before is tried once more here
            stream.close()


def append_record(stream: TextIO, record: SampleRecord) -> None:
    """Write one record, and see to it that it is on the disk.

    Raises:
        LawcatError: if it cannot be written.
    """
    with clear_write_errors(stream.name):
        # ASCII, so that a line cut off anywhere is still text.
        line = json.dumps({"format": RECORD_FORMAT, **asdict(record)})
        stream.write(line + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _record_of(entry: Any) -> SampleRecord:
    if not isinstance(entry, Mapping) or entry.get("format") != RECORD_FORMAT:
        raise ValueError(f"no object with format {RECORD_FORMAT!r}")
    values = {key: value for key, value in entry.items() if key != "format"}
    names = {one.name for one in fields(SampleRecord)}
    if unknown := values.keys() - names:
        raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
    return SampleRecord(**values)


def _is_cut_off(line: str) -> bool:
    # Only what begins as our records do: the beginning of somebody else's file is not to be cut away.
    if line.endswith("\n") or not (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        return
    except UnicodeDecodeError as error:
        raise DataError(
            f"{os.fspath(path)} is not text, so it cannot hold this run's samples. Name another file."
        ) from error
    except OSError as error:
        raise DataError(f"{os.fspath(path)} cannot be read: {error.strerror or error}.") from error


def _mend_last_line(path: str | os.PathLike[str]) -> None:
    if not os.path.exists(path):
        return
    with open(path, "rb+") as stream:
        content = stream.read()
        kept = content.rfind(b"\n") + 1
        last = content[kept:].decode("utf-8", errors="replace")
        if _is_cut_off(last):
            stream.truncate(kept)
        elif last:
            stream.write(b"\n")
