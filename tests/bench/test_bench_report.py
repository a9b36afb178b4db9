"""Results as JSON, tables, plots and sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lawcat.bench.record import Record
from lawcat.bench.report import (
    Results,
    crossing,
    crossovers,
    markdown,
    plot,
    read_results,
    write_report,
    write_results,
)
from lawcat.bench.timing import Failure, Timing
from lawcat.errors import ConfigurationError, DataError


def record(contender: str, tokens: int, ms: float | None, **fields: object) -> Record:
    timing = Failure("out of memory") if ms is None else Timing((ms / 1e3,) * 3, 0.5, 2_000_000)
    given = {"measurement": "operator forward", "shape": "small", "batch": 1, "num_tokens_done": tokens}
    is_ours = contender.startswith("lawcat")
    return Record.of(timing, contender=contender, tokens=tokens, is_ours=is_ours, **given | fields)


RECORDS = [
    record("lawcat (torch)", 1024, 2.0, error=1e-7, backend="torch"),
    record("softmax", 1024, 1.0),
    record("lawcat (torch)", 4096, 2.0, error=1e-7, backend="torch"),
    record("softmax", 4096, 4.0),
    record("lawcat (torch)", 8192, 4.0, error=1e-7, backend="torch"),
    record("softmax", 8192, None),
]
RESULTS = Results(
    {"device": "a device", "versions": {"torch": "2"}}, ["torch: here"], RECORDS, "lawcat bench"
)


def test_the_table() -> None:
    page = markdown(RESULTS)
    assert "## operator forward, small, batch 1\n" in page
    assert (
        "| 4K | **lawcat (torch)** | 2.00 [2.00, 2.00] | 2,048,000 | 2.0 MB | 0.5 | 1.0e-07 | torch |" in page
    )
    assert "| 1K | softmax | 1.00 [1.00, 1.00] | 1,024,000 | 2.0 MB | 0.5 | - |  |" in page
    assert "| 8K | softmax" not in page
    assert "- softmax: out of memory (operator forward, small at 8K)" in page
    assert "- versions: torch 2" in page
    assert "- `lawcat bench`" in page
    assert (
        "\n## Where lawcat becomes faster\n\n- operator forward, small: lawcat (torch) is faster than "
        "softmax from 2,048 tokens on (2x as fast at 4K)\n"
    ) in page
    assert "state or cache" not in page


def test_the_column_of_states() -> None:
    rows = [record("lawcat (torch)", 1024, 2.0, state_bytes=75_000_000), record("softmax", 1024, 1.0)]
    page = markdown(Results({}, [], rows))
    assert "| length | contender | ms | tokens/s | peak memory | state or cache | first" in page
    assert "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |" in page
    assert "| 2.00 [2.00, 2.00] | 512,000 | 2.0 MB | 75.0 MB | 0.5 | - |  |" in page
    assert "| 1.00 [1.00, 1.00] | 1,024,000 | 2.0 MB | - | 0.5 | - |  |" in page


def test_where_ours_becomes_faster() -> None:
    (found,) = crossovers(RECORDS)
    assert found.tokens == pytest.approx(2048)
    assert (found.shortest, found.longest) == (1024, 4096)
    assert found.sentence() == (
        "operator forward, small: lawcat (torch) is faster than softmax from 2,048 tokens on "
        "(2x as fast at 4K)"
    )


@pytest.mark.parametrize(
    ("ours", "other", "expected"),
    [
        ([1.0, 1.0, 1.0], [2.0, 4.0, 8.0], None),
        ([9.0, 9.0, 9.0], [1.0, 2.0, 4.0], None),
        ([2.0, 2.0, 2.0], [1.0, 4.0, 16.0], 2**0.5),
        ([1.0, 4.0, 4.0], [2.0, 2.0, 8.0], 2 * 2**0.5),  # faster, slower, and faster for good
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], None),
    ],
)
def test_crossing(ours: list[float], other: list[float], expected: float | None) -> None:
    found = crossing([1, 2, 4], ours, other)
    assert found is None if expected is None else found == pytest.approx(expected)


def test_sentences_without_a_crossing() -> None:
    rows = [record("lawcat", 1024, 1.0), record("x", 1024, 2.0), record("lawcat", 2048, 1.0)]
    (found,) = crossovers([*rows, record("x", 2048, 3.0)])
    assert "is faster than x at every length measured (3x as fast at 2K)" in found.sentence()
    (found,) = crossovers([*rows, record("x", 2048, 0.25)])
    assert "is not faster than x at 2K (4x as slow at 2K)" in found.sentence()
    assert crossovers(rows) == [], "one length in common is none"


def test_files(tmp_path: Path) -> None:
    page = write_report(tmp_path / "out", RESULTS, image_format="svg")
    names = sorted(file.name for file in page.parent.iterdir())
    assert names == ["benchmark.json", "benchmark.md", "operator-forward-small-1.svg"]
    assert "![operator-forward-small-1](operator-forward-small-1.svg)" in page.read_text(encoding="utf-8")
    drawing = (page.parent / names[2]).read_text(encoding="utf-8")
    assert "<svg" in drawing
    payload = json.loads((page.parent / "benchmark.json").read_text(encoding="utf-8"))
    assert payload["schema"] == 1
    assert payload["crossovers"][0]["tokens"] == pytest.approx(2048)
    assert read_results(page.parent / "benchmark.json") == RESULTS
    again = write_report(tmp_path / "again", RESULTS, image_format="svg").parent
    assert (again / names[2]).read_text(encoding="utf-8") == drawing, "the same results, the same file"


def test_a_png(tmp_path: Path) -> None:
    page = write_report(tmp_path, RESULTS)
    assert (page.parent / "operator-forward-small-1.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_is_log_log(monkeypatch: pytest.MonkeyPatch) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    seen: list[tuple[str, str, list[list[float]]]] = []
    save = figure_module.Figure.savefig

    def noting(figure: Any, *arguments: object, **options: object) -> None:
        (axes,) = figure.axes
        lines = [list(map(float, line.get_ydata())) for line in axes.get_lines()]
        seen.append((axes.get_xscale(), axes.get_yscale(), lines))
        save(figure, *arguments, **options)

    monkeypatch.setattr(figure_module.Figure, "savefig", noting)
    plot(RECORDS)
    assert seen == [("log", "log", [[2.0, 2.0, 4.0], [1.0, 4.0]])]


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'pdf'; use one of png, svg"):
        write_report(tmp_path, RESULTS, image_format="pdf")
    with pytest.raises(DataError, match="cannot be read"):
        read_results(tmp_path / "absent.json")
    (tmp_path / "other.json").write_text('{"results": [1]}', encoding="utf-8")
    with pytest.raises(DataError, match="is not a file that 'lawcat bench' wrote"):
        read_results(tmp_path / "other.json")
    write_results(tmp_path / "empty.json", Results({}, [], []))
    assert read_results(tmp_path / "empty.json").records == []
