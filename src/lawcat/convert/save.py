"""A finished student as one directory that transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lawcat.convert.adapter import Adapter
from lawcat.convert.pretrained import without_progress_bars
from lawcat.files import check_free_space, write_directory_atomic, write_manifest
from lawcat.model.modeling_lawcat import LawcatForCausalLM
from lawcat.model.remote_code import write_remote_code

ADAPTER_FOLDER = "adapter"


def save_student(
    student: LawcatForCausalLM,
    tokenizer: Any,
    directory: str | Path,
    *,
    adapter: Adapter | None = None,
    add_records: Callable[[Path], object] = lambda place: None,
) -> Path:
    """Write safetensors, configuration, tokenizer, generation settings and the model's code; whole or not at
    all.

    Args:
        student: What to save.
        tokenizer: The teacher's.
        directory: Must not exist.
        adapter: The same student as an adapter, saved in the subfolder ``adapter``.
        add_records: Called with the folder being filled, for what else belongs there.

    Returns:
        The directory.

    Raises:
        LawcatError: when it exists or cannot be written, as on a full disk.
    """
    target = Path(directory)
    check_free_space(target.parent, sum(p.numel() * p.element_size() for p in student.parameters()))

    def write(place: Path) -> None:
        with without_progress_bars():
            student.save_pretrained(place)
        tokenizer.save_pretrained(place)
        write_remote_code(place)
        if adapter is not None:
            adapter.save(place / ADAPTER_FOLDER)
        add_records(place)
        write_manifest(place)

    write_directory_atomic(target, write)
    return target
