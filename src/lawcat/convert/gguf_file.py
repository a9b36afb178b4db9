"""GGUF files: what one holds, whether it is whole, and what of it transformers would silently leave out.

Source:
    The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lawcat.convert.families import FAMILIES
from lawcat.errors import TeacherError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
# Type number of a metadata value -> its struct code. 8 is text and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_REMEDY = "Fetch it again."


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: Its name in llama.cpp's spelling, such as `blk.0.attn_q.weight`.
        shape: Its shape in torch's order.
        quantization: Name of its type, such as `"Q4_1"` or `"F32"`.
        offset: Its first byte in the file.
        num_bytes: Its length.
    """

    name: str
    shape: tuple[int, ...]
    quantization: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says about itself.

    Attributes:
        path: The file.
        metadata: Its metadata; of an array only the length.
        tensors: Its tensors, in the order of the data.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the family, such as `"llama"`."""
        return str(self.metadata["general.architecture"])

    @property
    def num_parameters(self) -> int:
        """How many numbers the tensors hold."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    def tensor(self, name: str) -> GgufTensor | None:
        """Return the tensor of that name, or `None`."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Return whether a file begins as a GGUF file does."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == _MAGIC
    except OSError:
        return False


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Read what a GGUF file holds, and check that it is whole; the tensors' data are not read.

    Args:
        path: The file.

    Raises:
        TeacherError: where it is missing, not a GGUF file, truncated, damaged in its header, one part of
            several, or holds a quantization that cannot be undone.
    """
    file = Path(path)
    try:
        with open(file, "rb") as handle:
            if os.fstat(handle.fileno()).st_size < 24:
                raise TeacherError(f"{file} is damaged: it is too short for a GGUF file. {_REMEDY}")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(file, content).read()
    except OSError as error:
        raise TeacherError(f"{file} cannot be read: {error.strerror or error}.") from error


