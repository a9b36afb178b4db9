"""Teacher and student measured as the recipe says, and the model card that shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lawcat.convert.load import load_model
from lawcat.convert.teacher import load_teacher
from lawcat.distill.linearize import RUN_NAME
from lawcat.distill.model_card import model_card
from lawcat.distill.recipe import Recipe
from lawcat.distill.text import Progress
from lawcat.evaluation.measure import PERPLEXITY, measure
from lawcat.evaluation.report import markdown_report, read_results, write_results
from lawcat.files import write_atomic, write_manifest

EVALUATION_FOLDER = "evaluation"


def assess(
    student: str | Path,
    teacher: str,
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    message: Callable[[str], None] = lambda text: None,
) -> str:
    """Measure teacher and student on the recipe's evaluation, write results and model card, return the table.

    Finished samples are kept in the student's directory and not run again.

    Args:
        student: The finished student's directory.
        teacher: Its teacher.
        recipe: Says what is measured.
        progress: Called while models run.
        message: Called with a line of text when something begins.

    Returns:
        The table, in Markdown.

    Raises:
        LawcatError: for data that cannot be used, or a card that cannot be written.
    """
    directory = Path(student)
    folder = directory / EVALUATION_FOLDER
    payloads = []
    for name in ("teacher", "student"):
        file = folder / f"{name}.json"
        if not file.is_file():
            message(f"measuring the {name}")
            loaded = load_teacher(teacher) if name == "teacher" else load_model(directory, device=None)
            write_results(file, _measure(loaded, name, folder, recipe, progress))
        payloads.append(read_results(file))
    table = markdown_report(payloads)
    run = json.loads((directory / RUN_NAME).read_text(encoding="utf-8"))
    write_atomic(directory / "README.md", model_card(run, recipe, name=directory.name, table=table))
    write_manifest(directory)
    return table


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
        records=folder / "samples.jsonl",
        progress=progress,
    )
