import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser

import pytest
from report_payload import HOSTILE, MODELS, payload, payloads
from typer.testing import CliRunner

from lawcat.cli.app import app
from lawcat.errors import ConfigurationError
from lawcat.evaluation.charts import accuracy_chart, seconds_chart, state_chart, tokens_a_second
from lawcat.evaluation.html_report import FAILURES_A_CELL, FAILURES_IN_ALL, html_report
from lawcat.evaluation.plots import plot_accuracy
from lawcat.evaluation.report import markdown_report, report_from_files, write_report, write_results
from lawcat.evaluation.results import join_results
from lawcat.evaluation.svg import chart_svg

VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """Elements in order, with their attributes and text; fails on a tag that is not closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "text": "", **dict(attrs)})

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag, **attributes):
        return [
            one
            for one in self.elements
            if one["tag"] == tag and all(one.get(name) == value for name, value in attributes.items())
        ]


@pytest.fixture(scope="module")
def results():
    return payloads()


@pytest.fixture(scope="module")
def text(results):
    return html_report(results)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_it_loads_nothing_from_anywhere(page, text):
    assert not [one for one in page.elements if one["tag"] in {"img", "iframe", "object", "base"}]
    assert [one["href"] for one in page.all("link")] == ["data:,"]
    assert not [one for one in page.elements if "src" in one or "srcset" in one]
    (style,) = page.all("style")
    assert "url(" not in style["text"]
    assert "@import" not in style["text"]
    (script,) = page.all("script")
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    (policy,) = [one["content"] for one in page.all("meta") if one.get("http-equiv")]
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert text.startswith('<!doctype html>\n<html lang="en">')


def test_identifiers_are_unique_and_links_lead_somewhere(page):
    identifiers = [one["id"] for one in page.elements if "id" in one]
    assert len(identifiers) == len(set(identifiers))
    for link in page.all("a"):
        target = link["href"]
        assert target.startswith("https://arxiv.org/") or target[1:] in identifiers
    for one in page.elements:
        for name in (one.get("aria-labelledby") or "").split():
            assert name in identifiers


def test_landmarks_and_names(page):
    assert [len(page.all(tag)) for tag in ("main", "nav", "header", "footer", "h1")] == [1] * 5
    assert all(one.get("aria-labelledby") for one in page.all("section"))
    charts = page.all("svg", role="img")
    assert len(charts) == 7 + 2 + 2
    assert all(one.get("aria-label") for one in page.all("div", role="region"))
    assert all(one.get("scope") for one in page.all("th"))


@pytest.fixture(scope="module")
def tables(text):
    """Rows of every table as lists of texts."""
    cells = re.compile(r"<t[hd][^>]*>(.*?)</t[hd]>", re.S)
    return [
        [html.unescape(" ".join(re.sub(r"<[^>]+>", " ", cell).split())) for cell in cells.findall(row)]
        for row in re.findall(r"<tr>(.*?)</tr>", text, re.S)
    ]


def test_every_number_of_every_cell(tables, results):
    for one in results:
        for cell in one["results"]:
            row = [
                one["model"],
                f"{cell['length'] // 1024}K",
                *(f"{100 * value:.1f}" for value in (cell["accuracy"], *cell["ci95"])),
                str(cell["samples"]),
                str(cell["errors"]),
                f"{cell['mean_tokens']:,.0f}",
            ]
            assert any(found[: len(row)] == row for found in tables), row


def test_what_models_answered_is_text(text, page):
    assert text.count("<script") == 1
    assert "<img" not in text
    assert html.escape("<script>window.hacked = 1</script>") in text.replace("&#34;", "&quot;")
    for hidden in ("\x00", "\ud800", "\u202e"):
        assert hidden in HOSTILE
        assert hidden not in text
    assert "\\u202eabc\u2400\ufffd" in text


def test_hostile_names_are_text_too(tmp_path):
    named = payload('<b onclick="x">&\'|', 0, tasks=("<i>task",), lengths=(64, 100), samples=3)
    named["command"] = "lawcat eval '</code><script>'"
    text = html_report([named])
    assert "<b onclick" not in text
    assert "<i>task" not in text
    assert text.count("<script") == 1
    Page(text)
    assert "\\|" in markdown_report([named])


def test_failures_are_capped_and_counted(page, results):
    shown = page.all("article")
    groups = [cell for one in results for cell in one["results"] if cell["failures"]]
    most = max(3, min(FAILURES_A_CELL, FAILURES_IN_ALL // len(groups)))
    assert len(shown) == sum(min(most, len(cell["failures"])) for cell in groups)
    cells = page.all("details", **{"class": "failed-cell"})
    assert len(cells) == len(groups)
    one = payload("m", 1, tasks=("passkey",), lengths=(16384,), samples=100)
    (cell,) = one["results"]
    text = html_report([one])
    assert f"20 of {len(cell['failures'])} are shown" in text
    assert text.count("<article>") == 20


def test_rules_and_published_rows_are_lines_of_their_own(results, text):
    chart = accuracy_chart(results, "babilong_qa2")
    kinds = [line.kind for line in chart.lines]
    assert kinds == ["measured"] * 4 + ["rule"] + ["published"] * 4
    rule = chart.lines[4]
    assert rule.name == "rule: last place named"
    assert {point.y for point in rule.points} == {39.6}
    # Lengths that were not measured are not drawn.
    assert [point.x for point in chart.lines[5].points] == [1000, 2000, 4000, 8000, 16000]
    drawn = chart_svg(chart, identifier="c")
    assert drawn.count('class="line published" stroke-dasharray=') == 4
    assert drawn.count('class="line rule" stroke-dasharray="1 5"') == 1
    assert drawn.count('class="line measured') == 4
    assert "Mamba 130M" in text
    assert accuracy_chart(results, "passkey").lines[-1].kind == "measured"


def test_facts_alone_stand_left_of_the_shortest_length():
    facts = payload("m", 1, tasks=("babilong_qa2",), lengths=(1000, 2000))
    facts["results"].append({**facts["results"][0], "length": 0})
    chart = accuracy_chart([facts], "babilong_qa2")
    assert chart.ticks == (0, 1000, 2000)
    places = re.findall(r'<text class="x" x="([\d.]+)"[^>]*>([^<]+)<', chart_svg(chart, identifier="c"))
    assert [label for _, label in places] == ["0K", "1000", "2000"]
    xs = [float(x) for x, _ in places]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)


def test_facts_alone_in_an_image_file(tmp_path):
    facts = payload("m", 1, tasks=("babilong_qa2",), lengths=(1000,))
    facts["results"].append({**facts["results"][0], "length": 0})
    plot_accuracy([facts], "babilong_qa2", tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert "stroke-dasharray" in drawn
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_costs_are_means_over_what_all_share():
    first = payload("a", 0, tasks=("passkey", "niah_single_1"), lengths=(1024,), samples=10)
    second = payload("b", 1, tasks=("passkey",), lengths=(1024, 2048), samples=10)
    for one in (first, second):
        for number, cell in enumerate(one["results"]):
            cell["seconds"] = 5.0 + 100 * number
    chart = seconds_chart([first, second])
    assert [[(point.x, point.y) for point in line.points] for line in chart.lines] == [
        [(1024, 0.5)],
        [(1024, 0.5)],
    ]
    assert [len(line.points) for line in state_chart([first, second]).lines] == [1, 2]
    cell = {"samples": 10, "errors": 0, "seconds": 5.0, "mean_tokens": 1000.0}
    assert tokens_a_second(cell) == 2000
    assert tokens_a_second(cell | {"tokens_per_second": 7}) == 7
    assert tokens_a_second(cell | {"errors": 1}) is None


def test_bare_results_of_an_older_run_make_a_page():
    bare = payload("old", 0, tasks=("passkey",), lengths=(512,), samples=4)
    for name in ("settings", "versions", "peak_memory_bytes", "kind", "perplexity", "command"):
        bare.pop(name)
    for name in ("failures", "state_bytes", "depths", "options", "seconds", "haystack"):
        bare["results"][0].pop(name)
    page = Page(html_report([bare]))
    assert "Failed samples" not in [one["text"] for one in page.all("h2")]
    bare["results"][0] |= {"accuracy": None, "ci95": None, "samples": 0, "errors": 4}
    assert "crashed" in html_report([bare])
    only = payload("p", 0, tasks=(), lengths=(64,))
    assert len(Page(html_report([only])).all("svg", role="img")) == 2
    with pytest.raises(ConfigurationError, match="no results to report"):
        html_report([])


@pytest.mark.parametrize("values", [(5e-9, 5e9), (1, 1), (3, 3.1), (9.99, 1000), (0.0002, 0.4)])
def test_logarithmic_axis_holds_every_value(values):
    run = payload("m", 0, tasks=(), lengths=(64, 128))
    for entry, value in zip(run["perplexity"], values, strict=True):
        entry["perplexity"] = value
    drawn = chart_svg(_perplexity(run), identifier="c")
    labels = re.findall(r'class="y"[^>]*>([^<]+)<', drawn)
    assert 2 <= len(labels) <= 8
    circles = [float(y) for y in re.findall(r'cy="([-\d.]+)"', drawn)]
    assert all(14 <= y <= 262 for y in circles)


def _perplexity(run):
    from lawcat.evaluation.charts import perplexity_chart

    return perplexity_chart([run])


def test_stored_results_of_several_runs_make_one_report(tmp_path):
    short = payload("teacher", 0, tasks=("passkey",), lengths=(1024,), samples=20)
    longer = payload("teacher", 0, tasks=("passkey",), lengths=(2048,), samples=20) | {"command": "second"}
    student = payload("student", 3, tasks=("passkey",), lengths=(1024, 2048), samples=20)
    for name, one in (("a", short), ("b", longer), ("c", student)):
        write_results(tmp_path / f"{name}.json", one)
    page = report_from_files(
        [tmp_path / f"{name}.json" for name in "abc"], tmp_path / "out", image_format="png"
    )
    assert page == tmp_path / "out" / "report.html"
    joined = json.loads((tmp_path / "out" / "results-teacher.json").read_text())
    assert [cell["length"] for cell in joined["results"]] == [1024, 2048]
    assert joined["command"].splitlines() == [short["command"], "second"]
    assert "Published" not in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(ConfigurationError, match=r"have passkey at 1K of 'teacher'.*--names"):
        join_results([short, short])
    with pytest.raises(ConfigurationError, match="but with other weights"):
        join_results([short, longer | {"model_fingerprint": "x"}])
    with pytest.raises(ConfigurationError, match="but with another seed"):
        join_results([short, longer | {"seed": 9}])
    with pytest.raises(ConfigurationError, match="Give files that 'lawcat eval' wrote"):
        report_from_files([], tmp_path)


def test_the_command_makes_the_report(tmp_path):
    write_results(tmp_path / "a.json", payload("teacher", 0, tasks=("passkey",), lengths=(1024,), samples=20))
    run = CliRunner().invoke(app, ["report", str(tmp_path / "a.json"), "--output", str(tmp_path / "out")])
    assert run.exit_code == 0, run.output
    assert (tmp_path / "out" / "report.html").is_file()


def test_models_of_one_name_are_told_apart_by_names(tmp_path):
    files = []
    for folder in "ab":  # two students called "student", as folders often are
        one = payload("student", 0, tasks=("passkey",), lengths=(1024,), samples=20)
        write_results(tmp_path / f"{folder}.json", one | {"model_fingerprint": folder})
        files.append(tmp_path / f"{folder}.json")
    with pytest.raises(ConfigurationError, match=r"with other weights .* one a file, with --names"):
        report_from_files(files, tmp_path / "out")
    command = ["report", *map(str, files), "--output", str(tmp_path / "out"), "--names", "first, second"]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    assert sorted(path.name for path in (tmp_path / "out").glob("*.json")) == [
        "results-first.json",
        "results-second.json",
    ]
    for names in (["first"], ["first", ""], []):
        with pytest.raises(ConfigurationError, match=r"^names: got .* for 2 files; give one name a file"):
            report_from_files(files, tmp_path / "out", names=names)
    assert (tmp_path / "out" / "passkey.svg").is_file()
    run = CliRunner().invoke(app, ["report", str(tmp_path / "no.json"), "--output", str(tmp_path / "out")])
    assert run.exit_code == 2


def test_the_twin_has_published_rows_and_costs(tmp_path):
    pair = payloads(MODELS[:2], tasks=("niah_single_2",), lengths=(1024, 2048), samples=20)
    write_report(tmp_path, pair, image_format="png")
    twin = (tmp_path / "report.md").read_text()
    assert "Published by others on niah_single_2, not measured here:" in twin
    source = "Gated DeltaNet (arXiv 2412.06464v3), Table 2"
    assert f"| Mamba2 1.3B | from scratch | {source} | 99.4 | 98.8 | 56.2 | 17 |" in twin
    assert "## Time and memory" in twin
    assert "| niah_single_2 | 1K | teacher | " in twin
    assert "Published" not in markdown_report(pair)


def test_a_page_of_a_whole_run_is_of_reasonable_size(text):
    assert len(text.encode()) < 2_500_000
