"""`lawcat eval`: models on the same samples."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from lawcat.cli.display import Display
from lawcat.convert.load import default_device, load_model
from lawcat.distill.precision import resolve_precision
from lawcat.errors import ConfigurationError
from lawcat.evaluation.lengths import parse_lengths
from lawcat.evaluation.measure import PERPLEXITY, measure
from lawcat.evaluation.report import markdown_report, write_report, write_results
from lawcat.tasks import get_task

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_dtype(text: str) -> torch.dtype | None:
    """Return the dtype of an option.

    >>> parse_dtype("bfloat16")
    torch.bfloat16
    """
    if text == "fast":
        return resolve_precision("auto", default_device())
    if text not in _DTYPES:
        raise ConfigurationError(f"--dtype {text!r} is not a choice; use {', '.join(_DTYPES)} or fast.")
    return _DTYPES[text]


def parse_options(assignments: list[str]) -> dict[str, dict[str, Any]]:
    """Return the options of tasks, by task; the task itself judges names and values.

    >>> parse_options(["passkey.depth=0.5", "passkey.length_rule=longlora"])
    {'passkey': {'depth': 0.5, 'length_rule': 'longlora'}}
    """
    options: dict[str, dict[str, Any]] = {}
    for text in assignments:
        name, sign, value = text.partition("=")
        task, dot, option = name.strip().rpartition(".")
        if not sign or not dot or not task or not option:
            raise ConfigurationError(
                f"--option {text!r}: give a task, its option and a value, as in passkey.depth=random."
            )
        options.setdefault(task, {})[option] = yaml.safe_load(value)
    return options


def run_evaluate(
    models: list[str],
    tasks: str,
    lengths: str,
    samples: int,
    seed: int,
    output: Path | None,
    report: Path | None,
    perplexity_tokens: int,
    records: Path | None,
    haystack: str | None,
    assignments: list[str],
    device: str | None,
    dtype: str,
    base: str | None,
) -> None:
    """See the command's help."""
    names = [task.strip() for task in tasks.split(",") if task.strip()]
    for name in names:
        if name != PERPLEXITY:
            get_task(name)
    if output is not None and len(models) > 1:
        raise ConfigurationError(
            "--output takes the results of one model; for several, use --report DIRECTORY."
        )
    parsed = parse_lengths(lengths)
    options = parse_options(assignments)
    titles = _titles(models)
    command = "lawcat " + " ".join(sys.argv[1:])
    payloads = []
    with Display() as display:
        for model, title in zip(models, titles, strict=True):
            loaded = load_model(
                model, dtype=parse_dtype(dtype), device=device, base=base, progress=display.message
            )
            payload = measure(
                loaded.model,
                loaded.tokenizer,
                name=title,
                tasks=names,
                lengths=parsed,
                samples=samples,
                seed=seed,
                perplexity_tokens=perplexity_tokens,
                haystack=haystack,
                options=options,
                records=records,
                command=command,
                progress=display.update,
            )
            payloads.append(payload)
            del loaded
            gc.collect()
        if output is not None:
            write_results(output, payloads[0])
        if report is not None:
            display.message(f"report: {write_report(report, payloads)}")
    print(markdown_report(payloads))


def _titles(models: list[str]) -> list[str]:
    """Return what each model is called: the last part of its path, or all of it where two would be alike."""
    short = [Path(model).name for model in models]
    if len(set(models)) < len(models):
        raise ConfigurationError("a model is named twice; name each one once.")
    return short if len(set(short)) == len(short) else models
