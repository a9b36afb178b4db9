"""One self-contained HTML page of the results of several models."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lawcat.evaluation.charts import (
    Chart,
    accuracy_chart,
    perplexity_chart,
    position_chart,
    rule_accuracies,
    seconds_a_sample,
    seconds_chart,
    state_chart,
    tokens_a_second,
)
from lawcat.evaluation.comparison import HOW_COMPARED, Comparison, compare_models, comparison_notes
from lawcat.evaluation.lengths import format_length
from lawcat.evaluation.notes import provenance, report_notes
from lawcat.evaluation.published import PublishedRow, published_rows
from lawcat.evaluation.results import (
    Payload,
    Results,
    cells_by_length,
    depth_accuracies,
    payloads_of,
    perplexities_by_length,
    result_file_name,
    slug,
    task_lengths,
    task_names,
)
from lawcat.evaluation.svg import chart_svg, swatch_svg
from lawcat.files import human_bytes

FAILURES_A_CELL = 20
"""How many failed samples of a model at one task and length the page shows at most."""

FAILURES_IN_ALL = 1200
"""About how many failed samples the page shows at most; beyond, fewer of each task and length."""

# What HTML cannot hold, or would turn the text around it: shown as a visible sign.
_INVISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
_INVISIBLE |= {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")
# What turns the direction of the text, or takes no room.
_INVISIBLE |= {
    code: f"\\u{code:04x}"
    for code in (0x200B, 0x200E, 0x200F, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
_INVISIBLE |= dict.fromkeys((0xFFFE, 0xFFFF, *range(0xD800, 0xE000)), "\ufffd")


@dataclass(frozen=True)
class _Task:
    """What the page shows of a task."""

    name: str
    identifier: str
    metric: str
    lengths: list[int]
    chart: Chart | None
    rows: list[tuple[str, list[Mapping[str, Any] | None]]]
    comparisons: list[Comparison]
    heatmaps: list[tuple[str, list[tuple[int, list[float | None]]]]]
    rules: dict[str, dict[int, float]]
    published: tuple[PublishedRow, ...]
    published_lengths: list[int]
    starred: bool
    num_failures: int


@dataclass(frozen=True)
class _Failures:
    """Failed samples of a model at a task and length, and how many of how many are shown."""

    model: str
    task: str
    length: int
    file: str
    total: int
    crashed: int
    asked: int
    shown: list[Mapping[str, Any]]


def html_report(results: Sequence[Results]) -> str:
    """Return a page that needs nothing but itself: plots, tables, failed samples, and how it was made.

    Args:
        results: One a model.

    Returns:
        HTML. It loads nothing, and whatever models answered stands in it as text.

    Raises:
        ConfigurationError: for no results, or two models of one name.

    Example:
        >>> page = html_report([{"model": "m", "results": [], "perplexity": [
        ...     {"length": 64, "perplexity": 8.0, "positions": [], "source": {"name": "a", "sha256": "b"}}]}])
        >>> page.startswith("<!doctype html>")
        True
    """
    payloads = payloads_of(results)
    script = _file("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    comparisons = compare_models(payloads)
    failures: dict[str, list[_Failures]] = {}
    for one in _failures(payloads):
        failures.setdefault(one.task, []).append(one)
    text: str = _template().render(
        style=Markup(_file("report.css")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        models=[str(payload["model"]) for payload in payloads],
        payloads=payloads,
        summary=_summary(payloads),
        notes=[*comparison_notes(payloads), *(note for one in payloads for note in report_notes(one))],
        tasks=[_task(payloads, name, comparisons) for name in task_names(payloads)],
        comparisons=_comparison_tables(comparisons),
        how_compared=HOW_COMPARED,
        perplexity=_perplexity(payloads),
        costs=[chart for chart in (seconds_chart(payloads), state_chart(payloads)) if chart.lines],
        failures=failures,
        failed_lengths=sorted({one.length for groups in failures.values() for one in groups}),
        provenance=[(str(payload["model"]), provenance(payload)) for payload in payloads],
    )
    # A lone surrogate in an answer has no UTF-8.
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _comparison_tables(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return tables of tasks by baselines, one a model; of tasks by models where there is one baseline."""
    models = list(dict.fromkeys(one.model for one in comparisons))
    baselines = list(dict.fromkeys(one.baseline for one in comparisons))
    found = {(one.task, one.model, one.baseline): one for one in comparisons}
    tasks = list(dict.fromkeys(one.task for one in comparisons))
    if len(baselines) == 1 and len(models) > 1:
        rows = [(task, [found.get((task, model, baselines[0])) for model in models]) for task in tasks]
        return [{"title": f"Against {baselines[0]}", "columns": models, "rows": rows}]
    return [
        {
            "title": f"{model} against",
            "columns": baselines,
            "rows": [(task, [found.get((task, model, other)) for other in baselines]) for task in tasks],
        }
        for model in models
    ]


