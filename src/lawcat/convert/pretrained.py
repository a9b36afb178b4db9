"""Loading with transformers: its errors in our words, and what it passes over in silence refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lawcat.convert.safetensors_file import weight_files
from lawcat.errors import LawcatError, TeacherError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SAFETENSORS_ONLY = (
    "Model files are safetensors: convert it with `save_pretrained`, or use a copy that has them."
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "*.jinja",
)
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what transformers raises inside the block, for files it cannot read, into a `TeacherError`.

    Args:
        name: What is read, for the message.
    """
    import torch

    try:
        yield
    except (LawcatError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # transformers raises nearly every class here, of several libraries
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise TeacherError(
            f"the teacher {name} cannot be read: {lines[0] if lines else type(error).__name__}. "
            "Its files are damaged or of a kind that transformers does not know; fetch them again."
        ) from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Spare the bar for a load that takes a moment, which would tear the display of the run."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def folder_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of the model in a folder.

    Raises:
        TeacherError: where there is none, or it is damaged or of a type unknown to transformers.
    """
    from transformers import AutoConfig

    from lawcat.convert.adapter import is_adapter

    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise TeacherError(f"{folder} is an adapter, not a model. Give the model that it belongs to.")
        if is_adapter(folder):
            raise TeacherError(
                f"{folder} is an adapter of lawcat, a linear model already, and no teacher. Give the teacher "
                "that it was made from."
            )
        gguf = sorted(folder.glob("*.gguf"))
        if gguf:
            raise TeacherError(f"{folder} holds GGUF files: name the file itself, such as {gguf[0]}.")
        raise TeacherError(f"{folder} has no config.json, so it is not a model. Give a model's folder.")
    try:
        fields = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise TeacherError(f"{file} is damaged: it is not JSON ({error}). Fetch it again.") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise TeacherError(f"{file} does not say its model_type, so it is not a model's. Fetch it again.")
    with reading(str(folder)):
        return AutoConfig.from_pretrained(folder, local_files_only=True)


def folder_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder, checked as `checked_tokenizer` does.

    Args:
        folder: The folder.
        name: What the user called the teacher, for messages.

    Raises:
        TeacherError: where there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not any((folder / file).is_file() for file in _VOCABULARY_FILES):
        raise TeacherError(
            f"the teacher {name} has no tokenizer (tokenizer.json or tokenizer.model) in {folder}. Copy its "
            "files there."
        )
    with reading(name):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return checked_tokenizer(tokenizer, name)


def checked_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """Refuse a tokenizer without a vocabulary; let the end token pad where no other does.

    Raises:
        TeacherError: where it has nothing but special tokens, which is what transformers makes, without a
            word, of a vocabulary that it does not find.
    """
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise TeacherError(
            f"the tokenizer of {name} has a vocabulary of {len(tokenizer)} tokens, so its files are damaged "
            "or of another kind. Fetch them again."
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def folder_weights(folder: Path) -> list[Path]:
    """Return the safetensors files of the model in a folder.

    Raises:
        TeacherError: where there are none, or pickles instead.
    """
    files = weight_files(folder)
    if files:
        return files
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise TeacherError(
            f"{folder} has its weights as a pickle ({pickles[0]}), which can run any program when it is "
            f"read. {SAFETENSORS_ONLY}"
        )
    raise TeacherError(
        f"{folder} has a config.json and no weights (model.safetensors). Fetch it again, with its weights."
    )


def check_loading(info: dict[str, Any], name: str) -> None:
    """Refuse a model of which transformers made up a part.

    Args:
        info: What `from_pretrained(..., output_loading_info=True)` returned beside the model.
        name: What was loaded, for messages.

    Raises:
        TeacherError: where a tensor was missing, or of another shape than the configuration says.
    """
    apart = "Its weights and its config.json do not belong together; fetch both again."
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise TeacherError(
            f"the teacher {name} lacks {len(missing)} tensors that its configuration asks for, such as "
            f"{missing[0]}. {apart}"
        )
    mismatched = sorted(info.get("mismatched_keys", ()))
    if mismatched:
        raise TeacherError(
            f"the teacher {name} has tensors of another shape than its configuration asks for, such as "
            f"{mismatched[0][0]}. {apart}"
        )
    unexpected = sorted(info.get("unexpected_keys", ()))
    if unexpected:
        warnings.warn(
            f"the teacher {name} holds {len(unexpected)} tensors that its model type does not use, such as "
            f"{unexpected[0]}.",
            stacklevel=3,
        )


def complete_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Set the special tokens that `generate` looks for, where only the tokenizer knows them."""
    generation = model.generation_config
    if tokenizer is None or generation is None:
        return
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation, field) is None:
            setattr(generation, field, getattr(tokenizer, field))


__all__ = [
    "PICKLE_SUFFIXES",
    "SAFETENSORS_ONLY",
    "TOKENIZER_FILES",
    "check_loading",
    "checked_tokenizer",
    "complete_generation_config",
    "folder_config",
    "folder_tokenizer",
    "folder_weights",
    "reading",
    "without_progress_bars",
]
