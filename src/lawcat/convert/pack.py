"""An adapter made ready to be given away: in fewer bits, with a model card, without a machine's paths."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lawcat.convert.adapter import Adapter, is_adapter
from lawcat.convert.initialize import convert, is_new_parameter
from lawcat.convert.save import ADAPTER_FOLDER
from lawcat.convert.teacher import (
    EMBEDDED_TEACHER,
    Progress,
    TeacherSource,
    load_teacher,
    load_tokenizer,
    resolve_teacher,
)
from lawcat.errors import CheckpointError, ConfigurationError, did_you_mean
from lawcat.files import human_bytes

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

_CHECK_TOKENS = 512


@dataclass(frozen=True)
class LogitChange:
    """How far two students' logits are apart on the same tokens.

    Args:
        maximum: Largest absolute difference.
        mean: Mean absolute difference.
        kl: Mean divergence of the second's next-token distribution from the first's, in nats.
        greedy_agreement: Share of places where both give the same most likely token.
        num_tokens: Places compared.
    """

    maximum: float
    mean: float
    kl: float
    greedy_agreement: float
    num_tokens: int

    def __str__(self) -> str:
        return (
            f"logits differ by up to {self.maximum:.2g} ({self.mean:.2g} on average; KL {self.kl:.2g} nats), "
            f"the most likely token is the same at {self.greedy_agreement:.2%} of {self.num_tokens} places"
        )


@dataclass(frozen=True)
class PackReport:
    """What `pack_adapter` did.

    Args:
        folder: The packed adapter.
        num_bytes_before: Of the tensors as they were.
        num_bytes: Of the tensors as they are.
        lora_bytes: Of them in LoRA factors.
        new_parameter_bytes: Of them in new parameters.
        folder_bytes: Of all files of the packed adapter.
        change: What rounding does to the student; None if it was not measured.
    """

    folder: Path
    num_bytes_before: int
    num_bytes: int
    lora_bytes: int
    new_parameter_bytes: int
    folder_bytes: int
    change: LogitChange | None = None


def pack_adapter(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: str = "float16",
    new_parameter_dtype: str = "float16",
    base: str | None = None,
    card: str | None = None,
    check_text: str | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Write an adapter with its tensors rounded, a model card, and nothing of the machine it was made on.

    Folders in the recipe's paths are left out; a base that is named by one is refused.

    Of a trained SmolLM2-135M (5.8 MB in float16) float16 changes logits by up to 0.04 and the most likely
    token at one place in 2,048; bfloat16 by up to 0.3 and at eight, since the gate's and the maps' values
    reach 1 and more. New parameters in float32 (8.0 MB) bring float16's 0.04 down to 0.002.

    Args:
        source: An adapter's folder, or that of a student which holds one.
        destination: Folder to write; must not exist. Its name is the adapter's.
        dtype: Of the LoRA factors: `"float16"`, `"bfloat16"` or `"float32"`.
        new_parameter_dtype: Of the new parameters (convolutions, maps, gates), alike; biases stay float32.
        base: What the base is called from now on; must be the same, by its fingerprint. None keeps the name.
        card: Markdown for the model card, below what is known of itself: what was measured, for whom it is.
        check_text: On its first 512 tokens the student of the packed adapter is compared with that of the
            source. None leaves that out, and then the base is not loaded.
        progress: Called with a line of text before what takes long.

    Returns:
        Sizes, and what rounding changed.

    Raises:
        CheckpointError: for a source that is no adapter or damaged, values that a type cannot hold, or a base
            that is another.
        ConfigurationError: for an unknown type, or a base named by a path.
        TeacherError: for a base that cannot be found.
        LawcatError: when the destination exists or cannot be written.

    Example:
        >>> report = pack_adapter("out/student", "my-adapter")  # doctest: +SKIP
        >>> report.num_bytes  # doctest: +SKIP
        5842176
    """
    types = [_dtype(dtype, "dtype"), _dtype(new_parameter_dtype, "new_parameter_dtype")]
    folder = _adapter_in(Path(source))
    target = Path(destination)
    adapter = Adapter.load(folder)
    name = base if base is not None else adapter.base_name
    if _is_path(name):
        raise ConfigurationError(
            f"the adapter's base is named by a path, {name!r}, which others do not have. Give the name they "
            f"can load it by with --base (base=): a hub id, or {EMBEDDED_TEACHER}."
        )
    teacher: TeacherSource | None = None
    if base is not None or check_text is not None:
        teacher = resolve_teacher(name, progress=progress)
        adapter.check_base(teacher.fingerprint, teacher.name)
    packed = replace(adapter.rounded(*types), base_name=name, recipe=_without_folders(adapter.recipe))
    change = None
    if teacher is not None and check_text is not None:
        ids = load_tokenizer(teacher)(check_text, verbose=False).input_ids[:_CHECK_TOKENS]
        if progress is not None:
            progress("comparing the student of the packed adapter with that of the source")
        change = compare_adapters(adapter, packed, teacher, torch.tensor([ids]))
    packed.save(target, card=adapter_card(packed, target.name, card))
    return PackReport(
        folder=target,
        num_bytes_before=_num_bytes(adapter),
        num_bytes=_num_bytes(packed),
        lora_bytes=_num_bytes(packed, is_new=False),
        new_parameter_bytes=_num_bytes(packed, is_new=True),
        folder_bytes=sum(file.stat().st_size for file in target.iterdir()),
        change=change,
    )


