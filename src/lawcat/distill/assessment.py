"""Teacher and student measured as the recipe says, and the model card that shows it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lawcat.convert.cache_dir import cache_dir, cache_lock
from lawcat.convert.load import load_model
from lawcat.distill.linearize import RUN_NAME
from lawcat.distill.model_card import model_card
from lawcat.distill.recipe import EvaluationSettings, Recipe
from lawcat.distill.text import Progress
from lawcat.errors import DataError
from lawcat.evaluation.measure import PERPLEXITY, measure
from lawcat.evaluation.report import markdown_report, read_results, write_results
from lawcat.files import write_atomic, write_manifest
from lawcat.memory import free_memory

EVALUATION_FOLDER = "evaluation"
_SAMPLES_NAME = "samples.jsonl"


def assess(
    student: str | Path,
    teacher: str,
    recipe: Recipe,
    *,
    name: str = "student",
    teacher_folder: Path | None = None,
    progress: Progress | None = None,
    message: Callable[[str], None] = lambda text: None,
) -> str:
    """Measure teacher and student on the recipe's evaluation, write results and model card, return the table.

    Finished samples are kept in the student's directory and not run again.

    Args:
        student: The finished student's directory.
        teacher: Its teacher.
        recipe: Says what is measured.
        name: What results call the student.
        teacher_folder: Where the teacher's results are kept, for students that share them; `None` is beside
            the student's.
        progress: Called while models run.
        message: Called with a line of text when something begins.

    Returns:
        The table, in Markdown.

    Raises:
        LawcatError: for data that cannot be used, or a card that cannot be written.
    """
    directory = Path(student)
    folder = directory / EVALUATION_FOLDER
    # The student first: its results are kept also where the teacher is too slow or large for these lengths.
    own = measured(directory, name, folder, recipe, progress, message, file_name="student.json")
    reference = measured(teacher, "teacher", teacher_folder or folder, recipe, progress, message)
    table = markdown_report([reference, own])
    run = json.loads((directory / RUN_NAME).read_text(encoding="utf-8"))
    write_atomic(directory / "README.md", model_card(run, recipe, name=directory.name, table=table))
    write_manifest(directory)
    return table


def measured(
    model: str | Path,
    name: str,
    folder: Path,
    recipe: Recipe,
    progress: Progress | None = None,
    message: Callable[[str], None] = lambda text: None,
    *,
    file_name: str | None = None,
) -> dict[str, Any]:
    """Return a model's results on the recipe's evaluation, from its file in `folder` or measured now.

    Another process that wants the same file waits for it.

    Args:
        model: Anything that `lawcat.load_model` takes.
        name: What results call it.
        folder: Where results and finished samples are kept.
        recipe: Says what is measured.
        progress: Called while the model runs.
        message: Called with a line of text when something begins.
        file_name: Name of the results file; `None` is `<name>.json`.

    Raises:
        LawcatError: for a model or data that cannot be used.
    """
    file = folder / (file_name or f"{name}.json")
    place = hashlib.sha256(str(file.absolute()).encode()).hexdigest()
    with cache_lock(cache_dir(), f"results-{place}"):
        found = stored_results(file, recipe.evaluation)
        if found is None:
            message(f"measuring {name}")
            loaded = load_model(model, device=None)
            payload = _measure(loaded, name, folder, recipe, progress)
            del loaded
            free_memory()
            write_results(file, {**payload, "evaluation": _as_json(recipe.evaluation)})
            found = read_results(file)
    return found


def stored_results(file: Path, settings: EvaluationSettings) -> dict[str, Any] | None:
    """Return the results in a file; None where there are none, or they were measured with other settings."""
    if not file.is_file():
        return None
    try:
        found = read_results(file)
    except DataError:  # of another version, or damaged: measured anew
        return None
    return found if found.get("evaluation") in (None, _as_json(settings)) else None


def _as_json(settings: EvaluationSettings) -> dict[str, Any]:
    return {
        "tasks": list(settings.tasks),
        "lengths": list(settings.lengths),
        "samples": settings.samples,
        "perplexity_tokens": settings.perplexity_tokens,
    }


def _measure(
    loaded: Any, name: str, folder: Path, recipe: Recipe, progress: Progress | None
) -> dict[str, Any]:
    settings = recipe.evaluation
    folder.mkdir(parents=True, exist_ok=True)
    return measure(
        loaded.model,
        loaded.tokenizer,
        name=name,
        tasks=[*settings.tasks, *([PERPLEXITY] if settings.perplexity_tokens else [])],
        lengths=settings.lengths,
        samples=settings.samples,
        perplexity_tokens=settings.perplexity_tokens,
        records=folder / _SAMPLES_NAME,
        progress=progress,
    )
