"""`lawcat eval` with baselines, outside data, and what can be wrong with what it is given."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lawcat.cli import evaluate as evaluate_command
from lawcat.cli.app import app
from lawcat.convert.initialize import convert, sliding_window_teacher
from lawcat.convert.teacher import load_teacher
from lawcat.errors import DataError
from lawcat.evaluation.runner import evaluate
from lawcat.tasks import PASSKEY
from tiny_teachers import save_teacher, write_text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    patch = pytest.MonkeyPatch()
    patch.setenv("LAWCAT_CACHE", str(tmp_path_factory.mktemp("cache")))
    save_teacher(folder / "teacher", spells=True, tie_word_embeddings=True)
    student, _ = convert(load_teacher(folder / "teacher").model)
    student.save_pretrained(folder / "student")
    for file in (folder / "teacher").glob("tokenizer*"):
        (folder / "student" / file.name).write_bytes(file.read_bytes())
    for name in ("teacher", "student"):
        mute = folder / f"mute-{name}"
        mute.mkdir()
        for file in (folder / name).iterdir():
            if not file.name.startswith(("tokenizer", "special", "vocab")):
                (mute / file.name).write_bytes(file.read_bytes())
    write_text(folder / "text.txt")
    yield folder
    patch.undo()


def run(*arguments: object) -> Result:
    device = [] if "--device" in arguments else ["--device", "cpu"]
    return CliRunner().invoke(app, ["eval", *map(str, arguments), *device])


def results(report: Path) -> dict[str, dict]:
    found = [json.loads(file.read_text(encoding="utf-8")) for file in report.glob("results-*.json")]
    return {one["model"]: one for one in found}


def test_sliding_windows_of_the_teacher_are_measured_beside_it(place: Path) -> None:
    report, records = place / "report", place / "samples.jsonl"
    result = run(
        place / "teacher", place / "student", "--tasks", "passkey", "--lengths", 512, "--samples", 2,
        "--sliding-window", "8,1000", "--sinks", 2, "--report", report, "--records", records,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    # The page has all; what is seen last are the tables, and what to know about them.
    assert result.stdout.startswith("## passkey\n")
    assert "How it was made" not in result.stdout
    assert "How it was made" in (report / "report.md").read_text(encoding="utf-8")
    found = results(report)
    names = ["teacher", "teacher + window 8 + 2 sinks", "teacher + window 1000 + 2 sinks", "student"]
    assert sorted(found) == sorted(names)
    assert [found[name]["kind"] for name in names] == ["teacher", "baseline", "baseline", "student"]
    cells = [found[name]["results"][0] for name in names]
    states = [cell["state_bytes"] for cell in cells]
    assert states[1] < states[0] / 20
    # A window wider than the prompt leaves the teacher as it is; one of 8 does not.
    given = {name: [] for name in names}
    for line in records.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        given[record["model"]].append((record["wanted"], record["given"]))
    assert given[names[2]] == given[names[0]] != given[names[1]]
    assert [wanted for wanted, _ in given["student"]] == [wanted for wanted, _ in given["teacher"]]
    # What the command measured is what the function gives.
    teacher = load_teacher(place / "teacher")
    again = evaluate(
        sliding_window_teacher(teacher.model, window=8, num_sinks=2),
        teacher.tokenizer,
        tasks=["passkey"],
        lengths=[512],
        samples=2,
    )
    assert [record.given for record in again.cells[0].records] == [text for _, text in given[names[1]]]

    again = [place / "teacher", "--lengths", 512, "--samples", 2, "--records", records]
    second = run(*again)
    assert second.exit_code == 0
    assert "of another run" not in second.stderr
    third = run(*again, "--seed", 9)
    assert "holds no answers of teacher to these questions, but of another run" in third.stderr


def test_a_window_without_a_softmax_model_is_said_to_have_no_effect(place: Path) -> None:
    result = run(place / "student", "--lengths", 512, "--samples", 1, "--sliding-window", 64)
    assert result.exit_code == 0, result.stderr
    assert "--sliding-window has no effect" in result.stderr
    assert "How it was made" in result.stdout


def test_outside_data_and_lengths_of_several_tasks_in_one_call(place: Path) -> None:
    report, prose = place / "babilong", place / "prose.txt"
    prose.write_text(
        "It was a long day by the sea, and nobody had anything to say of it. " * 50, encoding="utf-8"
    )
    result = run(
        place / "teacher", "--tasks", "babilong_qa1,passkey,perplexity", "--lengths", "0k,1k", "--samples", 2,
        "--noise", prose, "--haystack", prose, "--perplexity-tokens", 64,
        "--report", report, "--attention", "eager",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "has no effect" not in result.stderr
    payload = results(report)["teacher"]
    assert [(cell["task"], cell["length"]) for cell in payload["results"]] == [
        ("babilong_qa1", 0), ("babilong_qa1", 1024), ("passkey", 1024)
    ]  # fmt: skip
    zero, full, _ = payload["results"]
    assert zero["noise"]["name"] == full["noise"]["name"] == "prose.txt"
    assert len(full["noise"]["sha256"]) == 64
    assert "last place named" in zero["rules"]
    # The teacher declares 256 tokens; the prompts are longer, and none is cut.
    assert full["beyond_window"]
    assert full["min_tokens"] > 900
    assert [one["length"] for one in payload["perplexity"]] == [1024]
    assert payload["settings"]["attention"] == "eager"


def test_options_without_effect_are_said_once(place: Path) -> None:
    text = place / "text.txt"
    result = run(place / "teacher", place / "student", "--lengths", 512, "--samples", 1, "--noise", text)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("note: The noise 'text.txt' has no effect") == 1


def test_perplexity_alone(place: Path) -> None:
    output = place / "perplexity.json"
    result = run(
        place / "teacher",
        "--tasks",
        "perplexity",
        "--lengths",
        64,
        "--perplexity-tokens",
        128,
        "--output",
        output,
    )
    assert result.exit_code == 0, result.stderr
    payload = json.loads(output.read_text(encoding="utf-8"))
    assert payload["results"] == []
    assert payload["perplexity"][0]["windows"] == 2
    assert payload["peak_memory_bytes"] > 0
    assert payload["parameters"] > 0


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_a_model_without_a_tokenizer(place: Path, which: str) -> None:
    arguments = [place / f"mute-{which}", "--lengths", 512, "--samples", 1]
    result = run(*arguments)
    assert result.exit_code == 2
    assert "has no tokenizer" in result.stderr
    assert "--tokenizer" in result.stderr
    result = run(*arguments, "--tokenizer", place / "teacher")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", "perplexty"], "Did you mean 'perplexity'"),
        (["--tasks", ","], "No task is named"),
        (["--lengths", "8kb"], "Did you mean '8k'"),
        (["--lengths", "0k"], "length is 0"),
        (["--tasks", "perplexity", "--lengths", "0k"], "Perplexity has no length 0"),
        (["--sliding-window", "w64"], "--sliding-window: 'w64' is not a length"),
        (["--attention", "flash"], "attention 'flash' is not a choice"),
        (["--attention", "flash_attention_2"], "flash_attention_2 cannot run: it needs a GPU"),
        (["--sliding-window", "64", "--output", "r.json"], "--report DIRECTORY"),
        (["--output", "text.txt"], "--output would replace a file that is no results file"),
        (["--records", "text.txt"], "text.txt, line 1: not a record of lawcat's evaluation"),
        (["--noise", "nowhere.txt"], "No file found for 'nowhere.txt'"),
        (["--tasks", "babilong_qa1", "--babi", "nowhere"], "nowhere"),
        (["--tokenizer", "/nowhere/at/all"], "there is no file or folder"),
        (["--option", "passkey.depth=["], "'[' cannot be read as YAML"),
        (["--device", "nonsense"], "the device 'nonsense' cannot be used here; there are: cpu"),
        (["--device", "cuda:99"], "the device 'cuda:99' cannot be used here"),
        (["--report", "text.txt"], "--report: nothing can be put into text.txt, because"),
        (["--output", "text.txt/r.json"], "text.txt is not a folder"),
        (["--tasks", "passkey,perplexity", "--lengths", "512,1m"], "'1m' is not a length"),
        (["--tasks", "perplexity", "--option", "passkey.depth=1"], "There are options for 'passkey'"),
    ],
)
def test_what_cannot_be_is_one_message(
    place: Path, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = (place / "text.txt").read_bytes()
    result = run("teacher", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert (place / "text.txt").read_bytes() == before


def test_a_crash_is_told_and_does_not_stop_the_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = type(PASSKEY).generate

    def crash(
        self: object, tokenizer: object, length: int, index: int, *rest: object, **options: object
    ) -> object:
        if index == 1:
            raise RuntimeError("bad luck")
        return generate(self, tokenizer, length, index, *rest, **options)

    monkeypatch.setattr(type(PASSKEY), "generate", crash)
    result = run(place / "teacher", "--lengths", 512, "--samples", 3)
    assert result.exit_code == 0, result.stderr
    assert "teacher: 1 samples crashed; they are in no score" in result.stderr
    assert "1 of 3 samples crashed and are in no score" in result.stdout


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which samples were made: something was measured, or tried out."""
    found: list[tuple[str, int]] = []
    generate = type(PASSKEY).generate

    def note(self: object, tokenizer: object, length: int, index: int, *rest: object, **options: object):
        found.append((length, index))
        return generate(self, tokenizer, length, index, *rest, **options)

    monkeypatch.setattr(type(PASSKEY), "generate", note)
    return found


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ("nowhere/at/all", "there is no file or folder nowhere/at/all"),
        ("mute-student", "has no tokenizer"),
        ("mute-teacher", "has no tokenizer"),
        ("broken-adapter", "adapter"),
    ],
)
def test_what_is_wrong_with_the_second_model_is_said_before_the_first_is_measured(
    place: Path, asked: list[tuple[str, int]], second: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    broken = place / "broken-adapter"
    broken.mkdir(exist_ok=True)
    (broken / "lawcat_adapter.json").write_text("{", encoding="utf-8")
    result = run("teacher", second, "--lengths", 512, "--samples", 1)
    assert result.exit_code == 2
    assert says in result.stderr
    assert not asked


def test_windows_of_a_family_that_has_none_are_refused_before_its_teacher_is_measured(
    place: Path, asked: list[tuple[str, int]], tmp_path: Path
) -> None:
    config = json.loads((place / "teacher" / "config.json").read_text(encoding="utf-8"))
    other = tmp_path / "other"
    other.mkdir()
    for file in (place / "teacher").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "gemma"}), encoding="utf-8")
    result = run(other, "--lengths", 512, "--samples", 1, "--sliding-window", 64)
    assert result.exit_code == 2
    assert "the family 'gemma'" in result.stderr
    assert not asked


