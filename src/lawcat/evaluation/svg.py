"""Charts as SVG inside a page: text in the page's own font, colours from its style sheet, light or dark.

matplotlib draws the image files (`plots.py`). It is not used here because text and colours that it writes are
fixed, so that they can follow neither the reader's dark mode nor a phone's width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

from lawcat.evaluation.charts import Chart, Line
from lawcat.evaluation.lengths import format_length

NUM_COLORS = 6
"""How many colours the style sheet has; a further model takes the first colour again with another marker."""

_WIDTH, _HEIGHT = 480, 320
# Room for labels of 17 units, the size that a phone shows them in.
_RIGHT, _TOP, _BOTTOM = 16, 14, 58
_MARKERS = (
    "M-4.5 0A4.5 4.5 0 1 0 4.5 0A4.5 4.5 0 1 0-4.5 0Z",
    "M-4-4H4V4H-4Z",
    "M0-5.8L5.4 4.2H-5.4Z",
    "M0-6L6 0L0 6L-6 0Z",
    "M0 5.8L5.4-4.2H-5.4Z",
    "M-2-5.5H2V-2H5.5V2H2V5.5H-2V2H-5.5V-2H-2Z",
    "M-3-5.2H3L6 0L3 5.2H-3L-6 0Z",
)
_MOST_TICKS = 7
_DASHES = ("7 4", "7 3 2 3", "3 3", "12 4")


def chart_svg(chart: Chart, *, identifier: str) -> Markup:
    """Return a chart as an SVG element.

    Args:
        chart: What to draw, with at least one point.
        identifier: Unique in the page.

    Returns:
        The element, everything in it escaped.
    """
    across, down = _x_scale(chart), _y_scale(chart)
    names = ", ".join(line.name for line in chart.lines)
    parts = [
        Markup(
            '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-labelledby="{}-title {}-text">'
            '<title id="{}-title">{}</title><desc id="{}-text">{}</desc>'
        ).format(
            _WIDTH,
            _HEIGHT,
            identifier,
            identifier,
            identifier,
            chart.title,
            identifier,
            f"Lines of {names}. The numbers are in the table below.",
        ),
        _axes(chart, across, down),
    ]
    measured = [line for line in chart.lines if line.kind == "measured"]
    # What was measured is drawn last, over everything else.
    for line in sorted(chart.lines, key=lambda line: ("published", "rule", "measured").index(line.kind)):
        # A little apart, so that the bars of two models at the same length can be told apart.
        shift = 5 * (measured.index(line) - (len(measured) - 1) / 2) if line in measured else 0
        shift = shift if any(point.low is not None for point in line.points) else 0
        parts.append(_line(line, [(across(one.x) + shift, down(one.y)) for one in line.points], down))
    return Markup("").join([*parts, Markup("</svg>")])


def swatch_svg(line: Line) -> Markup:
    """Return a line's look for a legend."""
    return Markup(
        '<svg class="swatch" viewBox="0 0 34 14" aria-hidden="true"><g class="{}"{}>'
        '<path class="stroke" d="M1 7H33"/>{}</g></svg>'
    ).format(_classes(line), _dash(line), _marker(line, 17, 7))


def _axes(chart: Chart, across: Callable[[float], float], down: Callable[[float], float]) -> Markup:
    left, right, bottom = _left(chart), _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for value in _y_ticks(chart):
        y = f"{down(value):.1f}"
        parts.append(
            Markup(
                '<path class="grid" d="M{} {}H{}"/><text class="y" x="{}" y="{}" dy=".35em">{}</text>'
            ).format(left, y, right, left - 7, y, chart.format_y(value))
        )
    for tick in _spread(chart.ticks, across):
        x = f"{across(tick):.1f}"
        parts.append(
            Markup('<path class="tick" d="M{} {}v5"/><text class="x" x="{}" y="{}">{}</text>').format(
                x, bottom, x, bottom + 21, format_length(tick)
            )
        )
    parts.append(
        Markup('<path class="axis" d="M{} {}H{}"/><text class="x label" x="{}" y="{}">{}</text>').format(
            left, bottom, right, (left + right) / 2, _HEIGHT - 9, chart.x_label
        )
    )
    return Markup("").join(parts)


