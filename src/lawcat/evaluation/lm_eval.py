"""lm-evaluation-harness: lawcat's models there, and lawcat's samples as its tasks.

Importing this module registers the model `lawcat` with lm-eval. As `lm_eval` itself has no way to find models
of other packages, `lawcat lm-eval ...` imports both and hands all arguments on to it.
"""

# mypy is told to leave lm-eval out.
# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from lawcat.convert.load import load_model
from lawcat.errors import ConfigurationError, MissingDependencyError
from lawcat.evaluation.lengths import parse_length
from lawcat.files import write_atomic
from lawcat.tasks import Sample, get_task

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingDependencyError("lm-eval", "lm-eval", "Running lm-evaluation-harness") from error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 131_072
"""Tokens that a prompt may have where `max_length` is not given; lm-eval needs a number."""

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_NAME = re.compile(r"[a-z0-9_]+")


@register_model("lawcat")
class LawcatLM(HFLM):
    """Any model that lawcat's commands accept, for `lm_eval --model lawcat --model_args pretrained=MODEL`.

    A prompt longer than `max_length` is refused: lm-eval itself would cut off its beginning with no more than
    a warning, and takes for the limit the window that the model declares, which means nothing for a linear
    one.

    Args:
        pretrained: A student's or adapter's folder, any model of transformers, `"smollm2-135m-instruct"`, or
            a loaded model.
        tokenizer: A loaded tokenizer, or one's name; None takes the model's own.
        max_length: Most tokens of a prompt and its answer.
        device: Such as `"cuda:1"`; None, and `"cuda:0"` as lm-eval's default, is the GPU if there is one.
        dtype: `"auto"` (as saved), `"float32"`, `"bfloat16"` or `"float16"`.
        base: The teacher to apply an adapter to; None is the one it names.
        batch_size: Prompts at a time.
        **kwargs: As of lm-eval's `HFLM`.

    Raises:
        ConfigurationError: for another dtype, or later for a prompt beyond `max_length`.
        CheckpointError: for a damaged model.
        TeacherError: for one that cannot be found.
    """

    _max_length: int

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        base: str | None = None,
        batch_size: int | str = 1,
        **kwargs: Any,
    ) -> None:
        model = pretrained
        # What lm-eval's command gives where none was asked for, and its own models take on a CPU, too.
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None
        if isinstance(pretrained, (str, os.PathLike)):
            loaded = load_model(os.fspath(pretrained), dtype=_parse_dtype(dtype), device=device, base=base)
            model, tokenizer = loaded.model, tokenizer or loaded.tokenizer
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=max_length or DEFAULT_MAX_LENGTH,
            batch_size=batch_size,
            **kwargs,
        )

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> Any:
        """Return ids and mask [B, T] of the texts, padded.

        Raises:
            ConfigurationError: if one is longer than allowed.
        """
        ids, mask = super().tok_batch_encode(strings, padding_side=padding_side, truncation=truncation)
        if left_truncate_len is not None and ids.shape[1] > left_truncate_len:
            raise ConfigurationError(
                f"A prompt has {ids.shape[1]} tokens and max_length={self.max_length} leaves room for "
                f"{left_truncate_len}. Nothing is cut off silently: pass --model_args max_length=..."
            )
        return ids, mask

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of whole texts, in windows as long as the model declares.

        Windows of `max_length` would hold the logits of a whole book at once.
        """
        declared = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        allowed: int = self._max_length
        self._max_length = min(declared or allowed, allowed)
        try:
            likelihoods: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            return likelihoods
        finally:
            self._max_length = allowed


def _parse_dtype(name: str) -> Any:
    if name not in _DTYPES:
        raise ConfigurationError(f"dtype is {name!r}; it must be one of {', '.join(_DTYPES)}.")
    return None if name == "auto" else getattr(torch, name)


def write_tasks(
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str],
    lengths: Sequence[int | str],
    samples: int = 50,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[str]:
    """Write lawcat's samples as tasks of lm-eval: a YAML and a JSONL file for each task and length.

    `lm_eval --include_path FOLDER --tasks NAME` then asks the very questions of `lawcat eval` and scores them
    by the same code, so both give the same figure.

    Args:
        folder: Where to; made if it does not exist.
        tokenizer: Measures the prompts.
        tasks: Names of lawcat's tasks.
        lengths: Nominal lengths in tokens; 0 for BABILong's facts alone.
        samples: Samples a task and length.
        seed: Of the samples.
        options: Options by task.

    Returns:
        The names to give to `--tasks`, such as `lawcat_passkey_1024`.

    Raises:
        ConfigurationError: for unknown tasks, lengths or options.
        DataError: for a length too short for its task.
        LawcatError: if a file cannot be written.
    """
    root = Path(folder).absolute()
    if strangers := sorted(set(options or ()) - set(tasks)):
        raise ConfigurationError(
            f"There are options for {strangers[0]!r}, which is not among the tasks: {', '.join(tasks)}."
        )
    names = []
    for task_name in tasks:
        task = get_task(task_name)
        chosen = task.resolve_options((options or {}).get(task_name, {}))
        for length in [parse_length(one, least=0) for one in lengths]:
            name = f"lawcat_{task_name}_{length}"
            assert _NAME.fullmatch(name)
            lines = []
            for index in range(samples):
                sample = task.generate(tokenizer, length, index, seed, **chosen)
                lines.append(json.dumps(_document(sample)))
            write_atomic(root / f"{name}.jsonl", "\n".join(lines) + "\n")
            settings = _task_settings(name, root / f"{name}.jsonl", task.metrics, sample.max_new_tokens)
            write_atomic(root / f"{name}.yaml", settings)
            names.append(name)
    # `!function` of lm-eval reads a file beside the YAML.
    write_atomic(root / "scoring.py", "from lawcat.evaluation.lm_eval import process_results  # noqa: F401\n")
    return names


def process_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return the metrics of one answer; lm-eval calls this for every document that `write_tasks` wrote."""
    texts = {"answers": tuple(document["answers"]), "metadata": json.loads(document["metadata"])}
    sample = Sample(**{one.name: document[one.name] for one in fields(Sample)} | texts)
    return get_task(sample.task).score(sample, results[0])


def _document(sample: Sample) -> dict[str, Any]:
    # Metadata as text: the table that lm-eval reads the file into wants the same fields in every line.
    return asdict(sample) | {"metadata": json.dumps(dict(sample.metadata))}


class _Function(str):
    """The name of a function in a file beside the YAML, written with lm-eval's tag."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, value: dumper.represent_scalar("!function", str(value)))


def _task_settings(name: str, data: Path, metrics: Sequence[str], max_new_tokens: int) -> str:
    return yaml.dump(
        {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "output_type": "generate_until",
            "test_split": "test",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answers[0]}}",
            "process_results": _Function("scoring.process_results"),
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics
            ],
            "generation_kwargs": {"do_sample": False, "max_gen_toks": max_new_tokens, "until": []},
            "metadata": {"version": 1.0},
        },
        Dumper=_Dumper,
        sort_keys=False,
    )


__all__ = ["DEFAULT_MAX_LENGTH", "LawcatLM", "process_results", "write_tasks"]