def test_a_text_too_short_for_perplexity_is_refused_before_samples_are_answered(
    place: Path, asked: list[tuple[str, int]], tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words only.", encoding="utf-8")
    result = run(
        place / "teacher", "--tasks", "passkey,perplexity", "--lengths", 512, "--samples", 1,
        "--haystack", short,
    )  # fmt: skip
    assert result.exit_code == 2
    assert "less than one window of 512" in result.stderr
    assert not asked


def test_outside_data_has_no_effect_on_perplexity_alone(place: Path) -> None:
    result = run(
        place / "teacher", "--tasks", "perplexity", "--lengths", 64, "--perplexity-tokens", 64,
        "--noise", place / "text.txt",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "note: The noise has no effect: perplexity reads the haystack's text alone." in result.stderr


def test_what_was_measured_is_reported_when_a_later_model_fails(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = evaluate_command.measure

    def fail(model: object, tokenizer: object, *, name: str, **rest: object) -> object:
        if name == "student":
            raise DataError("the second is of no use")
        return measure(model, tokenizer, name=name, **rest)

    monkeypatch.setattr(evaluate_command, "measure", fail)
    result = run(
        place / "teacher", place / "student", "--lengths", 512, "--samples", 1,
        "--report", tmp_path / "report",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "the second is of no use" in result.stderr
    assert list(results(tmp_path / "report")) == ["teacher"]


def test_the_command_in_the_results_can_be_run_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["eval", "essays/*.txt", "it's"]
    monkeypatch.setattr("sys.argv", ["lawcat", *arguments])
    output = place / "quoted.json"
    result = run(place / "teacher", "--lengths", 512, "--samples", 1, "--output", output)
    assert result.exit_code == 0, result.stderr
    command = json.loads(output.read_text(encoding="utf-8"))["command"]
    assert shlex.split(command) == ["lawcat", *arguments]
    assert "'essays/*.txt'" in command
