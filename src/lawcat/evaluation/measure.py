"""One model measured on everything that was asked for: tasks by length, and perplexity by position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lawcat.evaluation.lengths import format_length
from lawcat.evaluation.perplexity import perplexity_by_position
from lawcat.evaluation.runner import Progress, evaluate
from lawcat.tasks import resolve_source

PERPLEXITY = "perplexity"

Display = Callable[[str, int, int, dict[str, float]], None]


def measure(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int = 0,
    perplexity_tokens: int = 16384,
    haystack: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    records: str | Path | None = None,
    command: str | None = None,
    progress: Display | None = None,
) -> dict[str, Any]:
    """Return a model's results as `lawcat eval` writes them.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        name: What results call it.
        tasks: Names of tasks; `"perplexity"` for perplexity by position, on the haystack's text.
        lengths: Prompt lengths in tokens, and the windows of perplexity.
        samples: Samples a task and length.
        seed: Of the samples.
        perplexity_tokens: Tokens of text for perplexity, a length; fewer where the text is shorter.
        haystack: Text for needles and perplexity; None for the built-in excerpt.
        options: Options by task, such as `{"passkey": {"depth": "random"}}`.
        records: Finished samples are kept here and not run again.
        command: How it was called, for the record.
        progress: Called with a title, how many are done of how many, and measurements.

    Returns:
        `{"schema": 1, "model": ..., "results": [...], "perplexity": [...]}`.

    Raises:
        LawcatError: as `evaluate` and `perplexity_by_position`.
    """

    def show(state: Progress) -> None:
        if progress is not None:
            progress(f"{name}: samples", state.done, state.total, {})

    generated = [task for task in tasks if task != PERPLEXITY]
    uses_prose = any(task.startswith("niah_single_") and task != "niah_single_1" for task in generated)
    payload = evaluate(
        model,
        tokenizer,
        tasks=generated,
        lengths=lengths,
        samples=samples,
        seed=seed,
        name=name,
        haystack=haystack if uses_prose else None,
        options=options,
        output_jsonl=records,
        progress=show,
    ).to_json(command)
    if PERPLEXITY in tasks:
        text = resolve_source(haystack)
        payload[PERPLEXITY] = [
            perplexity_by_position(
                model,
                tokenizer,
                text,
                length=length,
                max_windows=max(perplexity_tokens // length, 1),
                progress=_perplexity_progress(progress, name, length),
            ).to_json()
            for length in lengths
        ]
    return payload


def _perplexity_progress(
    progress: Display | None, name: str, length: int
) -> Callable[[int, int], object] | None:
    if progress is None:
        return None
    title = f"{name}: perplexity at {format_length(length)}"
    return lambda done, total: progress(title, done, total, {})
