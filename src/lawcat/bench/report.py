"""Results of a benchmark: JSON, markdown tables, plots, and where ours becomes faster."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lawcat.bench.record import Record
from lawcat.errors import ConfigurationError, DataError, MissingDependencyError
from lawcat.evaluation.lengths import format_length
from lawcat.files import human_bytes, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "svg")
_TEXT_COLUMNS = ("contender", "backend")


@dataclass(frozen=True)
class Results:
    """What one call of the benchmark found.

    Attributes:
        environment: See ``environment()``.
        backends: What ``lawcat.ops.explain()`` said.
        records: A cell each.
        command: How it was called.
    """

    environment: dict[str, Any]
    backends: list[str]
    records: list[Record]
    command: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "schema": 1,
            "command": self.command,
            "environment": self.environment,
            "backends": self.backends,
            "crossovers": [vars(crossover) for crossover in crossovers(self.records)],
            "results": [record.to_json() for record in self.records],
        }


def write_results(path: str | os.PathLike[str], results: Results) -> None:
    """Write the results as JSON, whole or not at all.

    Raises:
        LawcatError: if the file cannot be written.
    """
    write_atomic(path, json.dumps(results.to_json(), indent=1, allow_nan=False) + "\n")


def read_results(path: str | os.PathLike[str]) -> Results:
    """Return what ``write_results`` wrote.

    Raises:
        DataError: if the file is missing, damaged or something else.
    """
    try:
        payload = json.loads(Path(path).read_text(encoding="utf-8"))
        records = [
            Record(**{**row, "quartiles_s": row["quartiles_s"] and tuple(row["quartiles_s"])})
            for row in payload["results"]
        ]
        return Results(payload["environment"], payload["backends"], records, payload["command"])
    except OSError as error:
        raise DataError(f"{os.fspath(path)} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{os.fspath(path)} is not a file that 'lawcat bench' wrote ({error}).") from error


@dataclass(frozen=True)
class Crossover:
    """From which length on one of ours is faster than another.

    Attributes:
        measurement: What was done.
        shape: Of what.
        ours: Which of ours.
        other: Which other.
        tokens: The length, interpolated; None where there is none between the lengths measured.
        is_faster_throughout: Ours is faster at every length measured; else, without ``tokens``, at none.
        shortest: The shortest length at which both were measured.
        longest: The longest.
        ratio_at_longest: Our time over the other's there.
    """

    measurement: str
    shape: str
    ours: str
    other: str
    tokens: float | None
    is_faster_throughout: bool
    shortest: int
    longest: int
    ratio_at_longest: float

    def sentence(self) -> str:
        """Return it in words."""
        start = f"{self.measurement}, {self.shape}: {self.ours}"
        at_longest = (
            f"{1 / self.ratio_at_longest:.2g}x as fast at {format_length(self.longest)}"
            if self.ratio_at_longest <= 1
            else f"{self.ratio_at_longest:.2g}x as slow at {format_length(self.longest)}"
        )
        if self.tokens is not None:
            return f"{start} is faster than {self.other} from {self.tokens:,.0f} tokens on ({at_longest})"
        if self.is_faster_throughout:
            return f"{start} is faster than {self.other} at every length measured ({at_longest})"
        return f"{start} is not faster than {self.other} at {format_length(self.longest)} ({at_longest})"


def crossing(lengths: Sequence[int], ours_s: Sequence[float], other_s: Sequence[float]) -> float | None:
    """Return the length from which on ours stays the faster, on straight lines between points of a log-log
    plot; None where ours is slower at the end, or faster throughout.

    >>> round(crossing([1000, 4000], [2.0, 2.0], [1.0, 4.0]))
    2000
    """
    ratios = [math.log(a / b) for a, b in zip(ours_s, other_s, strict=True)]
    if not ratios or ratios[-1] > 0:
        return None
    for index in range(len(ratios) - 1, 0, -1):
        before, after = ratios[index - 1], ratios[index]
        if before > 0:
            share = before / (before - after)
            low, high = math.log(lengths[index - 1]), math.log(lengths[index])
            return math.exp(low + share * (high - low))
    return None


def crossovers(records: Iterable[Record]) -> list[Crossover]:
    """Return, for each of ours and each other with two lengths or more in common, where ours gets faster."""
    found = []
    for group in _groups(list(records)):
        by_name = _by_contender(group)
        ours = [name for name, rows in by_name.items() if rows and rows[0].is_ours]
        others = [name for name, rows in by_name.items() if rows and not rows[0].is_ours]
        for our_name in ours:
            for other_name in others:
                a = {row.tokens: row.median_s for row in by_name[our_name] if row.median_s}
                b = {row.tokens: row.median_s for row in by_name[other_name] if row.median_s}
                lengths = sorted(a.keys() & b.keys())
                if len(lengths) < 2:
                    continue
                ours_s, other_s = [a[n] for n in lengths], [b[n] for n in lengths]
                found.append(
                    Crossover(
                        group[0].measurement,
                        group[0].shape,
                        our_name,
                        other_name,
                        crossing(lengths, ours_s, other_s),
                        all(x < y for x, y in zip(ours_s, other_s, strict=True)),
                        lengths[0],
                        lengths[-1],
                        ours_s[-1] / other_s[-1],
                    )
                )
    return found


def markdown(results: Results, *, images: Sequence[str] = ()) -> str:
    """Return a page: where it was measured, a table for each measurement, crossovers, and what did not run.

    Args:
        results: What was measured.
        images: Files of plots to show.
    """
    lines = ["# Benchmark", "", *_environment_lines(results), ""]
    for group in _groups(results.records):
        lines += _table(group)
    lines += [f"![{Path(name).stem}]({name})" for name in images]
    lines += [""] if images else []
    if found := crossovers(results.records):
        lines += ["## Where lawcat becomes faster", "", *(f"- {one.sentence()}" for one in found), ""]
    if reasons := _reasons(results.records):
        lines += ["## What has no figure", "", *(f"- {reason}" for reason in reasons), ""]
    return "\n".join(lines)


def _environment_lines(results: Results) -> list[str]:
    found = dict(results.environment)
    versions = found.pop("versions", {})
    lines = [f"- {name.replace('_', ' ')}: {value}" for name, value in found.items()]
    lines.append("- versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    lines += [f"- backend {line}" for line in results.backends]
    if results.command:
        lines.append(f"- `{results.command}`")
    return lines


def _groups(records: Sequence[Record]) -> list[list[Record]]:
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record.shape, record.measurement, record.batch), []).append(record)
    return list(groups.values())


def _by_contender(group: Sequence[Record]) -> dict[str, list[Record]]:
    names: dict[str, list[Record]] = {}
    for record in group:
        names.setdefault(record.contender, []).append(record)
    return {name: [row for row in rows if row.median_s] for name, rows in names.items()}


def _table(group: list[Record]) -> list[str]:
    first = group[0]
    graphs = any(record.uses_cuda_graph for record in group)
    has_state = any(record.state_bytes is not None for record in group)
    columns = ["length", "contender", "ms", "tokens/s", "peak memory"]
    columns += ["state or cache"] if has_state else []
    columns += ["first timed call, s", "error", "backend"]
    lines = [
        f"## {first.measurement}, {first.shape}, batch {first.batch}",
        "",
        "Milliseconds: median [quartiles]."
        + (" Replays of CUDA graphs." if graphs else "")
        + " Peak memory: what a call takes beside what was held before."
        + (" State or cache: what is kept of the sequences." if has_state else ""),
        "",
        f"| {' | '.join(columns)} |",
        f"| {' | '.join('---' if name in _TEXT_COLUMNS else '---:' for name in columns)} |",
    ]
    for tokens in sorted({record.tokens for record in group}):
        for row in group:
            if row.tokens != tokens or row.median_s is None or row.quartiles_s is None:
                continue
            low, high = row.quartiles_s
            cells = [
                format_length(tokens),
                f"**{row.contender}**" if row.is_ours else row.contender,
                f"{_ms(row.median_s)} [{_ms(low)}, {_ms(high)}]",
                f"{row.tokens_per_s:,.0f}",
                _bytes(row.peak_memory_bytes),
                *([_bytes(row.state_bytes)] if has_state else []),
                f"{row.first_call_s:.2g}",
                "-" if row.error is None else f"{row.error:.1e}",
                row.backend or "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _bytes(number: int | None) -> str:
    return "-" if number is None else human_bytes(number)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:#.3g}".rstrip(".") if seconds < 1 else f"{seconds * 1e3:,.0f}"


def _reasons(records: Sequence[Record]) -> list[str]:
    """Return a line for each contender and reason, with the measurements and lengths it is about."""
    found: dict[tuple[str, str], dict[str, list[int]]] = {}
    for record in records:
        if record.reason is not None:
            measurements = found.setdefault((record.contender, record.reason), {})
            measurements.setdefault(f"{record.measurement}, {record.shape}", []).append(record.tokens)
    lines = []
    for (contender, reason), measurements in found.items():
        places: dict[str, list[str]] = {}
        for measurement, lengths in measurements.items():
            places.setdefault(", ".join(map(format_length, lengths)), []).append(measurement)
        where = "; ".join(f"{' and '.join(names)} at {lengths}" for lengths, names in places.items())
        lines.append(f"{contender}: {reason} ({where})")
    return lines


def write_report(folder: str | os.PathLike[str], results: Results, *, image_format: str = "png") -> Path:
    """Write ``benchmark.md`` with its plots, and ``benchmark.json``, into a folder.

    Args:
        folder: Made if it does not exist; files of the same names in it are replaced.
        results: What was measured.
        image_format: ``"png"`` or ``"svg"``.

    Returns:
        Path of the page.

    Raises:
        ConfigurationError: for another format.
        MissingDependencyError: without matplotlib.
        LawcatError: if a file cannot be written.
    """
    root = Path(folder)
    write_results(root / "benchmark.json", results)
    names = []
    for group in _groups(results.records):
        if any(record.median_s for record in group) and len({record.tokens for record in group}) > 1:
            first = group[0]
            name = f"{first.measurement}-{first.shape}-{first.batch}".replace(" ", "-").replace("/", "-")
            names.append(f"{name}.{image_format}")
            write_atomic(root / names[-1], plot(group, image_format))
    page = root / "benchmark.md"
    write_atomic(page, markdown(results, images=names))
    return page


def plot(group: Sequence[Record], image_format: str = "png") -> bytes:
    """Return a log-log plot of time by length, a line a contender with its quartiles.

    Args:
        group: Records of one measurement.
        image_format: ``"png"`` or ``"svg"``.

    Raises:
        ConfigurationError: for another format.
        MissingDependencyError: without matplotlib.
    """
    if image_format not in FORMATS:
        raise ConfigurationError(f"a plot cannot be {image_format!r}; use one of {', '.join(FORMATS)}.")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure  # not pyplot, which would look for a screen
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "eval", "drawing plots") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Axes = figure.add_subplot()
    for name, rows in _by_contender(group).items():
        if not rows:
            continue
        rows = sorted(rows, key=lambda row: row.tokens)
        lengths = [row.tokens for row in rows]
        style = {"linewidth": 2.2, "marker": "o"} if rows[0].is_ours else {"linestyle": "--", "marker": "s"}
        (line,) = axes.plot(lengths, [1e3 * (row.median_s or 0) for row in rows], label=name, **style)
        low, high = ([1e3 * (row.quartiles_s or (0, 0))[side] for row in rows] for side in (0, 1))
        axes.fill_between(lengths, low, high, alpha=0.2, color=line.get_color())
    ticks = sorted({record.tokens for record in group})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [format_length(tokens) for tokens in ticks])
    axes.minorticks_off()
    first = group[0]
    title = f"{first.measurement}, {first.shape}, batch {first.batch}"
    axes.set(xlabel="length (tokens)", ylabel="time (ms)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    metadata = {"Date": None} if image_format == "svg" else {}
    with rc_context({"svg.hashsalt": "lawcat"}):
        figure.savefig(buffer, format=image_format, dpi=150, metadata=metadata)
    return buffer.getvalue()
