"""Training checkpoints: everything that makes a resumed run equal to one that was never interrupted.

One checkpoint is one folder, `stage1-step-00000123`:

| file | holds |
| --- | --- |
| `parameters.safetensors` | the parameters that train, or have in stage 0 |
| `optimizer.pt` | state of optimizer, schedule and random generators; read with `weights_only=True` |
| `state.json` | stage, step, place in the data, fingerprints of recipe and teacher |
| `manifest.json` | size and SHA-256 of the three |

The folder appears under its name only when it is complete and on disk, and an older one is removed only after
that.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lawcat.errors import CheckpointError
from lawcat.files import (
    MANIFEST_NAME,
    check_free_space,
    remove_directory,
    remove_leftovers,
    verify_manifest,
    write_atomic,
    write_directory_atomic,
    write_manifest,
)

PARAMETERS_NAME = "parameters.safetensors"
OPTIMIZER_NAME = "optimizer.pt"
STATE_NAME = "state.json"

_FORMAT = 1
_NAME = re.compile(r"^stage(?P<stage>\d+)-step-(?P<step>\d{8,})$")
_REMEDY = "Remove that folder, and the run resumes from the checkpoint before it."


@dataclass
class TrainingState:
    """All that a run needs to go on as if it had not been interrupted.

    Args:
        stage: 0 (teacher tuning), 1 (attention transfer) or 2 (recovery).
        step: Optimizer steps of this stage that are done.
        recipe_fingerprint: SHA-256 of the resolved recipe.
        teacher_fingerprint: SHA-256 of the teacher, `lawcat.convert.teacher.Teacher.fingerprint`.
        parameters: The tensors that train or have trained, by name. Saved from any device, loaded to the CPU.
        optimizer: `optimizer.state_dict()`.
        scheduler: `scheduler.state_dict()`.
        rng: What `capture_rng` returned.
        data_index: Place in the data: samples, or packed sequences, that are used up.
        losses: The last losses, for the display that goes on.
        extra: Whatever else the run wants back; JSON values.

    Example:
        >>> TrainingState(stage=1, step=123, recipe_fingerprint="r", teacher_fingerprint="t").name
        'stage1-step-00000123'
    """

    stage: int
    step: int
    recipe_fingerprint: str
    teacher_fingerprint: str
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    rng: dict[str, Any] = field(default_factory=dict)
    data_index: int = 0
    losses: list[float] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of this state's folder."""
        return f"stage{self.stage}-step-{self.step:08d}"


def capture_rng() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's global generators, of every CUDA device too.

    Only tensors, numbers and tuples, so that it can be read back with `weights_only=True`.

    Example:
        >>> state = capture_rng()
        >>> first = torch.rand(1), random.random()
        >>> restore_rng(state)
        >>> (torch.rand(1), random.random()) == first
        True
    """
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - the global generator is what libraries draw from
    algorithm, keys, position, has_gauss, gauss = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (
            str(algorithm),
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set the global generators to what `capture_rng` returned.

    Args:
        state: From `capture_rng`. Where this machine has another number of CUDA devices than the one that
            saved it, those that both have are set, with a warning: the run then goes on, not bit for bit.
    """
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    algorithm, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    saved = list(state["cuda"])
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(saved) != present:
        warnings.warn(
            f"the checkpoint has the random states of {len(saved)} CUDA devices and this machine has "
            f"{present}: the run goes on, but not bit for bit as it would have.",
            stacklevel=2,
        )
    for device, device_state in enumerate(saved[:present]):
        torch.cuda.set_rng_state(device_state, device)


def save_checkpoint(directory: str | os.PathLike[str], state: TrainingState, *, keep: int = 2) -> Path:
    """Write a checkpoint, whole or not at all; then remove those beyond the newest `keep`.

    Saving a state that is there already (the same stage, step, recipe and teacher, undamaged) writes nothing.

    Args:
        directory: Where the run keeps its checkpoints; made if missing.
        state: What to save.
        keep: Number of checkpoints that stay, at least 1.

    Returns:
        Path of the checkpoint.

    Raises:
        CheckpointError: where the state holds something that is not plain data.
        LawcatError: where it could not be written, as on a full disk. The checkpoints that were there are
            untouched.

    Example:
        >>> import tempfile
        >>> runs = tempfile.mkdtemp()
        >>> for step in (10, 20, 30):
        ...     path = save_checkpoint(runs, TrainingState(1, step, "r", "t"), keep=2)
        >>> [path.name for path in list_checkpoints(runs)]
        ['stage1-step-00000030', 'stage1-step-00000020']
    """
    if keep < 1:
        raise CheckpointError(f"keep={keep} would remove the checkpoint just written; keep at least 1.")
    folder = Path(directory)
    target = folder / state.name
    remove_leftovers(folder)
    if not _is_saved_already(target, state):
        training = {"optimizer": state.optimizer, "scheduler": state.scheduler, "rng": state.rng}
        training = _plain(training, "")
        description = _describe(state)
        check_free_space(folder, _num_bytes(state.parameters) + _num_bytes(training) + 1_000_000)

        def write(place: Path) -> None:
            save_file(_apart(state.parameters), place / PARAMETERS_NAME, metadata={"format": "pt"})
            torch.save(training, place / OPTIMIZER_NAME)
            write_atomic(place / STATE_NAME, description)
            write_manifest(place)

        write_directory_atomic(target, write, replace=True)
    for old in list_checkpoints(folder)[keep:]:
        if old != target:
            remove_directory(old)
    return target


