"""The log of a run: one JSON object a line, a line a step, and TensorBoard's files on request."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from lawcat.errors import DataError, MissingDependencyError
from lawcat.files import clear_write_errors, write_atomic


class TrainingLog:
    r"""Appends what was measured at each step to `log.jsonl`; a step is in it once, also after a resume.

    Every line is handed to the system as soon as it is written, so a killed run loses none. NaN and infinity
    become `null`, which every JSON reader takes. Use it as a context manager, or call `close`.

    Args:
        path: The file. Missing parent folders are made.
        tensorboard_dir: Folder for TensorBoard's files, or `None` for none. Numbers only; those in a nested
            object or list are named by their path, `gate/saturated/3`.
        resume_from: Last (stage, step) that counts as done: what the log holds beyond it is dropped, as those
            steps are about to be done again, and so is a last line torn by a kill. `(0, 0)` drops everything.
            `None` begins a log, and refuses a file that has lines.

    Raises:
        DataError: where the file has lines and `resume_from` is `None`, or one of its lines cannot be read.
        MissingDependencyError: where TensorBoard is asked for and is not installed.
        LawcatError: where it cannot be written.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "log.jsonl"
        >>> with TrainingLog(path) as log:
        ...     log.write(1, 1, {"loss": 0.5, "layers": [0.25, float("nan")]})
        >>> path.read_text()
        '{"stage": 1, "step": 1, "loss": 0.5, "layers": [0.25, null]}\n'
        >>> TrainingLog(path, resume_from=(1, 0)).close()
        >>> path.read_text()
        ''
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        tensorboard_dir: str | os.PathLike[str] | None = None,
        resume_from: tuple[int, int] | None = None,
    ) -> None:
        self.path = Path(path)
        self._tensorboard: Any = None
        self._file: BinaryIO | None = None
        if tensorboard_dir is not None:
            writer = _tensorboard_writer()
        if resume_from is not None:
            _truncate(self.path, resume_from)
        elif self.path.exists() and self.path.stat().st_size:
            raise DataError(
                f"{self.path} has the steps of an earlier run already. Resume that run, or choose another "
                "output folder."
            )
        with clear_write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab")  # noqa: SIM115 - open as long as the run; `close` closes it
            if tensorboard_dir is not None:
                self._tensorboard = writer(log_dir=os.fspath(tensorboard_dir))

    def write(self, stage: int, step: int, values: Mapping[str, Any]) -> None:
        """Append one step.

        Args:
            stage: Stage of the run.
            step: Step of that stage.
            values: What was measured: numbers, text, `None`, tensors or arrays of a few numbers, and lists
                and dictionaries of these.

        Raises:
            LawcatError: where it could not be written, as on a full disk.
            TypeError: for a value of another kind.
            ValueError: after `close`.
        """
        if self._file is None:
            raise ValueError(f"{self.path} is closed.")
        record = {"stage": stage, "step": step} | {name: _json_value(value) for name, value in values.items()}
        with clear_write_errors(self.path):
            self._file.write(json.dumps(record, allow_nan=False).encode("utf-8") + b"\n")
            self._file.flush()
            if self._tensorboard is not None:
                for name, number in _numbers(record):
                    if name not in ("stage", "step"):
                        self._tensorboard.add_scalar(f"stage{stage}/{name}", number, step)

    def close(self) -> None:
        """Close the file; harmless to repeat."""
        if self._file is not None:
            with clear_write_errors(self.path):
                self._file.close()
            self._file = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of a log, in order; a last line torn by a kill is left out.

    Args:
        path: The file. A missing one has no records.

    Raises:
        DataError: naming the line that cannot be read.
    """
    return [record for _, record in _read(Path(path))]


def _read(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    lines.pop()  # empty, or torn: a whole line ends in a line feed
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            key = record["stage"], record["step"]
            if not all(isinstance(part, int) for part in key):
                raise TypeError("stage and step are whole numbers")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"line {number} of {path} is damaged ({error}). Remove that line, or move the file away to "
                "begin another."
            ) from error
        records.append((line, record))
    return records


def _truncate(path: Path, resume_from: tuple[int, int]) -> None:
    if not path.exists():
        return
    kept = [line for line, record in _read(path) if (record["stage"], record["step"]) <= resume_from]
    # Anew and not with truncate(): a kill in the middle leaves the log as it was.
    write_atomic(path, b"".join(line + b"\n" for line in kept))


def _tensorboard_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError("tensorboard", "tensorboard", "Writing TensorBoard's files") from error
    return SummaryWriter


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_json_value(item) for item in value]
    if hasattr(value, "tolist"):  # tensors, arrays and NumPy's numbers, without importing either
        return _json_value(value.tolist())
    raise TypeError(f"a log holds numbers, text, lists and dictionaries; got a {type(value).__qualname__}.")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}/{key}" if name else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{name}/{index}")


__all__ = ["TrainingLog", "read_log"]
