"""An adapter: only what distillation trained, a few megabytes, applied to the teacher it belongs to.

A folder of two files: ``lawcat_adapter.json`` (the base and its fingerprint, the student's configuration,
LoRA's rank and scale, the recipe) and ``lawcat_adapter.safetensors`` (new parameters, and LoRA factors named
``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight``).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lawcat import __version__
from lawcat.convert.initialize import is_new_parameter
from lawcat.errors import CheckpointError
from lawcat.files import verify_manifest, write_atomic, write_directory_atomic, write_manifest
from lawcat.model.modeling_lawcat import LawcatForCausalLM

DESCRIPTION_NAME = "lawcat_adapter.json"
TENSORS_NAME = "lawcat_adapter.safetensors"
CARD_NAME = "README.md"
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"
_SCHEMA = 1


@dataclass(frozen=True)
class Adapter:
    """What distillation added to a base.

    Attributes:
        base_name: How the base was named when the adapter was made.
        base_fingerprint: SHA-256 of the base's tensors.
        operator: Fields of the operator, ``lawcat.convert.initialize.OPERATOR_FIELDS``.
        softmax_layers: Layers that keep softmax attention.
        tensors: New parameters and LoRA factors by name: float32 as trained, fewer bits where they were
            rounded.
        lora_scale: ``alpha / rank``; 0 where there are no LoRA factors.
        recipe: The resolved recipe.
        lawcat_version: What wrote it.
    """

    base_name: str
    base_fingerprint: str
    operator: dict[str, Any]
    softmax_layers: tuple[int, ...]
    tensors: dict[str, Tensor]
    lora_scale: float
    recipe: dict[str, Any] = field(default_factory=dict)
    lawcat_version: str = __version__

    def save(self, directory: str | Path, *, card: str | None = None) -> Path:
        """Write the adapter as a folder, whole or not at all.

        Args:
            directory: Must not exist.
            card: Markdown for its `README.md`.

        Raises:
            LawcatError: when the folder exists or cannot be written.
        """
        description = asdict(self)
        del description["tensors"]
        description["schema"] = _SCHEMA
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}

        def write(place: Path) -> None:
            write_atomic(place / DESCRIPTION_NAME, json.dumps(description, indent=2) + "\n")
            save_file(tensors, place / TENSORS_NAME, metadata={"format": "pt"})
            if card is not None:
                write_atomic(place / CARD_NAME, card)
            write_manifest(place)

        write_directory_atomic(Path(directory), write)
        return Path(directory)

    @classmethod
    def load(cls, directory: str | Path) -> Adapter:
        """Read an adapter.

        Raises:
            CheckpointError: when it is missing, damaged, or of a later version's form.
        """
        folder = Path(directory)
        verify_manifest(folder)
        try:
            description = json.loads((folder / DESCRIPTION_NAME).read_text(encoding="utf-8"))
            tensors = load_file(folder / TENSORS_NAME)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"the adapter in {folder} cannot be read: {error}. Get it again, or train it again."
            ) from error
        schema = description.pop("schema", None) if isinstance(description, dict) else None
        if schema != _SCHEMA:
            raise CheckpointError(
                f"the adapter in {folder} has form {schema}, and lawcat {__version__} reads form {_SCHEMA}; "
                "use the version of lawcat that wrote it."
            )
        try:
            description["softmax_layers"] = tuple(description["softmax_layers"])
            return cls(tensors=tensors, **description)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder / DESCRIPTION_NAME} is damaged: a field is missing or unknown ({error}). Get the "
                "adapter again, or train it again."
            ) from error

    def rounded(self, dtype: torch.dtype, new_parameter_dtype: torch.dtype = torch.float32) -> Adapter:
        """Return the adapter with its tensors in fewer bits; what it is applied to stays as it was.

        Biases stay float32: they are few, and a gate's decay hangs on theirs.

        Args:
            dtype: Of the LoRA factors.
            new_parameter_dtype: Of the new parameters.

        Raises:
            CheckpointError: for a value that is not finite, or too large for its type.
        """
        tensors = {}
        for name, tensor in self.tensors.items():
            kind = dtype if name.endswith((_LORA_A, _LORA_B)) else new_parameter_dtype
            tensors[name] = tensor.to(torch.float32 if tensor.ndim < 2 else kind)
            if not tensors[name].isfinite().all():
                raise CheckpointError(
                    f"{name} holds values that {str(kind).removeprefix('torch.')} cannot (the largest is "
                    f"{float(tensor.abs().max()):.3g}). Use float32 or bfloat16, or train again."
                )
        return replace(self, tensors=tensors)

    def check_base(self, fingerprint: str, name: str) -> None:
        """Refuse a base that the adapter was not trained on.

        Raises:
            CheckpointError: when the fingerprints differ.
        """
        if fingerprint != self.base_fingerprint:
            raise CheckpointError(
                f"the adapter belongs to another base: it was trained on {self.base_name!r} "
                f"(fingerprint {self.base_fingerprint[:12]}), and {name!r} has fingerprint "
                f"{fingerprint[:12]}. Give the base it was trained on."
            )

    def apply(self, student: LawcatForCausalLM) -> None:
        """Put the adapter into an untrained student of its base: set the new parameters, merge LoRA.

        Merging adds ``lora_scale * B A`` to each weight, in float32, as PEFT's ``merge_and_unload`` does.

        Args:
            student: From ``lawcat.convert`` with this adapter's operator, in float32 or the teacher's dtype.

        Raises:
            CheckpointError: when a tensor has no place in the student, or one of the student's is missing.
                The student is as it was.
        """
        parameters = dict(student.named_parameters())
        expected = {name for name in parameters if is_new_parameter(name)}
        given = {name for name in self.tensors if not name.endswith((_LORA_A, _LORA_B))}
        if expected != given:
            name = sorted(expected ^ given)[0]
            what = "missing" if name in expected else "unknown"
            raise CheckpointError(f"the adapter does not fit the student: {name} is {what}.")
        for name in given:
            _check_shape(name, self.tensors[name].shape, parameters[name])
        modules = {name.removesuffix(_LORA_A).removesuffix(_LORA_B) for name in self.tensors.keys() - given}
        for module in sorted(modules):
            weight = parameters.get(f"{module}.weight")
            factor_a, factor_b = self.tensors.get(module + _LORA_A), self.tensors.get(module + _LORA_B)
            if weight is None or factor_a is None or factor_b is None:
                raise CheckpointError(
                    f"the adapter does not fit the student: the factors of {module} have no counterpart."
                )
            if factor_a.ndim != 2 or factor_b.ndim != 2 or factor_b.shape[1] != factor_a.shape[0]:
                raise CheckpointError(f"the adapter does not fit: the factors of {module} differ in rank.")
            _check_shape(module, torch.Size([factor_b.shape[0], factor_a.shape[1]]), weight)
        with torch.no_grad():
            for name in given:
                parameters[name].copy_(self.tensors[name])
            for module in modules:
                weight = parameters[f"{module}.weight"]
                factor_a, factor_b = self.tensors[module + _LORA_A], self.tensors[module + _LORA_B]
                delta = self.lora_scale * (factor_b.float() @ factor_a.float())
                weight.copy_(weight.float() + delta.to(weight.device))


def _check_shape(name: str, shape: torch.Size, place: Tensor) -> None:
    if shape != place.shape:
        raise CheckpointError(
            f"the adapter does not fit the student: {name} is {tuple(shape)}, its place {tuple(place.shape)}."
        )


def is_adapter(directory: str | Path) -> bool:
    """Return whether a folder holds an adapter."""
    return (Path(directory) / DESCRIPTION_NAME).is_file()