def _describe(state: TrainingState) -> str:
    description = {
        "format": _FORMAT,
        "stage": state.stage,
        "step": state.step,
        "recipe_fingerprint": state.recipe_fingerprint,
        "teacher_fingerprint": state.teacher_fingerprint,
        "data_index": state.data_index,
        "losses": [loss if math.isfinite(loss) else None for loss in state.losses],
        "extra": state.extra,
    }
    try:
        return json.dumps(description, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the training state holds what JSON cannot: {error}. Put finite numbers, text, lists and "
            "dictionaries in `extra`, and tensors in `parameters`."
        ) from error


def _apart(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors on the CPU, each with a storage of its own, as safetensors wants them."""
    result: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in parameters.items():
        copy = tensor.detach().to("cpu").contiguous()
        storage = copy.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != copy.nbytes:
            copy = copy.clone()
        storages.add(copy.untyped_storage().data_ptr())
        result[name] = copy
    return result


def _is_saved_already(target: Path, state: TrainingState) -> bool:
    if not target.exists():
        return False
    try:
        verify_manifest(target)
        description = _read_description(target)
    except CheckpointError:
        return False
    return bool(
        description["recipe_fingerprint"] == state.recipe_fingerprint
        and description["teacher_fingerprint"] == state.teacher_fingerprint
    )


def _plain(value: Any, place: str) -> Any:
    """Return `value` as plain data; refuse now what `weights_only=True` would refuse on resuming."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (dict, OrderedDict, Counter):
        return {_plain(key, place): _plain(item, f"{place}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{place}[{index}]") for index, item in enumerate(value))
    raise CheckpointError(
        f"the training state{place} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint "
        "holds numbers, text, tensors, lists, tuples and dictionaries of them. Convert it in the state_dict."
    )


def _num_bytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(_num_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_num_bytes(item) for item in value) if len(value) < 10_000 else 8 * len(value)
    return 8


def list_checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """Return the folders that are named as checkpoints, newest first; they are not opened."""
    found = []
    folder = Path(directory)
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.match(entry.name)
        if match and entry.is_dir():
            found.append((int(match["stage"]), int(match["step"]), entry))
    return [entry for *_, entry in sorted(found, reverse=True)]


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """Return the newest checkpoint that is undamaged, or `None` where there is none.

    Removes what processes that were killed left half-written. A damaged checkpoint is passed over with a
    warning that names it and says what is wrong.

    Args:
        directory: Where the run keeps its checkpoints; need not exist.
    """
    remove_leftovers(directory)
    for path in list_checkpoints(directory):
        try:
            verify_manifest(path, remedy=_REMEDY)
            _read_description(path)
        except CheckpointError as error:
            warnings.warn(f"skipping the damaged checkpoint {path.name}: {error}", stacklevel=2)
            continue
        return path
    return None


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    recipe_fingerprint: str | None = None,
    teacher_fingerprint: str | None = None,
) -> TrainingState:
    """Read a checkpoint, with every byte checked.

    Args:
        path: Folder of the checkpoint.
        recipe_fingerprint: The running recipe's; `None` takes any.
        teacher_fingerprint: The running teacher's; `None` takes any.

    Returns:
        The state, its tensors on the CPU.

    Raises:
        CheckpointError: where it is missing, damaged, of another recipe or of another teacher.

    Example:
        >>> import tempfile
        >>> state = TrainingState(1, 10, "r", "t", parameters={"w": torch.ones(2)}, losses=[0.5])
        >>> path = save_checkpoint(tempfile.mkdtemp(), state)
        >>> load_checkpoint(path, recipe_fingerprint="r").losses
        [0.5]
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no checkpoint {folder}. Give a folder named like stage1-step-00000100."
        )
    listed = verify_manifest(folder, remedy=_REMEDY)
    for name in (PARAMETERS_NAME, OPTIMIZER_NAME, STATE_NAME):
        if name not in listed:
            raise CheckpointError(f"{folder / MANIFEST_NAME} is damaged: it does not list {name}. {_REMEDY}")
    description = _read_description(folder)
    for what, expected in (("recipe", recipe_fingerprint), ("teacher", teacher_fingerprint)):
        saved = description[f"{what}_fingerprint"]
        if expected is not None and saved != expected:
            raise CheckpointError(
                f"{folder} was made with another {what} (fingerprint {str(saved)[:12]}, this run's is "
                f"{expected[:12]}). Resume with the {what} it was made with, or start in a new output folder."
            )
    try:
        parameters = load_file(folder / PARAMETERS_NAME)
        training = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        state = TrainingState(
            stage=description["stage"],
            step=description["step"],
            recipe_fingerprint=description["recipe_fingerprint"],
            teacher_fingerprint=description["teacher_fingerprint"],
            parameters=parameters,
            optimizer=training["optimizer"],
            scheduler=training["scheduler"],
            rng=training["rng"],
            data_index=description["data_index"],
            losses=[math.nan if loss is None else loss for loss in description["losses"]],
            extra=description["extra"],
        )
    except (OSError, RuntimeError, KeyError, TypeError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}. {_REMEDY}") from error
    return state


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        description = json.loads((folder / STATE_NAME).read_bytes())
        version = description["format"]
        missing = {"stage", "step", "recipe_fingerprint", "teacher_fingerprint"} - set(description)
        if missing:
            raise KeyError(min(missing))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE_NAME} is damaged ({error}). {_REMEDY}") from error
    if version != _FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {version!r} and this version of lawcat reads {_FORMAT}. Resume "
            "with the version it was made with, or start in a new output folder."
        )
    result: dict[str, Any] = description
    return result


__all__ = [
    "TrainingState",
    "capture_rng",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "restore_rng",
    "save_checkpoint",
]