class _Reader:
    """Walks through the header, never beyond the end of the file."""

    def __init__(self, file: Path, content: mmap.mmap) -> None:
        self.file = file
        self.content = content
        self.size = len(content)
        self.position = 0

    def read(self) -> GgufFile:
        if self.take(4) != _MAGIC:
            raise TeacherError(f"{self.file} is not a GGUF file: it does not begin with GGUF.")
        version = self.number("I")
        if version not in _VERSIONS:
            kind = "a big-endian file" if version & 0xFFFF == 0 else f"version {version}"
            raise TeacherError(f"{self.file} is {kind}; GGUF versions 2 and 3, little-endian, can be read.")
        num_tensors, num_values = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self.text()
            metadata[key] = self.value(self.number("I"))
        table = [self.table_row() for _ in range(num_tensors)]
        if not isinstance(metadata.get("general.architecture"), str):
            raise self.damaged("it does not name its architecture")
        if int(metadata.get("split.count", 0)) > 1:
            raise TeacherError(
                f"{self.file} is one of {metadata['split.count']} parts. Join them first: "
                "llama-gguf-split --merge FIRST_PART OUTPUT."
            )
        return GgufFile(self.file, metadata, self.tensors(table, metadata))

    def damaged(self, what: str) -> TeacherError:
        return TeacherError(f"{self.file} is damaged: {what}. {_REMEDY}")

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise self.damaged("it ends within its header, so it is truncated or was changed")
        self.position += count
        return self.content[self.position - count : self.position]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged("its header holds text that is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise self.damaged(f"its metadata hold a value of the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            self.take(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _TEXT:
            for _ in range(count):
                self.take(self.number("Q"))
        else:
            raise self.damaged(f"its metadata hold an array of the type {kind}")
        return count

    def table_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dimensions = self.text(), self.number("I")
        if not 1 <= num_dimensions <= 4:
            raise self.damaged(f"the tensor {name!r} has {num_dimensions} dimensions")
        dimensions = [self.number("Q") for _ in range(num_dimensions)]
        return name, tuple(reversed(dimensions)), self.number("I"), self.number("Q")

    def tensors(
        self, table: list[tuple[str, tuple[int, ...], int, int]], metadata: dict[str, Any]
    ) -> tuple[GgufTensor, ...]:
        import gguf

        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0:
            raise self.damaged(f"its alignment is {alignment!r}")
        if len({name for name, *_ in table}) != len(table):
            raise self.damaged("a tensor occurs twice")
        begin = -(-self.position // alignment) * alignment
        expected, result = 0, []
        for name, shape, number, offset in sorted(table, key=lambda row: row[3]):
            try:
                kind = gguf.GGMLQuantizationType(number)
            except ValueError as error:
                raise TeacherError(
                    f"{self.file} holds the tensor {name!r} in the quantization number {number}, which is "
                    f"unknown. Supported: {', '.join(supported_quantizations())}."
                ) from error
            if not _can_dequantize(kind):
                raise TeacherError(
                    f"{self.file} holds the tensor {name!r} in the quantization {kind.name}, which cannot be "
                    f"undone. Supported: {', '.join(supported_quantizations())}."
                )
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise self.damaged(f"the tensor {name!r} has rows of {shape[-1]}, not a multiple of {block}")
            num_bytes = math.prod(shape) // block * block_bytes
            if offset != expected:
                raise self.damaged(f"the tensor {name!r} is not where the one before it ends")
            expected = -(-(offset + num_bytes) // alignment) * alignment
            if begin + offset + num_bytes > self.size:
                raise self.damaged(
                    f"it has {self.size} bytes and the tensor {name!r} ends at {begin + offset + num_bytes}, "
                    "so it is truncated or was changed"
                )
            result.append(GgufTensor(name, shape, kind.name, begin + offset, num_bytes))
        return tuple(result)


def _can_dequantize(kind: Any) -> bool:
    import gguf
    import numpy as np

    sizes = gguf.GGML_QUANT_SIZES.get(kind)
    if sizes is None:
        return False
    dtype = {"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8)
    try:
        gguf.dequantize(np.zeros((1, sizes[1] // np.dtype(dtype).itemsize), dtype), kind)
    except NotImplementedError:
        return False
    return True


def supported_quantizations() -> list[str]:
    """Return the names of the quantizations that can be undone.

    >>> {"F32", "BF16", "Q4_0", "Q8_0", "Q4_K"} <= set(supported_quantizations())
    True
    """
    import gguf

    return [kind.name for kind in gguf.GGMLQuantizationType if _can_dequantize(kind)]


def refuse_unsupported(file: GgufFile) -> None:
    """Refuse what a configuration made from the file would not show.

    transformers reads a Mixtral file as if it were a dense Llama, and drops a sliding window.

    Raises:
        TeacherError: naming it.
    """
    prefix = file.architecture
    experts = file.metadata.get(f"{prefix}.expert_count", 0)
    if experts:
        raise TeacherError(
            f"{file.path} is a mixture of {experts} experts, which lawcat cannot convert. "
            "Use a model without experts."
        )
    window = file.metadata.get(f"{prefix}.attention.sliding_window", 0)
    if window and prefix in FAMILIES:
        raise TeacherError(
            f"{file.path} uses sliding-window attention (of {window} tokens), which lawcat cannot convert. "
            "Use a model with full attention."
        )


def head_dim(file: GgufFile) -> int:
    """Return the width of a head, which transformers reads of some families only and takes as 128 for Qwen3.

    Args:
        file: The file.

    Raises:
        TeacherError: where the file does not say it.

    Source:
        The format (see above): `[llm].attention.key_length`, and what stands for it where it is missing.
    """
    prefix = file.architecture
    width = file.metadata.get(f"{prefix}.attention.key_length")
    if width is None:
        hidden = file.metadata.get(f"{prefix}.embedding_length")
        heads = file.metadata.get(f"{prefix}.attention.head_count")
        if not hidden or not heads:
            raise TeacherError(
                f"{file.path} does not say how wide a head is: it lacks {prefix}.attention.key_length, and "
                f"{prefix}.embedding_length or {prefix}.attention.head_count. {_REMEDY}"
            )
        width = hidden // heads
    return int(width)


def rope_parameters(file: GgufFile, rope_theta: float) -> dict[str, Any]:
    """Return the rotary embedding's parameters as transformers spells them.

    transformers reads the base from a GGUF file and drops the scaling, which for Llama 3.1 and later is
    stored as a tensor of one factor a frequency.

    Args:
        file: The file.
        rope_theta: The base.

    Raises:
        TeacherError: where the scaling is neither none, linear nor Llama 3's.

    Source:
        Llama 3's scaling: `_compute_llama3_parameters` in transformers' `modeling_rope_utils`; as factors:
        llama.cpp, `convert_hf_to_gguf.py`.
    """
    key = f"{file.architecture}.rope.scaling"
    kind = file.metadata.get(f"{key}.type", "none")
    old_spelling = file.metadata.get(f"{file.architecture}.rope.scale_linear", 1.0)
    factor = float(file.metadata.get(f"{key}.factor", old_spelling))
    factors = file.tensor("rope_freqs.weight")
    if factors is not None:
        return _llama3_rope(file, factors, rope_theta)
    if kind == "linear" or (kind == "none" and factor != 1.0):
        return {"rope_type": "linear", "rope_theta": rope_theta, "factor": factor}
    if kind == "none":
        return {"rope_type": "default", "rope_theta": rope_theta}
    raise TeacherError(
        f"{file.path} scales its rotary embedding by {kind!r}, which cannot be taken over from GGUF. "
        "Supported there: none, linear and Llama 3's. Use the model's safetensors."
    )


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _llama3_rope(file: GgufFile, tensor: GgufTensor, rope_theta: float) -> dict[str, Any]:
    import numpy as np

    if tensor.quantization != "F32":
        raise TeacherError(f"{file.path} holds its rotary factors as {tensor.quantization}; F32 can be read.")
    with open(file.path, "rb") as handle:
        handle.seek(tensor.offset)
        factors = np.frombuffer(handle.read(tensor.num_bytes), dtype="<f4").astype(np.float64)
    factor = float(np.max(factors))
    # The file has the factors only. All published models of the family share the other three numbers.
    dimension = 2 * len(factors)
    wavelength = 2 * math.pi * rope_theta ** (np.arange(0, dimension, 2) / dimension)
    context = _LLAMA3["original_max_position_embeddings"]
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise TeacherError(
            f"{file.path} scales its rotary embedding by factors that are not Llama 3's, which cannot be "
            "taken over. Use the model's safetensors."
        )
    return {"rope_type": "llama3", "rope_theta": rope_theta, "factor": round(factor, 4), **_LLAMA3}


__all__ = [
    "GgufFile",
    "GgufTensor",
    "head_dim",
    "is_gguf",
    "read_gguf",
    "refuse_unsupported",
    "rope_parameters",
    "supported_quantizations",
]
