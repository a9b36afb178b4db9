"""`lawcat lm-eval` and `lawcat lm-eval-tasks`: lm-evaluation-harness on lawcat's models and samples."""

from __future__ import annotations

import sys
from pathlib import Path

from lawcat.cli.evaluate import parse_options
from lawcat.evaluation.lengths import parse_lengths


def run_lm_eval(arguments: list[str]) -> None:
    """See the command's help."""
    import lawcat.evaluation.lm_eval  # noqa: F401, I001  registers the model, or says what is missing
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


def run_lm_eval_tasks(
    folder: Path, model: str, tasks: str, lengths: str, samples: int, seed: int, assignments: list[str]
) -> None:
    """See the command's help."""
    from lawcat.convert.load import load_model_tokenizer
    from lawcat.evaluation.lm_eval import write_tasks

    names = write_tasks(
        folder,
        load_model_tokenizer(model),
        tasks=[task.strip() for task in tasks.split(",") if task.strip()],
        lengths=parse_lengths(lengths, least=0),
        samples=samples,
        seed=seed,
        options=parse_options(assignments),
    )
    print(",".join(names))
