"""The page that goes with a student: what it is, what it was trained on, what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lawcat.distill.recipe import Recipe
from lawcat.files import human_bytes

_NOT_MEASURED = "It has not been measured yet; `lawcat eval` does that."


def model_card(run: dict[str, Any], recipe: Recipe, *, name: str, table: str | None = None) -> str:
    """Return the card in Markdown.

    Args:
        run: The record that `linearize` leaves, `lawcat_run.json`.
        recipe: The resolved recipe.
        name: The student's, as its directory is called.
        table: What was measured, as `markdown_report` writes it.
    """
    stages = run.get("stages", {})
    tokens = sum(stage["tokens"] for stage in stages.values())
    trained = (
        f"Trained on {tokens:,} tokens in {run['training_s']:.0f} s on {run['device']}, peak memory "
        f"{human_bytes(run['peak_memory_bytes'])}."
        if tokens
        else "Converted and not trained."
    )
    if tokens and run["data"]["has_task_data"]:
        trained += (
            " **Samples of evaluation tasks were in the training data**, with other keys and values: results "
            "on those tasks show how a trained task carries over to longer inputs."
        )
    elif tokens:
        trained += " No task data was in the training data."
    if (tuning := stages.get("0")) is not None:
        trained += (
            f" First, in {tuning['steps']} steps, LoRA factors learned these data in the teacher's softmax "
            f"attention (loss {tuning['first_loss']:.3g} to {tuning['last_loss']:.3g}); linear attention was "
            "fitted to the teacher with them."
        )
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [lawcat, linear-attention]",
        "---",
        f"# {name}",
        "",
        f"A linear-attention student of `{Path(run['base']).name}` (SHA-256 {run['teacher'][:16]}...), made "
        f"by lawcat {run['lawcat']} with the recipe `{recipe.name}`, seed {recipe.seed}. Its memory is "
        "the same at any context length.",
        "",
        trained,
        "",
        "```python",
        "import lawcat  # or trust_remote_code=True below",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        "```",
        "",
        _NOT_MEASURED if table is None else _lowered(table),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _lowered(table: str) -> str:
    """Return a page's headings a level down, to stand inside another page."""
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in table.splitlines())
