"""The commands as a user types them: results on standard output, one message and exit 2 on a mistake."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lawcat.cli.app import app
from lawcat.inference.generation import stream_text
from tiny_teachers import save_teacher, write_text

RECIPE = """
name: tiny
sequence_length: 32
precision: float32
data:
  - provider: text
    path: {text}
attention_transfer: {{steps: 2, batch_sequences: 2}}
recovery: {{steps: 2, batch_sequences: 2, lora_rank: 2}}
evaluation: {{tasks: [passkey], lengths: [512], samples: 2, perplexity_tokens: 64}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    save_teacher(folder / "teacher", spells=True, tie_word_embeddings=True)
    text = write_text(folder / "text.txt")
    (folder / "recipe.yaml").write_text(RECIPE.format(text=text), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("LAWCAT_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    patch.undo()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def student(place: Path) -> Path:
    out = place / "student"
    result = run("linearize", place / "teacher", out, "--recipe", place / "recipe.yaml")
    assert result.exit_code == 0, result.stderr
    assert "| student |" in result.stdout
    assert result.stdout.strip().endswith(str(out))
    assert "stage 2: recovery: 2/2" in result.stderr
    return out


def test_help_answers_within_a_second() -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "lawcat", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    assert b"linearize" in done.stdout
    assert min(times) < 1.0


def test_the_card_has_the_table_and_says_what_was_in_the_data(student: Path) -> None:
    card = (student / "README.md").read_text(encoding="utf-8")
    assert "### passkey" in card
    assert "No task data" in card
    assert (student / "evaluation" / "student.json").is_file()


def test_a_second_run_finds_everything_done(place: Path, student: Path) -> None:
    before = (student / "model.safetensors").stat().st_mtime_ns
    result = run("linearize", place / "teacher", student, "--recipe", place / "recipe.yaml")
    assert result.exit_code == 0
    assert "finished already" in result.stderr
    assert (student / "model.safetensors").stat().st_mtime_ns == before


def test_a_matrix(place: Path) -> None:
    recipe, out = place / "matrix.yaml", place / "matrix"
    text = (place / "recipe.yaml").read_text(encoding="utf-8")
    # The second fails when it begins.
    matrix = "matrix: {plain: {}, bad: {data.0.path: none.txt}, per-head: {model.gate: head}}\n"
    recipe.write_text(text + matrix, encoding="utf-8")
    arguments = [
        "linearize",
        place / "teacher",
        out,
        "--recipe",
        recipe,
        "--set",
        "attention_transfer.steps=1",
    ]
    first = run(*arguments, "--variant", "per-head", "--no-evaluate")
    assert first.exit_code == 0, first.stderr
    assert "| plain | 0 | - | - | - | - | not finished |" in first.stdout
    assert first.stdout.strip().endswith(str(out))
    result = run(*arguments)
    assert result.exit_code == 1
    assert "variant 3 of 3: per-head" in result.stderr
    assert "bad FAILED: data.0 (text): There is no file none.txt" in result.stderr
    assert result.stderr.strip().endswith("lawcat: failed: bad; the same command tries again")
    assert result.stdout.startswith((out / "matrix.md").read_text(encoding="utf-8"))
    assert "| per-head | 0 | `model.gate: head` |" in result.stdout
    steps = [json.loads(line)["stage"] for line in (out / "plain" / "training_log.jsonl").open()]
    assert steps == [1, 2, 2]
    assert "stage" not in run(*arguments, "--variant", "plain", "--no-evaluate").stderr


def test_a_recipe_from_several_seeds(place: Path) -> None:
    out = place / "seeds"
    arguments = ["linearize", place / "teacher", out, "--recipe", place / "recipe.yaml", "--no-evaluate"]
    result = run(*arguments, "--seeds", "0, 5", "--set", "recovery.steps=0")
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"tiny", "tiny-seed5"}


def test_eval_of_several_models(place: Path, student: Path) -> None:
    report, records = place / "report", place / "samples.jsonl"
    arguments = ["eval", place / "teacher", student, student / "adapter", "--tasks", "passkey,perplexity"]
    arguments += [
        "--lengths",
        "512",
        "--samples",
        2,
        "--perplexity-tokens",
        64,
        "--haystack",
        place / "text.txt",
    ]
    result = run(*arguments, "--report", report, "--records", records, "--option", "passkey.depth=0.5")
    assert result.exit_code == 0, result.stderr
    assert "## perplexity" in result.stdout
    assert (report / "report.md").is_file()
    assert len(records.read_text(encoding="utf-8").splitlines()) >= 4
    again = run(*arguments, "--records", records, "--option", "passkey.depth=0.5")
    assert again.exit_code == 0


def test_eval_writes_the_contract_s_json(place: Path, student: Path) -> None:
    output = place / "results.json"
    result = run("eval", student, "--lengths", "512", "--samples", 2, "--output", output)
    assert result.exit_code == 0, result.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["schema"] == 1
    assert {"task", "length", "samples", "accuracy", "ci95", "mean_tokens"} <= set(found["results"][0])


def test_student_and_adapter_generate_the_same(student: Path) -> None:
    results = [
        run("generate", path, "--prompt", "w3 w4 w5 w6", "--max-new-tokens", 8)
        for path in (student, student / "adapter")
    ]
    assert [result.exit_code for result in results] == [0, 0], results[0].stderr + results[1].stderr
    assert results[0].stdout == results[1].stdout
    assert results[0].stdout.strip()


@pytest.mark.parametrize("which", ["teacher", "student/adapter"])
def test_generation_with_int8_weights(
    place: Path, student: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def stream(model: object, *args: object, **options: object) -> Iterator[str]:
        seen.append({type(module).__name__ for module in model.modules()})  # type: ignore[attr-defined]
        yield from stream_text(model, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("lawcat.cli.generate.stream_text", stream)
    result = run("generate", place / which, "--prompt", "w3 w4 w5", "--max-new-tokens", 4, "--int8")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip()
    assert "Int8Linear" in seen[0]
    assert "Linear" not in seen[0]


@pytest.mark.parametrize("which", ["teacher", "student", "student/adapter"])
def test_info(place: Path, student: Path, which: str) -> None:
    result = run("info", place / which, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["kind"] == which.rpartition("/")[2]
    state = {row["state_bytes"] for row in found["memory"]}
    assert len(state) == 1
    assert run("info", place / which).stdout.startswith("model:")


def test_info_of_the_machine() -> None:
    text = run("info").stdout
    assert text.startswith(f"versions: python {platform.python_version()}, ")
    assert "\nbackends:\n  torch: chunked form in plain PyTorch" in text
    found = json.loads(run("info", "--json").stdout)
    assert found["versions"]["platform"].startswith(sys.platform)
    assert [line.partition(":")[0] for line in found["backends"][:3]] == ["torch", "reference", "triton"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval", "x", "--tasks", "passky"], "Did you mean 'passkey'"),
        (["eval", "x", "--lengths", "1m"], "1m"),
        (["eval", "x", "--dtype", "int8"], "--dtype 'int8' is not a choice"),
        (["eval", "x", "--option", "passkey"], "give a task, its option and a value"),
        (["eval", "x", "y", "--output", "r.json"], "--report DIRECTORY"),
        (["linearize", "x", "y", "--recipe", "quik"], "Did you mean 'quick'"),
        (["linearize", "x", "y", "--set", "recovery.step=1"], "Did you mean 'steps'"),
        (["linearize", "x", "y", "--set", "recovery.steps"], "give a field and a value"),
        (["linearize", "/nowhere/at/all", "y"], "there is no file or folder"),
        (["linearize", "x", "y", "--variant", "no-conv"], "the recipe 'quick' has no matrix"),
        (["linearize", "x", "y", "--recipe", "ablations", "--variant", "no-cnv"], "Did you mean 'no-conv'"),
        (["linearize", "x", "y", "--recipe", "ablations", "--seeds", "1,x"], "give whole numbers, as in"),
        (
            ["linearize", "x", "y", "--recipe", "ablations", "--set", "matrix.a.seed=1"],
            "in the recipe's file",
        ),
        (["generate", "x", "--prompt", "  "], "the prompt is empty"),
        (["info", "/nowhere/at/all"], "there is no file or folder"),
    ],
)
def test_mistakes_are_one_message_and_exit_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_wrong_option_is_a_usage_error() -> None:
    assert run("eval", "x", "--lenghts", "1k").exit_code == 2


@pytest.mark.parametrize(
    ("module", "arguments", "goes_on"),
    [
        ("info", ["info", "x"], False),
        ("evaluate", ["eval", "x"], False),
        ("evaluate", ["eval", "x", "--records", "r.jsonl"], True),
        ("linearize", ["linearize", "x", "y"], True),
    ],
)
def test_ctrl_c_exits_with_130_and_promises_what_is_so(
    module: str, arguments: list[str], goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"lawcat.cli.{module}.run_{module}", interrupt)
    result = run(*arguments)
    assert result.exit_code == 130
    assert result.stderr.startswith("lawcat: interrupted")
    assert ("goes on from there" in result.stderr) == goes_on


@pytest.mark.parametrize("command", [["lm-eval", "run"], ["lm-eval-tasks", "folder", "model"]])
def test_lm_eval_is_an_extra(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lawcat.evaluation.lm_eval", raising=False)
    for name in [one for one in sys.modules if one.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "pip install 'lawcat[lm-eval]'" in result.stderr
