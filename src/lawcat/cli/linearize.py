"""`lawcat linearize`: run, or all runs of a matrix; then measure teacher and students as the recipe says."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from lawcat.cli.display import Display
from lawcat.distill.linearize import end_process_group, linearize
from lawcat.distill.recipe import Recipe
from lawcat.errors import ConfigurationError


def run_linearize(
    teacher: str,
    out: Path,
    recipe: str,
    assignments: list[str],
    evaluate: bool,
    tensorboard: bool,
    variant: str | None = None,
    seeds: str | None = None,
) -> None:
    """See the command's help."""
    settings = Recipe.load(recipe)
    if assignments:
        settings = settings.with_overrides(dict(_assignment(text) for text in assignments))
    if settings.matrix is not None or seeds is not None:
        _run_matrix(teacher, out, settings, evaluate, tensorboard, variant, seeds)
        return
    if variant is not None:
        raise ConfigurationError(
            f"--variant {variant!r}: the recipe {settings.name!r} has no matrix, so it has no variants."
        )
    with Display() as display:
        result = linearize(
            teacher, out, settings, progress=display.update, message=display.message, tensorboard=tensorboard
        )
        end_process_group()
        if int(os.environ.get("RANK", "0")):
            return  # one of several processes that train together: the first one tells
        if result.is_reused:
            display.message(f"{out} is finished already, from this teacher and recipe")
        if evaluate and (settings.evaluation.tasks or settings.evaluation.perplexity_tokens):
            from lawcat.distill.assessment import assess

            table = assess(result.path, teacher, settings, progress=display.update, message=display.message)
            print(table)
    print(out)


def _run_matrix(
    teacher: str,
    out: Path,
    recipe: Recipe,
    evaluate: bool,
    tensorboard: bool,
    variant: str | None,
    seeds: str | None,
) -> None:
    from lawcat.distill.matrix import linearize_matrix

    with Display() as display:
        result = linearize_matrix(
            teacher,
            out,
            recipe,
            variants=None
            if variant is None
            else [name.strip() for name in variant.split(",") if name.strip()],
            seeds=None if seeds is None else _seeds(seeds),
            evaluate=evaluate,
            progress=display.update,
            message=display.message,
            tensorboard=tensorboard,
        )
    if int(os.environ.get("RANK", "0")):
        return
    print(result.table)
    print(out)
    if result.failed:
        names = ", ".join(run.name for run in result.failed)
        print(f"lawcat: failed: {names}; the same command tries again", file=sys.stderr)
        raise typer.Exit(1)


def _seeds(text: str) -> list[int]:
    """Return the seeds of an option.

    >>> _seeds("0, 2")
    [0, 2]
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigurationError(f"--seeds {text!r}: give whole numbers, as in --seeds 0,1,2.")
    return [int(part) for part in parts]


def _assignment(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise ConfigurationError(f"--set {text!r}: give a field and a value, as in --set recovery.steps=100.")
    return name.strip(), value.strip()
