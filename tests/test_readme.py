"""What README shows works: its Python runs, its commands have the options they are shown with."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from lawcat.cli.app import app
from lawcat.distill.linearize import linearize
from lawcat.distill.recipe import Recipe
from tiny_teachers import save_teacher, write_text

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.S)
COMMANDS = [
    line.replace("\\\n", " ").split("#")[0]
    for block in re.findall(r"```console\n(.*?)```", README, flags=re.S)
    for line in re.findall(r"^\$ (lawcat (?:.*\\\n)*.*)$", block, flags=re.M)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where OUT is what ``lawcat linearize TEACHER OUT`` left."""
    folder = tmp_path_factory.mktemp("readme")
    save_teacher(folder / "TEACHER", spells=True)
    text = write_text(folder / "text.txt")
    stages = {
        f"{stage}.{field}": value
        for stage in ("attention_transfer", "recovery")
        for field, value in {"steps": 1, "warmup_steps": 0, "batch_sequences": 1}.items()
    }
    data = [{"provider": "text", "path": str(text)}]
    recipe = Recipe.load("quick").with_overrides({**stages, "recovery.carried_segments": 0, "data": data})
    linearize(str(folder / "TEACHER"), folder / "OUT", recipe)
    return folder


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(block: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    if "loaded" in names:
        assert type(names["model"]).__name__ == type(names["loaded"].model).__name__ == "LawcatForCausalLM"


def test_there_is_something_to_check() -> None:
    assert len(PYTHON) >= 2
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_options_shown(command: str) -> None:
    _, name, *arguments = shlex.split(command)
    commands = typer.main.get_command(app).commands
    assert name in commands
    if commands[name].context_settings.get("ignore_unknown_options"):
        return  # hands them on to another program
    known = {
        option
        for parameter in commands[name].params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert {argument for argument in arguments if argument.startswith("--")} <= known


def test_recipes_named_exist() -> None:
    table = README.split("## Recipes")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\S+)` \|", table, flags=re.M)
    assert len(rows) >= 4
    named = {*rows, *re.findall(r"--recipe (\S+)", README)}
    assert named <= set(Recipe.shipped())


def test_linked_files_exist() -> None:
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (root / target).exists(), target
