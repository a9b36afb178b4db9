"""`lawcat bench` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lawcat.cli.app import app


@pytest.fixture(autouse=True)
def _short_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lawcat.bench.operators._CHECK_TOKENS", 37)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])


def test_a_whole_run(tmp_path: Path) -> None:
    result = run(
        *("--shape", "tiny", "--lengths", "16,40", "--seconds", "0.002", "--training-batch", 1),
        *("--device", "cpu", "--output", tmp_path / "out.json", "--report", tmp_path / "report"),
    )
    assert result.exit_code == 0, result.stderr
    for heading in (
        "operator forward",
        "operator decode",
        "model prefill",
        "model decode",
        "training stage 2",
    ):
        assert f"## {heading}, tiny, batch 1" in result.stdout
    assert "## Where lawcat becomes faster" in result.stdout
    assert "torch threads: " in result.stdout
    assert "model, tiny: 4/4" in result.stderr
    payload = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert {row["measurement"] for row in payload["results"]} == {
        "operator forward",
        "operator forward and backward",
        "operator decode",
        "model prefill",
        "model decode",
        "training stage 1",
        "training stage 2",
    }
    assert payload["backends"][0].startswith("torch: ")
    assert (tmp_path / "report" / "model-prefill-tiny-1.png").is_file()


def test_ctrl_c_saves_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lawcat.bench.generation.measure", interrupt)
    output = tmp_path / "out.json"
    result = run("--shape", "tiny", "--lengths", "16", "--seconds", "0.002", "--output", output)
    assert result.exit_code == 130
    found = json.loads(output.read_text(encoding="utf-8"))["results"]
    assert {row["measurement"].split()[0] for row in found} == {"operator"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shape", "tny"], "Did you mean 'tiny'"),
        (["--what", "operator"], "Did you mean 'operators'"),
        (["--what", ","], "--what is empty"),
        (["--lengths", "1m"], "1m"),
        (["--device", "cuda:99"], "cannot be used here"),
        (["--device", "nonsense"], "cannot be used here"),
        (["--device", "cpu", "--cuda-graphs"], "CUDA graphs need a GPU"),
        (["--backends", "trch"], "Did you mean 'torch'"),
        (["--dtype", "int4"], "--dtype 'int4' is not a choice"),
        (["--image-format", "pdf"], "--image-format 'pdf'"),
        (["/nowhere/at/all"], "there is no file or folder"),
    ],
)
def test_mistakes_are_one_message_and_exit_2(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_mistyped_backend_ends_it_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found out at the end, and the results lost."""
    monkeypatch.setenv("LAWCAT_BACKEND", "trition")
    monkeypatch.setattr("lawcat.cli.bench._measure", lambda *_: pytest.fail("measured"))
    result = run("--shape", "tiny", "--lengths", "16", "--output", tmp_path / "out.json")
    assert result.exit_code == 2
    assert "LAWCAT_BACKEND='trition' does not exist" in result.stderr
    assert "Did you mean 'triton'?" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