@torch.no_grad()
def compare_adapters(first: Adapter, second: Adapter, base: TeacherSource, input_ids: Tensor) -> LogitChange:
    """Return how far apart the students of two adapters of one base are, in float32 on the CPU.

    Args:
        first: The reference.
        second: What is compared with it.
        base: Their base.
        input_ids: Tokens [B, T].

    Raises:
        CheckpointError: when an adapter does not fit the base.
    """
    logits = []
    for adapter in (first, second):
        teacher = load_teacher(base, with_tokenizer=False).model
        student, _ = convert(teacher, softmax_layers=adapter.softmax_layers, **adapter.operator)
        adapter.apply(student)
        logits.append(student(input_ids, use_cache=False).logits.float().flatten(0, -2))  # [B T, V]
    reference, other = logits
    difference = (other - reference).abs()
    log_reference, log_other = reference.log_softmax(-1), other.log_softmax(-1)
    divergence = (log_reference.exp() * (log_reference - log_other)).sum(-1)
    return LogitChange(
        maximum=float(difference.max()),
        mean=float(difference.mean()),
        kl=float(divergence.mean()),
        greedy_agreement=float((reference.argmax(-1) == other.argmax(-1)).float().mean()),
        num_tokens=len(reference),
    )


def adapter_card(adapter: Adapter, name: str, more: str | None = None) -> str:
    """Return the model card of an adapter in Markdown.

    Args:
        adapter: The adapter.
        name: What commands know it by.
        more: Further Markdown, put below.
    """
    recipe = adapter.recipe
    made = (
        f", made with the recipe `{recipe['name']}`, seed {recipe.get('seed', 0)}" if "name" in recipe else ""
    )
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in adapter.tensors.values()})
    softmax = ", ".join(map(str, adapter.softmax_layers))
    lines = [
        "---",
        "library_name: lawcat",
        "pipeline_tag: text-generation",
        "tags: [lawcat, linear-attention, adapter]",
        "---",
        f"# {name}",
        "",
        f"What distillation added to `{adapter.base_name}` (SHA-256 {adapter.base_fingerprint[:16]}...) to "
        f"make it a linear-attention model by lawcat {adapter.lawcat_version}{made}. "
        + (
            f"Layers {softmax} keep softmax attention."
            if softmax
            else "Its memory is the same at any context length."
        ),
        "",
        *([" ".join(str(recipe["description"]).split()), ""] if recipe.get("description") else []),
        f"{sum(tensor.numel() for tensor in adapter.tensors.values()):,} numbers in {', '.join(kinds)}, "
        f"{human_bytes(_num_bytes(adapter))}. The base is fetched once, when it is first used.",
        "",
        "```console",
        f"$ lawcat generate {name} --prompt 'Once upon a time'",
        "```",
        "",
        "```python",
        "import lawcat",
        "",
        f'loaded = lawcat.load_model("{name}")  # .model and .tokenizer',
        "```",
        *(["", more.strip()] if more else []),
    ]
    return "\n".join(lines) + "\n"


def _dtype(name: str, option: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigurationError(
            f"{option} is {name!r}; it must be one of {', '.join(DTYPES)}.{did_you_mean(name, list(DTYPES))}"
        )
    return DTYPES[name]


def _adapter_in(source: Path) -> Path:
    for folder in (source, source / ADAPTER_FOLDER):
        if is_adapter(folder):
            return folder
    raise CheckpointError(
        f"there is no adapter in {source}, nor in a folder {ADAPTER_FOLDER!r} of it. Give the folder that "
        "holds lawcat_adapter.json, or the student that it is part of."
    )


def _num_bytes(adapter: Adapter, is_new: bool | None = None) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in adapter.tensors.items()
        if is_new is None or is_new_parameter(name) == is_new
    )


_PATH = re.compile(r"/|~|\.\.?[\\/]|[A-Za-z]:[\\/]")


def _is_path(name: str) -> bool:
    """Return whether a base's name is a place on a disk rather than one that others know."""
    if name.lower() == EMBEDDED_TEACHER:
        return False
    return bool(_PATH.match(name)) or name.count("/") > 1 or Path(name).exists()


def _without_folders(value: Any) -> Any:
    """Return a recipe with each path in it cut to its last part; names of data sets stay."""
    if isinstance(value, dict):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(one) for one in value]
    if isinstance(value, str) and _PATH.match(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


__all__ = ["DTYPES", "LogitChange", "PackReport", "adapter_card", "compare_adapters", "pack_adapter"]
