"""Any model that a command accepts: a student, an adapter, or a teacher."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from lawcat.convert.adapter import Adapter
from lawcat.convert.initialize import cast_teacher_weights, convert
from lawcat.convert.pretrained import complete_generation_config, without_progress_bars
from lawcat.convert.shipped import adapter_folder, shipped_adapters
from lawcat.convert.teacher import (
    Progress,
    load_teacher,
    load_teacher_config,
    load_tokenizer,
    resolve_teacher,
)
from lawcat.errors import CheckpointError, ConfigurationError, TeacherError
from lawcat.files import MANIFEST_NAME, verify_manifest

Kind = Literal["student", "adapter", "teacher"]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: In eval mode.
        tokenizer: Its tokenizer.
        name: As the user named it.
        kind: What it was.
    """

    model: Any
    tokenizer: Any
    name: str
    kind: Kind


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    base: str | None = None,
    tokenizer: str | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a student directory, an adapter (applied to its base), or any transformers causal model.

    Args:
        name: A directory, an adapter that comes with lawcat, or anything that is accepted as a teacher.
        dtype: Of the weights; the new parameters of a student stay float32. ``None``: as saved.
        device: Where to; ``None`` is the GPU if there is one.
        base: The teacher to apply an adapter to; ``None`` is the one it names.
        tokenizer: Model or folder to take the tokenizer from; ``None`` is the model itself.
        progress: Called with a line of text before what takes long.

    Raises:
        CheckpointError: for a damaged student or adapter, or an adapter of another base.
        TeacherError: for a model that cannot be found or read, or that has no tokenizer.
        ConfigurationError: for a device that is not here.
    """
    place = check_device(device)
    path = Path(name)
    own = load_model_tokenizer(tokenizer, progress=progress) if tokenizer is not None else None
    folder = adapter_folder(name)
    ours = shipped_adapters().get(str(name).lower())
    if isinstance(name, str) and ours not in (None, folder) and progress is not None:
        progress(f"{name} is a folder here; the adapter of that name that comes with lawcat is not used")
    if folder is not None:
        return _load_adapter(str(name), folder, dtype, place, base, own, progress)
    if _is_student(path):
        return _load_student(path, dtype, place, own)
    source = resolve_teacher(name, progress=progress)
    own = own or _teacher_tokenizer(source)
    teacher = load_teacher(source, dtype=dtype, with_tokenizer=False, progress=progress)
    complete_generation_config(teacher.model, own)
    is_student = getattr(teacher.model.config, "model_type", None) == "lawcat"  # from a hub
    kind: Kind = "student" if is_student else "teacher"
    return LoadedModel(teacher.model.to(place).eval(), own, str(name), kind)


def check_model(
    name: str | Path,
    *,
    base: str | None = None,
    tokenizer: str | None = None,
    progress: Progress | None = None,
) -> Any:
    """Return a model's configuration, an adapter's base's, and raise what shows without reading weights.

    So that of several models the last is known to be there before the first is put to work.

    Args:
        name: As of `load_model`, and so are the others.
        base: As there.
        tokenizer: As there.
        progress: As there.

    Raises:
        CheckpointError: for an adapter that is damaged, or a student without a tokenizer.
        TeacherError: for a model that cannot be found, or that has no tokenizer.
    """
    path = Path(name)
    if tokenizer is not None:
        load_model_tokenizer(tokenizer, progress=progress)
    folder = adapter_folder(name)
    if folder is not None:
        with _adapter_base_errors(base):
            source: str | Path = base or Adapter.load(folder).base_name
            config = load_teacher_config(source, progress=progress)
            if tokenizer is None:
                load_tokenizer(source, progress=progress)
        return config
    config = load_teacher_config(name, progress=progress)
    if tokenizer is None:
        if _is_student(path):
            _student_tokenizer(path)
        else:
            _teacher_tokenizer(name, progress)
    return config


def load_model_tokenizer(name: str | Path, *, progress: Progress | None = None) -> Any:
    """Return the tokenizer of a model without its weights: of an adapter that of its base.

    Args:
        name: As of `load_model`.
        progress: As there.

    Raises:
        CheckpointError: for an adapter that is damaged.
        TeacherError: for a model that cannot be found, or that has no tokenizer.
    """
    folder = adapter_folder(name)
    if folder is None:
        return load_tokenizer(name, progress=progress)
    with _adapter_base_errors(None):
        return load_tokenizer(Adapter.load(folder).base_name, progress=progress)


def check_device(device: str | torch.device | None) -> torch.device:
    """Return a device that is here; None stands for the GPU if there is one, else the CPU.

    Raises:
        ConfigurationError: for another.

    Example:
        >>> check_device("cpu")
        device(type='cpu')
    """
    if device is None:
        return default_device()
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # without CUDA it is an assertion
        here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise ConfigurationError(
            f"the device {str(device)!r} cannot be used here; there are: {', '.join(here)}."
        ) from error
    return place


def _teacher_tokenizer(source: Any, progress: Progress | None = None) -> Any:
    try:
        return load_tokenizer(source, progress=progress)
    except TeacherError as error:
        raise TeacherError(
            f"{error} Or name a model that has the same with `lawcat eval --tokenizer` (tokenizer=)."
        ) from error


def _student_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the student in {path} has no tokenizer that can be loaded. Copy its files there, or name a "
            "model that has the same with `lawcat eval --tokenizer` (tokenizer=)."
        ) from error


@contextmanager
def _adapter_base_errors(base: str | None) -> Iterator[None]:
    try:
        yield
    except TeacherError as error:
        if base is not None:
            raise
        raise TeacherError(
            f"the adapter's base cannot be loaded: {error} Where it has moved, give it with --base (base=)."
        ) from error


def _is_student(path: Path) -> bool:
    """Return whether a folder holds a student, be it a damaged one."""
    try:
        return bool(json.loads((path / "config.json").read_bytes())["model_type"] == "lawcat")
    except (OSError, ValueError, KeyError, TypeError):
        return (path / MANIFEST_NAME).is_file()


def _load_student(
    path: Path, dtype: torch.dtype | None, device: torch.device, tokenizer: Any | None
) -> LoadedModel:
    from lawcat.model.modeling_lawcat import LawcatForCausalLM

    if (path / MANIFEST_NAME).is_file():  # one that transformers saved has none
        verify_manifest(path)
    try:
        with without_progress_bars():
            model, info = LawcatForCausalLM.from_pretrained(
                path, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the student in {path} cannot be loaded: {error}") from error
    if tokenizer is None:
        tokenizer = _student_tokenizer(path)
    # transformers makes up what a file lacks, with a warning only.
    if lacking := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"the student in {path} lacks {len(lacking)} tensors, such as {lacking[0]}. Get it again."
        )
    return LoadedModel(model.to(device).eval(), tokenizer, str(path), "student")


def _load_adapter(
    name: str,
    path: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    base: str | None,
    tokenizer: Any | None,
    progress: Progress | None,
) -> LoadedModel:
    adapter = Adapter.load(path)
    with _adapter_base_errors(base):
        teacher = load_teacher(base or adapter.base_name, progress=progress)
    adapter.check_base(teacher.fingerprint, teacher.name)
    student, _ = convert(teacher.model, softmax_layers=adapter.softmax_layers, **adapter.operator)
    adapter.apply(student)
    if dtype is not None:
        cast_teacher_weights(student, dtype)
    return LoadedModel(student.to(device).eval(), tokenizer or teacher.tokenizer, name, "adapter")


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
