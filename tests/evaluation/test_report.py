import builtins
import json

import pytest

from lawcat.errors import ConfigurationError, DataError, LawcatError, MissingDependencyError
from lawcat.evaluation.records import SampleRecord
from lawcat.evaluation.report import (
    markdown_report,
    plot_accuracy,
    plot_heatmap,
    read_results,
    report_notes,
    write_report,
    write_results,
)
from lawcat.evaluation.runner import CellResult, EvaluationResult


def record(task, length, index, score, error=None, **changes):
    scores = {} if error else {"accuracy": score, "exact": 0.0}
    values = {"depth": index % 11 / 10, "num_tokens": length - 2, "beyond_window": False, **changes}
    return SampleRecord(
        key=f"{task}-{length}-{index}",
        model="m",
        task=task,
        length=length,
        index=index,
        seed=3,
        scores=scores,
        wanted=["1"],
        given="1",
        num_new_tokens=1,
        seconds=0.5,
        prompt_head="",
        prompt_tail="",
        error=error,
        **values,
    )


def cell(task, length, right, samples=20, **changes):
    records = [record(task, length, index, float(index < right), **changes) for index in range(samples)]
    options = {"depth": "grid", "haystack": {"name": "prose.txt", "sha256": "ab" * 32}}
    return CellResult(task, length, options, ("accuracy", "exact"), records)


def result(name, *rights):
    cells = [
        cell("passkey", length, right) for length, right in zip((1024, 2048, 4096), rights, strict=False)
    ]
    return EvaluationResult(name, "f" * 32, 3, cells)


def test_results_file_is_as_the_contract_has_it(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_results(path, result("student", 18, 10), "lawcat eval student")
    payload = json.loads(path.read_text())
    assert payload["schema"] == 1
    assert payload["model"] == "student"
    assert payload["command"] == "lawcat eval student"
    assert payload["seed"] == 3
    assert {"lawcat", "torch", "transformers", "python"} <= payload["versions"].keys()
    first, second = payload["results"]
    assert (first["task"], first["length"], first["samples"], first["accuracy"]) == ("passkey", 1024, 20, 0.9)
    assert first["ci95"] == pytest.approx([0.69896635, 0.97213352], abs=1e-8)
    assert (first["mean_tokens"], first["metrics"]) == (1022.0, {"accuracy": 0.9, "exact": 0.0})
    assert first["haystack"] == {"name": "prose.txt", "sha256": "ab" * 32}
    assert first["depths"][0] == {"depth": 0.0, "samples": 2, "accuracy": 1.0}
    assert sum(entry["samples"] for entry in first["depths"]) == 20
    assert second["accuracy"] == 0.5
    assert read_results(path) == payload


def test_a_results_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, result("student", 18))
    before = path.read_text()
    with pytest.raises(TypeError):
        write_results(path, {**result("student", 3).to_json(), "command": object()})
    assert path.read_text() == before
    (tmp_path / "folder").mkdir()
    with pytest.raises(LawcatError, match="cannot write"):
        write_results(tmp_path / "folder", result("student", 3))


def test_page_has_a_table_of_models_and_lengths():
    page = markdown_report([result("teacher", 20, 20, 0), result("student", 18, 10)])
    assert "| model | 1K | 2K | 4K |\n| --- | ---: | ---: | ---: |\n" in page
    assert "| teacher | 100 [84, 100] | 100 [84, 100] | 0 [0, 16] |" in page
    assert "| student | 90 [70, 97] | 50 [30, 70] | - |" in page
    assert "- teacher, passkey: haystack: prose.txt, SHA-256 abababab" in page
    assert "What to know" not in page
    tables = markdown_report([result("teacher", 20, 20, 0), result("student", 18, 10)], only_tables=True)
    assert tables.startswith("## passkey\n")
    assert tables.rstrip().endswith("| student | 90 [70, 97] | 50 [30, 70] | - |")


def test_texts_among_the_options_are_told_by_name_and_hash():
    noise = {"name": "own.txt", "sha256": "cd" * 32}
    options = {"noise": noise, "babi": None}
    made = CellResult("babilong_qa1", 0, options, ("accuracy",), [record("babilong_qa1", 0, 0, 1.0)])
    page = markdown_report([EvaluationResult("student", "f", 0, [made])])
    assert "options: noise own.txt (SHA-256 cdcdcdcdcdcdcdcd...), babi None\n" in page


