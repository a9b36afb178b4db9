"""safetensors files: whether they are whole, and the fingerprint of the tensors in them.

Source:
    The format: an unsigned 64-bit little-endian length, that many bytes of JSON which give each tensor's
    type, shape and place, then the data without gaps. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lawcat.errors import TeacherError

_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
# The format's own bound; a length with a flipped high bit is found by it before memory is asked for.
_MAX_HEADER_BYTES = 100_000_000
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file.

    Attributes:
        name: Its name.
        dtype: Its type as the format spells it, such as `"F32"`.
        shape: Its shape.
        file: The file that holds it.
        offset: Its first byte in the file.
        num_bytes: Its length.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int


def read_entries(
    path: str | os.PathLike[str], *, error: type[ValueError] = TeacherError, remedy: str = "Fetch it again."
) -> list[TensorEntry]:
    """Read what a safetensors file holds, and check that the file is whole; the data are not read.

    Args:
        path: The file.
        error: The class to raise, for callers whose file is no teacher's.
        remedy: Last sentence of the message: what the user can do.

    Returns:
        One entry a tensor, in the order of the data.

    Raises:
        TeacherError: where the file is missing, truncated, longer than it says, or its header is damaged.
    """
    file = Path(path)

    def damaged(what: str) -> ValueError:
        return error(f"{file} is damaged: {what}. {remedy}")

    try:
        with open(file, "rb") as handle:
            total = os.fstat(handle.fileno()).st_size
            start = handle.read(8)
            if len(start) < 8:
                raise damaged(f"it has {total} bytes, too few for a safetensors file")
            (header_bytes,) = struct.unpack("<Q", start)
            if header_bytes > min(total - 8, _MAX_HEADER_BYTES):
                raise damaged(
                    f"its header should have {header_bytes} bytes and the file has {total}, so it is "
                    "truncated or not a safetensors file"
                )
            header = handle.read(header_bytes)
    except OSError as reason:
        raise error(f"{file} cannot be read: {reason.strerror or reason}. {remedy}") from reason
    try:
        parsed = json.loads(header, object_pairs_hook=_without_repeats)
        entries = [
            TensorEntry(name, *_checked(name, entry, file, 8 + header_bytes))
            for name, entry in parsed.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as reason:
        raise damaged(f"its header cannot be read ({reason})") from reason
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    end = 8 + header_bytes
    for entry in entries:
        if entry.offset != end:
            raise damaged(f"the tensor {entry.name!r} is not where the one before it ends")
        end += entry.num_bytes
    if end != total:
        raise damaged(
            f"it has {total} bytes and its header accounts for {end}, so it is truncated or was changed"
        )
    return entries


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _checked(
    name: str, entry: dict[str, Any], file: Path, base: int
) -> tuple[str, tuple[int, ...], Path, int, int]:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} has unknown fields")
    if dtype not in _BITS:
        raise ValueError(f"{name!r} is of the unknown type {dtype!r}")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name!r} has a shape or place that is no whole number")
    if end - begin != math.prod(shape) * _BITS[dtype] // 8:
        raise ValueError(f"{name!r} has {end - begin} bytes, which is not a {dtype} of shape {shape}")
    return dtype, tuple(shape), file, base + begin, end - begin


def fingerprint(entries: Iterable[TensorEntry], *, num_threads: int | None = None) -> str:
    """Return the SHA-256 of tensors: of their names, types, shapes and bytes.

    The order of the tensors, and how they are spread over files, make no difference; neither do the files'
    metadata. So it tells a base model from another whichever way it came here.

    Args:
        entries: From `read_entries`, of one file or several.
        num_threads: Threads that read and hash; `None` means one a core, 8 at most.

    Returns:
        64 hexadecimal digits: the SHA-256 of one line a tensor, sorted by name, of name, type, shape and
        SHA-256 of the data, separated by tabs.

    Raises:
        TeacherError: where a tensor occurs twice, or cannot be read.
    """
    ordered = sorted(entries, key=lambda entry: entry.name)
    for first, second in itertools.pairwise(ordered):
        if first.name == second.name:
            raise TeacherError(
                f"{first.file} and {second.file} both hold the tensor {first.name!r}. Fetch them again."
            )
    with ThreadPoolExecutor(num_threads or min(os.cpu_count() or 1, 8)) as pool:
        # Large ones first, so that no thread is left alone with the embedding at the end.
        order = sorted(range(len(ordered)), key=lambda index: -ordered[index].num_bytes)
        digests = dict(zip(order, pool.map(lambda index: _digest(ordered[index]), order), strict=True))
    total = hashlib.sha256()
    for index, entry in enumerate(ordered):
        shape = ",".join(map(str, entry.shape))
        total.update(f"{entry.name}\t{entry.dtype}\t{shape}\t{digests[index]}\n".encode())
    return total.hexdigest()


def _digest(entry: TensorEntry) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(entry.num_bytes, 1))))
    left = entry.num_bytes
    try:
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.offset)
            while left:
                count = file.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise TeacherError(
                        f"{entry.file} ended within the tensor {entry.name!r}. Fetch it again."
                    )
                digest.update(buffer[:count])
                left -= count
    except OSError as error:
        raise TeacherError(
            f"{entry.file} cannot be read: {error.strerror or error}. Fetch it again."
        ) from error
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, as transformers would choose them.

    Returns:
        `model.safetensors`, or the files that `model.safetensors.index.json` names; empty where there is
        neither.

    Raises:
        TeacherError: where the index is damaged or names a file that is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        names: Sequence[str] = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        files = [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TeacherError(f"{index} is damaged ({error}). Fetch it again.") from error
    for file in files:
        if file.parent != folder or not file.is_file():
            raise TeacherError(f"{file} is missing: {index.name} names {len(files)} files. Fetch it again.")
    return files


__all__ = ["TensorEntry", "fingerprint", "read_entries", "weight_files"]
