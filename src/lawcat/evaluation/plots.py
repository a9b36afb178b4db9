"""Charts as image files, for markdown and papers, drawn by matplotlib."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lawcat.errors import ConfigurationError, MissingDependencyError
from lawcat.evaluation.charts import accuracy_chart
from lawcat.evaluation.lengths import format_length
from lawcat.evaluation.results import Results, depth_accuracies, payload_of, payloads_of, task_lengths
from lawcat.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = (".svg", ".png")
_MARKERS = "os^DvPX*"
_DASHES = ((0, (6, 3)), (0, (6, 2, 1, 2)), (0, (3, 2)), (0, (10, 3)))


def plot_accuracy(results: Sequence[Results], task: str, path: str | os.PathLike[str]) -> None:
    """Draw accuracy by length, a line a model, with intervals; published rows dashed, rules dotted.

    Args:
        results: One a model.
        task: Which task.
        path: `.svg` or `.png`.

    Raises:
        ConfigurationError: for another ending, or a task that is not in the results.
        MissingDependencyError: without matplotlib.
        LawcatError: if the file cannot be written.
    """
    chart = accuracy_chart(payloads_of(results), task)
    has_many_lines = len(chart.lines) > 4
    figure = _figure(9.4 if has_many_lines else 7, 4.4)
    axes = figure.add_subplot()
    # Length 0 (facts without noise) has no logarithm; it stands where half the shortest length would.
    zero = min((point.x for line in chart.lines for point in line.points if point.x > 0), default=2) / 2
    measured = [line for line in chart.lines if line.kind == "measured"]
    for line in chart.lines:
        places = [point.x or zero for point in line.points]
        values = [point.y for point in line.points]
        if line.kind == "measured":
            # A little apart, so that the bars of two models at the same length can be told apart.
            shift = 1.02 ** (measured.index(line) - (len(measured) - 1) / 2)
            bars = [
                [point.y - (point.low or 0) for point in line.points],
                [(point.high or 0) - point.y for point in line.points],
            ]
            marker = _MARKERS[line.style % len(_MARKERS)]
            shifted = [place * shift for place in places]
            axes.errorbar(shifted, values, yerr=bars, marker=marker, capsize=3, label=line.name, zorder=3)
        elif line.kind == "rule":
            axes.plot(places, values, color="0.25", linestyle=":", label=line.name)
        else:
            axes.plot(
                places,
                values,
                color="0.5",
                linestyle=_DASHES[line.style % len(_DASHES)],
                marker=_MARKERS[line.style % len(_MARKERS)],
                markerfacecolor="none",
                linewidth=1,
                label=f"published: {line.name}",
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks([tick or zero for tick in chart.ticks], [format_length(tick) for tick in chart.ticks])
    axes.minorticks_off()
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label, ylim=(-3, 103), title=task)
    axes.grid(alpha=0.3)
    if has_many_lines:  # beside the axes: within them it would hide points
        figure.legend(loc="outside right upper", fontsize="small")
    else:
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
    payload = payload_of(results)
    lengths = task_lengths([payload], task)
    found = depth_accuracies(payload, task)
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