def _task(payloads: Sequence[Payload], name: str, comparisons: Sequence[Comparison]) -> _Task:
    lengths = task_lengths(payloads, name)
    cells = {str(payload["model"]): cells_by_length(payload, name) for payload in payloads}
    found = [cell for by_length in cells.values() for cell in by_length.values()]
    chart = accuracy_chart(payloads, name)
    published = published_rows(name)
    heatmaps = []
    for payload in payloads:
        if by_place := depth_accuracies(payload, name):
            rows = [
                (10 * step, [by_place.get((step / 10, length)) for length in lengths]) for step in range(11)
            ]
            heatmaps.append((str(payload["model"]), rows))
    return _Task(
        name=name,
        identifier=f"task-{slug(name)}",
        metric=str(found[0]["metric"]),
        lengths=lengths,
        chart=chart if any(line.kind == "measured" for line in chart.lines) else None,
        rows=[(model, [by_length.get(length) for length in lengths]) for model, by_length in cells.items()],
        comparisons=[one for one in comparisons if one.task == name],
        heatmaps=heatmaps,
        rules=rule_accuracies(payloads, name),
        published=published,
        published_lengths=sorted({length for row in published for length in row.accuracy}),
        starred=any(cell.get("beyond_window") for cell in found),
        num_failures=sum(_num_failures(cell) for cell in found),
    )


def _perplexity(payloads: Sequence[Payload]) -> dict[str, Any] | None:
    found = {str(payload["model"]): perplexities_by_length(payload) for payload in payloads}
    entries = [entry for by_length in found.values() for entry in by_length.values()]
    if not entries:
        return None
    lengths = sorted({entry["length"] for entry in entries})
    positions: dict[int, dict[str, float | None]] = {}
    for model, by_length in found.items():
        for bucket in list(by_length.values())[-1]["positions"] if by_length else []:
            positions.setdefault(bucket["end"], {})[model] = bucket["perplexity"]
    return {
        "charts": [chart for chart in (perplexity_chart(payloads), position_chart(payloads)) if chart.lines],
        "lengths": lengths,
        "rows": [
            (model, [by_length.get(length, {}).get("perplexity") for length in lengths])
            for model, by_length in found.items()
        ],
        "positions": sorted(positions.items()),
        "texts": sorted({(entry["source"]["name"], entry["source"]["sha256"]) for entry in entries}),
    }


def _summary(payloads: Sequence[Payload]) -> dict[str, Any]:
    cells = [cell for payload in payloads for cell in payload["results"]]
    asked = [cell["samples"] + cell.get("errors", 0) for cell in cells] or [0]
    lengths = sorted({cell["length"] for cell in cells})
    settings: dict[str, list[str]] = {}
    for payload in payloads:
        known = payload.get("settings") or {}
        if parts := [str(known[key]) for key in ("hardware", "device", "dtype") if known.get(key)]:
            settings.setdefault(", ".join(parts), []).append(str(payload["model"]))
    return {
        "samples": _span(sorted(set(asked)), str),
        "lengths": _span(lengths, format_length),
        "seeds": ", ".join(sorted({str(payload.get("seed")) for payload in payloads})),
        "total": sum(asked),
        "settings": settings,
        "memory": [
            (str(payload["model"]), int(payload["peak_memory_bytes"]))
            for payload in payloads
            if payload.get("peak_memory_bytes")
        ],
    }


def _span(values: Sequence[int], text: Callable[[int], str]) -> str:
    if not values:
        return ""
    return text(values[0]) if len(values) == 1 else f"{text(values[0])} to {text(values[-1])}"


def _failures(payloads: Sequence[Payload]) -> Iterator[_Failures]:
    places = [
        (payload, cell)
        for name in task_names(payloads)
        for payload in payloads
        for cell in cells_by_length(payload, name).values()
        if cell.get("failures")
    ]
    most = max(3, min(FAILURES_A_CELL, FAILURES_IN_ALL // max(len(places), 1)))
    for payload, cell in places:
        asked = cell["samples"] + cell.get("errors", 0)
        yield _Failures(
            model=str(payload["model"]),
            task=cell["task"],
            length=cell["length"],
            file=result_file_name(payload),
            total=_num_failures(cell),
            crashed=cell.get("errors", 0),
            asked=asked,
            shown=cell["failures"][:most],
        )


def _num_failures(cell: Mapping[str, Any]) -> int:
    # The results file, too, may hold only some of them.
    return max(cell.get("num_failures") or 0, len(cell.get("failures") or []))


def _file(name: str) -> str:
    return files("lawcat.evaluation").joinpath("page", name).read_text(encoding="utf-8")


@functools.cache
def _template() -> Any:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, extensions=[]
    )
    environment.filters |= {
        "length": format_length,
        "percent": lambda share: f"{100 * share:.0f}",
        "points": lambda value: f"{value:+.0f}".replace("-", "\u2212") if round(value) else "0",
        "visible": _visible,
        "slug": slug,
        "bytes": human_bytes,
        "count": "{:,}".format,
        "seconds": lambda value: f"{value:.3g}" if value < 1000 else f"{value:,.0f}",
        "perplexity": _perplexity_text,
        "swatch": swatch_svg,
        "seconds_a_sample": seconds_a_sample,
        "tokens_a_second": tokens_a_second,
        "items_of": len,
    }
    environment.globals |= {"chart_svg": chart_svg}
    return environment.from_string(_file("report.html.j2"))


def _perplexity_text(value: float | None) -> str:
    if value is None:
        return "\u2013"
    return f"{value:,.2f}" if value < 100 else f"{value:,.4g}"


def _visible(text: Any) -> str:
    """Return text without characters that HTML cannot hold or that nobody would see."""
    if isinstance(text, list | tuple):
        return ", ".join(_visible(part) for part in text)
    return str(text).replace("\r\n", "\n").translate(_INVISIBLE)
