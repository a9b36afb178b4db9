"""What README shows works: its Python runs, its commands have the options they are shown with."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from lawcat.cli.app import app
from lawcat.distill.recipe import Recipe

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.S)
COMMANDS = [
    line.replace("\\\n", " ").split("#")[0]
    for block in re.findall(r"```console\n(.*?)```", README, flags=re.S)
    for line in re.findall(r"^\$ (lawcat (?:.*\\\n)*.*)$", block, flags=re.M)
]


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


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