def _left(chart: Chart) -> float:
    """Return where the x axis begins, right of the widest label."""
    return 14 + 9.8 * max(len(chart.format_y(value)) for value in _y_ticks(chart))


def _line(line: Line, places: Sequence[tuple[float, float]], down: Callable[[float], float]) -> Markup:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [
        Markup('<g class="{}"{}><path class="stroke" d="{}"/>').format(_classes(line), _dash(line), path)
    ]
    for point, (x, y) in zip(line.points, places, strict=True):
        bar = Markup("")
        if point.low is not None and point.high is not None:
            top, foot = down(point.high), down(point.low)
            bar = Markup('<path class="bar" d="M{:.1f} {:.1f}h6m-3 0V{:.1f}m-3 0h6"/>').format(
                x - 3, top, foot
            )
        # The empty circle is what a finger or pointer hits.
        parts.append(
            Markup(
                '<g class="point"><title>{}</title>{}'
                '<circle class="hit" cx="{:.1f}" cy="{:.1f}" r="11"/>{}</g>'
            ).format(point.note, bar, x, y, _marker(line, x, y))
        )
    return Markup("").join([*parts, Markup("</g>")])


def _marker(line: Line, x: float, y: float) -> Markup:
    if line.kind == "rule":
        return Markup("")
    shape = _MARKERS[line.style % len(_MARKERS)]
    return Markup('<path class="marker" transform="translate({:.1f} {:.1f})" d="{}"/>').format(x, y, shape)


def _classes(line: Line) -> str:
    return (
        f"line {line.kind} color-{line.style % NUM_COLORS}"
        if line.kind == "measured"
        else f"line {line.kind}"
    )


def _dash(line: Line) -> Markup:
    if line.kind == "measured":
        return Markup("")
    dashes = "1 5" if line.kind == "rule" else _DASHES[line.style % len(_DASHES)]
    return Markup(' stroke-dasharray="{}"').format(escape(dashes))


def _x_scale(chart: Chart) -> Callable[[float], float]:
    xs = sorted({point.x for line in chart.lines for point in line.points})
    smallest = next((x for x in xs if x > 0), 1.0)

    def octaves(x: float) -> float:
        # Nothing is infinitely far to the left; it gets the place of half the shortest length.
        return math.log2(x) if x > 0 else math.log2(smallest) - 1

    low, high = octaves(xs[0]), octaves(xs[-1])
    left = _left(chart)
    width = _WIDTH - left - _RIGHT
    # Half a label's width on both sides, so that none leaves the picture.
    pad = 22
    if high == low:
        return lambda x: left + width / 2
    return lambda x: left + pad + (octaves(x) - low) / (high - low) * (width - 2 * pad)


def _y_scale(chart: Chart) -> Callable[[float], float]:
    height = _HEIGHT - _TOP - _BOTTOM
    if chart.is_percent:
        return lambda y: _TOP + (100 - y) / 100 * height
    ticks = _y_ticks(chart)
    low, high = math.log(ticks[0]), math.log(ticks[-1])
    return lambda y: _TOP + (high - math.log(y)) / (high - low) * height


def _y_ticks(chart: Chart) -> list[float]:
    """Return where y is labelled; the first and the last hold all values between them."""
    if chart.is_percent:
        return [0, 20, 40, 60, 80, 100]
    values = [point.y for line in chart.lines for point in line.points]
    lowest, highest = min(values), max(values)
    powers = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 2)
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1,)):
        ladder = [step * 10.0**power for power in powers for step in steps]
        start = max(one for one in ladder if one <= lowest)
        end = min(one for one in ladder if one >= highest and one > start)
        ticks = [one for one in ladder if start <= one <= end]
        if len(ticks) <= _MOST_TICKS:
            return ticks
    stride = math.ceil((len(ticks) - 1) / (_MOST_TICKS - 1))
    return [start * 10.0**step for step in range(0, len(ticks) - 1 + stride, stride)]


def _spread(ticks: Sequence[int], across: Callable[[float], float]) -> list[int]:
    """Return the ticks whose labels do not touch, the longest length among them."""
    kept: list[int] = []
    for tick in reversed(ticks):
        if not kept or across(kept[-1]) - across(tick) >= 46:
            kept.append(tick)
    return kept[::-1]


__all__ = ["NUM_COLORS", "chart_svg", "swatch_svg"]
