"""What a command shows while it works: on standard error, with the time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Where standard error is a file or a pipe, a line now and then instead of a bar that moves.
_SECONDS_BETWEEN_LINES = 15.0


class Display:
    """Bars with time left on a terminal, plain lines elsewhere. Use as a context manager."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._is_live = self._console.is_terminal
        self._bars: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._printed: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[measured]}"),
            console=self._console,
        )

    def __enter__(self) -> Self:
        # Its bars for a second's work would stand between ours.
        from transformers.utils import logging

        logging.disable_progress_bar()
        if self._is_live:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_live:
            self._progress.stop()

    def message(self, text: str) -> None:
        """Show a line."""
        if self._is_live:
            self._progress.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def update(self, title: str, done: int, total: int, measured: dict[str, float] | None = None) -> None:
        """Show that ``done`` of ``total`` of ``title`` is done, and what was measured last.

        ``seconds_left`` among the measurements is an estimate that is better than that from ``done`` alone.
        """
        measured = dict(measured or {})
        estimate = measured.pop("seconds_left", None)
        shown = "  ".join(f"{name} {_short(value)}" for name, value in measured.items())
        if self._is_live:
            if estimate is not None and done < total:
                shown = f"{_duration(estimate)} left in all  {shown}".rstrip()
            if title not in self._bars:
                self._bars[title] = self._progress.add_task(title, total=total, measured="")
            self._progress.update(self._bars[title], completed=done, total=total, measured=shown)
            return
        now = time.monotonic()
        started = self._started.setdefault(title, now)
        is_due = now - self._printed.get(title, 0.0) >= _SECONDS_BETWEEN_LINES
        if is_due or done >= total:
            self._printed[title] = now
            left = estimate
            if left is None and done > 1:
                left = (now - started) / (done - 1) * (total - done)
            remaining = f", {_duration(left)} left" if left and done < total else ""
            print(f"{title}: {done}/{total}{remaining}  {shown}".rstrip(), file=sys.stderr, flush=True)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
