"""Teacher and student measured as the recipe says, and the model card that shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lawcat.convert.load import load_model
from lawcat.convert.teacher import load_teacher
from lawcat.distill.recipe import Recipe
from lawcat.distill.text import Progress
from lawcat.evaluation.measure import PERPLEXITY, measure
from lawcat.evaluation.report import markdown_report, read_results, write_results
from lawcat.files import human_bytes, write_atomic, write_manifest

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
    card = _card(directory, teacher, recipe, table)
    write_atomic(directory / "README.md", card)
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


def _card(directory: Path, teacher: str, recipe: Recipe, table: str) -> str:
    run = json.loads((directory / "lawcat_run.json").read_text(encoding="utf-8"))
    has_task_data = run["data"]["has_task_data"]
    stages = run.get("stages", {})
    tokens = sum(stage["tokens"] for stage in stages.values())
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [lawcat, linear-attention]",
        "---",
        f"# {Path(teacher).name}, linearized",
        "",
        f"A linear-attention student of `{teacher}`, made by lawcat {run['lawcat']} with the recipe "
        f"`{recipe.name}`, seed {recipe.seed}: constant memory at any context length.",
        "",
        f"Trained on {tokens:,} tokens in {run['training_s']:.0f} s on {run['device']}, peak memory "
        f"{human_bytes(run['peak_memory_bytes'])}. "
        + (
            "**Samples of the tasks below were in the training data** (with other keys), so these results "
            "show how a trained task carries over to longer inputs."
            if has_task_data
            else "No task data was in the training data."
        ),
        "",
        "```python",
        "import lawcat  # or trust_remote_code=True below",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{directory.name}")',
        "```",
        "",
        table.replace("# Evaluation", "## Evaluation", 1).replace("\n## ", "\n### "),
    ]
    return "\n".join(lines)