def test_page_says_what_went_wrong():
    crashed = cell("passkey", 1024, 5)
    crashed.records[:3] = [record("passkey", 1024, index, 0.0, "RuntimeError: x") for index in range(3)]
    beyond = cell("passkey", 8192, 5, beyond_window=True)
    repeated = cell("passkey", 4096, 5, metadata={"haystack_repeats": 2})
    once = cell("copy", 4096, 5, metadata={"haystack_repeats": 1})
    nothing = CellResult("passkey", 512, {}, ("accuracy",), [record("passkey", 512, 0, 0.0, "x")])
    evaluation = EvaluationResult("student", "f", 0, [nothing, crashed, repeated, beyond, once])
    assert report_notes(evaluation) == [
        "student, passkey at 512: 1 of 1 samples crashed and are in no score.",
        "student, passkey at 1K: 3 of 20 samples crashed and are in no score.",
        "student, passkey at 4K: the haystack was too short; prompts repeat it 2 times.",
        "student, passkey at 8K: prompts are longer than the window the model declares; none was cut.",
        "student, copy at 4K: the haystack was too short; prompts repeat it once.",
    ]
    page = markdown_report([evaluation])
    assert all(note in page for note in report_notes(evaluation))
    assert "| student | crashed | 12 [3, 34] | 25 [11, 47] | 25 [11, 47] \\* |" in page
    assert "A star: prompts longer than the window" in page


def test_plots(tmp_path):
    plot_accuracy([result("teacher", 20, 20, 0), result("student", 18, 10)], "passkey", tmp_path / "a.svg")
    plot_heatmap(result("student", 18, 10), "passkey", tmp_path / "b.png")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "c.svg"
    plot_accuracy([result("teacher", 20, 20, 0), result("student", 18, 10)], "passkey", again)
    assert again.read_bytes() == (tmp_path / "a.svg").read_bytes()
    with pytest.raises(ConfigurationError, match=r"cannot be written as '.jpg'"):
        plot_heatmap(result("student", 18), "passkey", tmp_path / "b.jpg")
    with pytest.raises(ConfigurationError, match="no results of 'niah'; there are: passkey"):
        plot_accuracy([result("student", 18)], "niah", tmp_path / "a.svg")
    flat = EvaluationResult("student", "f", 0, [cell("passkey", 512, 5, depth=None)])
    with pytest.raises(ConfigurationError, match="no depth"):
        plot_heatmap(flat, "passkey", tmp_path / "a.svg")


def test_a_folder_with_the_whole_report(tmp_path):
    teacher, student = result("teacher", 20), result("my/student 1", 18, 10)
    # What was read back from a file serves as well as what was just measured.
    write_results(tmp_path / "teacher.json", teacher)
    page = write_report(
        tmp_path / "out", [read_results(tmp_path / "teacher.json"), student], image_format="png"
    )
    names = {path.name for path in page.parent.iterdir()}
    assert page.name == "report.html"
    assert names == {
        "report.html",
        "report.md",
        "passkey.png",
        "passkey-teacher.png",
        "passkey-my-student-1.png",
        "results-teacher.json",
        "results-my-student-1.json",
    }
    twin = (page.parent / "report.md").read_text()
    for name in names:
        assert name.endswith((".json", ".md", ".html")) or f"]({name})" in twin
    with pytest.raises(ConfigurationError, match="Two results are of a model named 'teacher'"):
        write_report(tmp_path / "out", [teacher, teacher])
    with pytest.raises(ConfigurationError, match="no results to report"):
        markdown_report([])


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lawcat\[eval\]'"):
        plot_heatmap(result("student", 18), "passkey", tmp_path / "a.svg")
    assert "student" in markdown_report([result("student", 18)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[1]", "schema 1"),
        ('{"schema": 2, "results": []}', "schema 1"),
    ],
)
def test_what_is_not_a_results_file_is_refused(tmp_path, content, message):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_results(path)
