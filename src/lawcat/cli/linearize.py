"""`lawcat linearize`: run, then measure teacher and student as the recipe says."""

from __future__ import annotations

import os
from pathlib import Path

from lawcat.cli.display import Display
from lawcat.distill.linearize import linearize
from lawcat.distill.recipe import Recipe
from lawcat.errors import ConfigurationError


def run_linearize(
    teacher: str, out: Path, recipe: str, assignments: list[str], evaluate: bool, tensorboard: bool
) -> None:
    """See the command's help."""
    settings = Recipe.load(recipe)
    if assignments:
        settings = settings.with_overrides(dict(_assignment(text) for text in assignments))
    with Display() as display:
        result = linearize(
            teacher, out, settings, progress=display.update, message=display.message, tensorboard=tensorboard
        )
        if int(os.environ.get("RANK", "0")):
            return  # one of several processes that train together: the first one tells
        if result.is_reused:
            display.message(f"{out} is finished already, from this teacher and recipe")
        if evaluate and (settings.evaluation.tasks or settings.evaluation.perplexity_tokens):
            from lawcat.distill.assessment import assess

            table = assess(result.path, teacher, settings, progress=display.update, message=display.message)
            print(table)
    print(out)


def _assignment(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise ConfigurationError(f"--set {text!r}: give a field and a value, as in --set recovery.steps=100.")
    return name.strip(), value.strip()
