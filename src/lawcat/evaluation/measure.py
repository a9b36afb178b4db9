"""One model measured on everything that was asked for: tasks by length, and perplexity by position."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lawcat.errors import ConfigurationError, did_you_mean
from lawcat.evaluation.lengths import format_length
from lawcat.evaluation.memory import peak_bytes, reset_peak
from lawcat.evaluation.perplexity import check_windows, perplexity_by_position
from lawcat.evaluation.runner import Kind, Progress, empty_result, evaluate
from lawcat.evaluation.samples import SampleCache
from lawcat.tasks import TASKS, get_task, resolve_source

PERPLEXITY = "perplexity"

Display = Callable[[str, int, int, dict[str, float]], None]


def check_tasks(names: Sequence[str]) -> list[str]:
    """Return the names if each is a task or `"perplexity"`.

    Raises:
        ConfigurationError: if there is none, or one is unknown.

    Example:
        >>> check_tasks(["passkey", "perplexity"])
        ['passkey', 'perplexity']
    """
    known = [*sorted(TASKS), PERPLEXITY]
    if not names:
        raise ConfigurationError(f"No task is named; there are: {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise ConfigurationError(
                f"There is no task {name!r}; there are: {', '.join(known)}.{did_you_mean(name, known)}"
            )
    return list(dict.fromkeys(names))


def measure(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int = 0,
    kind: Kind | None = None,
    perplexity_tokens: int = 16384,
    haystack: str | None = None,
    noise: str | None = None,
    babi: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    records: str | Path | None = None,
    sample_cache: SampleCache | None = None,
    command: str | None = None,
    progress: Display | None = None,
) -> dict[str, Any]:
    """Return a model's results as `lawcat eval` writes them; `docs/results.md` says what each field means.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        name: What results call it.
        tasks: Names of tasks; `"perplexity"` for perplexity by position, on the haystack's text.
        lengths: Prompt lengths in tokens, and the windows of perplexity. Tasks that have no length 0, and
            perplexity, pass over it where another task has it.
        samples: Samples a task and length.
        seed: Of the samples.
        kind: What results say the model is; None looks at its layers.
        perplexity_tokens: Tokens of text for perplexity, a length; fewer where the text is shorter.
        haystack: Text for needles and perplexity; None for the built-in excerpt.
        noise: Text around BABILong's facts; None for the task's own.
        babi: Folder of the real bAbI files; None for the simulator.
        options: Options by task, such as `{"passkey": {"depth": "random"}}`.
        records: Finished samples are kept here and not run again.
        sample_cache: Where samples are kept for the next model, whose call is given the same.
        command: How it was called, for the record.
        progress: Called with a title, how many are done of how many, and measurements: `seconds_left`, an
            estimate for the samples of this model.

    Returns:
        `{"schema": 1, "model": ..., "results": [...], "perplexity": [...]}`.

    Raises:
        LawcatError: as `evaluate` and `perplexity_by_position`.
    """

    def show(state: Progress) -> None:
        if progress is not None:
            left = {} if state.seconds_left is None else {"seconds_left": state.seconds_left}
            progress(f"{name}: samples", state.done, state.total, left)

    chosen = check_tasks(tasks)
    generated = [task for task in chosen if task != PERPLEXITY]
    windows = [length for length in lengths if length > 0]
    if PERPLEXITY in chosen and not windows:
        raise ConfigurationError("Perplexity has no length 0; name a length of at least 2 tokens.")
    text = resolve_source(haystack) if PERPLEXITY in chosen else None
    if text is not None:
        check_windows(tokenizer, text, windows)  # now, and not when all samples are answered
    device = model.get_input_embeddings().weight.device
    reset_peak(device)
    if generated:
        # Perplexity uses the haystack too, so that then it is not without effect.
        is_used = PERPLEXITY not in chosen or any(get_task(task).uses_prose for task in generated)
        result = evaluate(
            model,
            tokenizer,
            tasks=generated,
            lengths=lengths,
            samples=samples,
            seed=seed,
            name=name,
            kind=kind,
            haystack=haystack if is_used else None,
            noise=noise,
            babi=babi,
            options=options,
            output_jsonl=records,
            sample_cache=sample_cache,
            progress=show,
        )
    else:
        _check_perplexity_alone(options or {}, {"noise": noise, "babi": babi})
        result = empty_result(model, name=name, seed=seed, kind=kind)
    payload = result.to_json(command)
    if text is not None:
        payload[PERPLEXITY] = [
            perplexity_by_position(
                model,
                tokenizer,
                text,
                length=length,
                max_windows=max(perplexity_tokens // length, 1),
                progress=_perplexity_progress(progress, name, length),
            ).to_json()
            for length in windows
        ]
        payload["peak_memory_bytes"] = max(payload["peak_memory_bytes"] or 0, peak_bytes(device))
    return payload


def _check_perplexity_alone(
    options: Mapping[str, Mapping[str, Any]], outside: Mapping[str, str | None]
) -> None:
    for task in options:
        raise ConfigurationError(f"There are options for {task!r}, but perplexity, which has none, is alone.")
    for option, value in outside.items():
        if value is not None:
            warnings.warn(
                f"The {option} has no effect: perplexity reads the haystack's text alone.", stacklevel=3
            )


def _perplexity_progress(
    progress: Display | None, name: str, length: int
) -> Callable[[int, int], object] | None:
    if progress is None:
        return None
    title = f"{name}: perplexity at {format_length(length)}"
    return lambda done, total: progress(title, done, total, {})
