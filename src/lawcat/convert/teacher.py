"""Teachers: where they come from, and loading them.

A teacher is named by a hub id, a local folder of safetensors, a GGUF file, or `smollm2-135m-instruct`, which
comes from PyPI and needs no model hub. Whichever it is, `resolve_teacher` leads it to a local folder of
safetensors that has been checked, with the fingerprint of its tensors; `load_teacher` loads that.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lawcat.convert.cache_dir import cache_dir as cache_root
from lawcat.convert.cache_dir import remembered
from lawcat.convert.dequantize import dequantized, dequantized_folder, gguf_config, gguf_tokenizer
from lawcat.convert.embedded import EMBEDDED_SHA256, EMBEDDED_TEACHER, fetch_embedded
from lawcat.convert.gguf_file import is_gguf, read_gguf
from lawcat.convert.pretrained import (
    PICKLE_SUFFIXES,
    SAFETENSORS_ONLY,
    TOKENIZER_FILES,
    check_loading,
    complete_generation_config,
    folder_config,
    folder_tokenizer,
    folder_weights,
    reading,
    without_progress_bars,
)
from lawcat.convert.safetensors_file import fingerprint, read_entries
from lawcat.convert.shipped import shipped_adapters
from lawcat.errors import TeacherError, did_you_mean
from lawcat.files import human_bytes, sha256_file

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_CONFIG_FILES = ("config.json",)
# Not `*.safetensors`: some repositories hold the weights a second time, under other names.
_WEIGHT_FILES = (
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
)
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_KINDS = f"a hub id (OWNER/NAME), a folder of safetensors, a GGUF file, or {EMBEDDED_TEACHER}"

Progress = Callable[[str], object]
CheckConfig = Callable[[Any], object]

_log = logging.getLogger(__name__)


class TeacherKind(StrEnum):
    """Where a teacher comes from."""

    HUB = "hub"
    FOLDER = "folder"
    GGUF = "gguf"
    EMBEDDED = "embedded"


@dataclass(frozen=True)
class TeacherSource:
    """A teacher that is at hand: local, checked, ready to load without a network.

    Attributes:
        name: What the user called it.
        kind: Where it comes from.
        folder: Folder of safetensors, configuration and tokenizer.
        fingerprint: SHA-256 of its tensors (`lawcat.convert.safetensors_file.fingerprint`). That of a GGUF
            file is of the float32 tensors it is dequantized to.
        revision: The hub's commit, for a teacher from there.
    """

    name: str
    kind: TeacherKind
    folder: Path
    fingerprint: str
    revision: str | None = None


@dataclass
class Teacher:
    """A loaded teacher.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer, with a padding token; `None` if it was not asked for.
        source: Where it comes from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: TeacherSource

    @property
    def name(self) -> str:
        """What the user called it."""
        return self.source.name

    @property
    def kind(self) -> TeacherKind:
        """Where it comes from."""
        return self.source.kind

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its tensors, the same however it was loaded."""
        return self.source.fingerprint


@dataclass(frozen=True)
class _Location:
    """A name that is understood, before anything of weight is fetched, converted or read."""

    name: str
    kind: TeacherKind
    root: Path
    path: Path | None = None
    revision: str | None = None


def resolve_teacher(
    name: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    check_config: CheckConfig | None = None,
) -> TeacherSource:
    """Get a teacher to this machine, in a form that loads fast: fetched, dequantized, checked, fingerprinted.

    Args:
        name: Hub id, folder, GGUF file, or `smollm2-135m-instruct`.
        cache_dir: Root of lawcat's cache; see `lawcat.convert.cache_dir.cache_dir`.
        revision: Branch, tag or commit, for a hub id.
        progress: Called with a line of text before anything that may take over five seconds.
        check_config: Called with the teacher's configuration before its weights are fetched or converted;
            raises for what it does not support, such as `lawcat.convert.families.family_of`.

    Returns:
        The teacher at hand. The second time, nothing is fetched or converted.

    Raises:
        TeacherError: where it cannot be found, is damaged, or is of a kind that is not supported.
        LawcatError: where the cache cannot be written to, as on a full disk.

    Example:
        >>> resolve_teacher("smollm2-135m-instruct", progress=print)  # doctest: +SKIP
        TeacherSource(name='smollm2-135m-instruct', kind=<TeacherKind.EMBEDDED: 'embedded'>, ...)
    """
    tell = progress or _log.info
    place = _locate(name, cache_dir, revision)
    if place.kind in (TeacherKind.GGUF, TeacherKind.EMBEDDED):
        folder, tensors = dequantized(
            place.root,
            _gguf_sha256(place),
            lambda: _gguf_path(place, tell),
            tell=tell,
            check_config=check_config,
        )
        if check_config is not None:
            check_config(folder_config(folder))
        return TeacherSource(place.name, place.kind, folder, tensors)

    folder = place.path or _from_hub(place, _CONFIG_FILES, tell)
    config = folder_config(folder)
    if check_config is not None:
        check_config(config)
    if place.kind is TeacherKind.HUB:
        folder = _from_hub(place, (*_CONFIG_FILES, *TOKENIZER_FILES, *_WEIGHT_FILES), tell)
    files = folder_weights(folder)
    entries = [entry for file in files for entry in read_entries(file)]
    num_bytes = sum(entry.num_bytes for entry in entries)
    if num_bytes > 3_000_000_000:
        tell(f"reading {place.name} ({human_bytes(num_bytes)}), once, for its fingerprint")
    tensors = remembered(place.root, "fingerprint", files, lambda: fingerprint(entries))
    # The hub's cache names a folder by its commit.
    commit = folder.name if place.kind is TeacherKind.HUB else None
    return TeacherSource(place.name, place.kind, folder, tensors, commit)


def load_teacher(
    source: TeacherSource | str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    with_tokenizer: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    check_config: CheckConfig | None = None,
) -> Teacher:
    """Load a teacher's model and tokenizer.

    Args:
        source: A name as `resolve_teacher` takes it, or what it returned.
        dtype: Type of the weights; `None` means float32, `"auto"` the one the teacher is stored in.
        device: Where the model goes; `None` means the CPU.
        attn_implementation: As in transformers, `"eager"` or `"sdpa"`; `None` means its choice.
        with_tokenizer: Whether the tokenizer is loaded; it must then be there.
        cache_dir: As in `resolve_teacher`.
        revision: As in `resolve_teacher`.
        progress: As in `resolve_teacher`.
        check_config: As in `resolve_teacher`.

    Raises:
        TeacherError: as `resolve_teacher`; and where a tensor is missing or of another shape than the
            configuration says, or the tokenizer is missing.

    Example:
        >>> teacher = load_teacher("smollm2-135m-instruct")  # doctest: +SKIP
        >>> teacher.model.config.num_hidden_layers  # doctest: +SKIP
        30
    """
    import torch
    from transformers import AutoModelForCausalLM

    if not isinstance(source, TeacherSource):
        source = resolve_teacher(
            source, cache_dir=cache_dir, revision=revision, progress=progress, check_config=check_config
        )
    elif check_config is not None:
        check_config(folder_config(source.folder))
    tokenizer = folder_tokenizer(source.folder, source.name) if with_tokenizer else None
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with reading(source.name), without_progress_bars():
        model, info = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=torch.float32 if dtype is None else dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    check_loading(info, source.name)
    complete_generation_config(model, tokenizer)
    model.eval()
    return Teacher(model if device is None else model.to(device), tokenizer, source)


def load_teacher_config(
    source: TeacherSource | str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> PreTrainedConfig:
    """Load a teacher's configuration only: no weights are fetched, converted or read.

    The embedded teacher is the exception: its configuration is inside the file that is fetched.

    Args:
        source: A name as `resolve_teacher` takes it, or what it returned.
        cache_dir: As in `resolve_teacher`.
        revision: As in `resolve_teacher`.
        progress: As in `resolve_teacher`.

    Raises:
        TeacherError: where the teacher cannot be found, or its configuration cannot be read.
    """
    if isinstance(source, TeacherSource):
        return folder_config(source.folder)
    tell = progress or _log.info
    place = _locate(source, cache_dir, revision)
    if place.kind in (TeacherKind.GGUF, TeacherKind.EMBEDDED):
        folder = dequantized_folder(place.root, _gguf_sha256(place))
        if (folder / "config.json").is_file():
            return folder_config(folder)
        return gguf_config(read_gguf(_gguf_path(place, tell)))
    return folder_config(place.path or _from_hub(place, _CONFIG_FILES, tell))


def load_tokenizer(
    source: TeacherSource | str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> PreTrainedTokenizerBase:
    """Load a teacher's tokenizer only: no weights are fetched, converted or read, but the embedded teacher's.

    Args:
        source: A name as `resolve_teacher` takes it, or what it returned.
        cache_dir: As in `resolve_teacher`.
        revision: As in `resolve_teacher`.
        progress: As in `resolve_teacher`.

    Returns:
        The tokenizer, with its chat template if it has one. Where it has no padding token, the end token
        pads.

    Raises:
        TeacherError: where the teacher cannot be found, or has no tokenizer that can be read.
    """
    if isinstance(source, TeacherSource):
        return folder_tokenizer(source.folder, source.name)
    tell = progress or _log.info
    place = _locate(source, cache_dir, revision)
    if place.kind in (TeacherKind.GGUF, TeacherKind.EMBEDDED):
        folder = dequantized_folder(place.root, _gguf_sha256(place))
        if (folder / "tokenizer.json").is_file():
            return folder_tokenizer(folder, place.name)
        return gguf_tokenizer(read_gguf(_gguf_path(place, tell)))
    folder = place.path or _from_hub(place, (*_CONFIG_FILES, *TOKENIZER_FILES), tell)
    return folder_tokenizer(folder, place.name)


def _locate(
    name: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None, revision: str | None
) -> _Location:
    text = os.fspath(name)
    root = cache_root(cache_dir)
    if not text.strip():
        raise TeacherError(f"a teacher has no name. Give {_KINDS}.")
    if text.lower() == EMBEDDED_TEACHER:
        return _Location(EMBEDDED_TEACHER, TeacherKind.EMBEDDED, root)
    path = Path(text).expanduser()
    if path.is_dir():
        return _Location(text, TeacherKind.FOLDER, root, path)
    if path.is_file():
        if is_gguf(path) or path.suffix.lower() == ".gguf":
            return _Location(text, TeacherKind.GGUF, root, path)
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise TeacherError(
                f"{path} is a pickle, which can run any program when it is read. {SAFETENSORS_ONLY}"
            )
        raise TeacherError(f"{path} is not a model. Give its folder, or another of: {_KINDS}.")
    looks_like_a_path = (
        isinstance(name, os.PathLike)
        or text.startswith((".", "/", "~"))
        or text.endswith(("/", ".gguf"))
        or "\\" in text
        or text.count("/") > 1
    )
    if looks_like_a_path:
        raise TeacherError(f"there is no file or folder {path}. Give {_KINDS}.")
    if not _HUB_ID.match(text):
        raise TeacherError(
            f"{text!r} is no teacher: neither a file or folder, nor spelled as a hub id. Give {_KINDS}."
            + _did_you_mean(text)
        )
    if text.lower() in shipped_adapters():
        raise TeacherError(
            f"{text} is an adapter that comes with lawcat, a linear model already, and no teacher. "
            f"Give {_KINDS}."
        )
    return _Location(text, TeacherKind.HUB, root, revision=revision)


def _did_you_mean(name: str) -> str:
    return did_you_mean(name.lower(), [EMBEDDED_TEACHER, *shipped_adapters()])


def _gguf_sha256(place: _Location) -> str:
    if place.path is None:
        return EMBEDDED_SHA256
    path = place.path
    try:
        return remembered(place.root, "sha256", [path], lambda: sha256_file(path))
    except OSError as error:
        raise TeacherError(f"{path} cannot be read: {error.strerror or error}.") from error


def _gguf_path(place: _Location, tell: Progress) -> Path:
    return place.path or fetch_embedded(place.root, tell)


def _from_hub(place: _Location, patterns: Sequence[str], tell: Progress) -> Path:
    """Fetch files of a hub repository, or find those fetched before; return their folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if _WEIGHT_FILES[0] in patterns:
        tell(f"fetching {place.name} from the hub, where it is not here already")
    named = f"{place.name} (revision {place.revision})" if place.revision else place.name
    meant = _did_you_mean(place.name)
    try:
        return Path(snapshot_download(place.name, revision=place.revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise TeacherError(
            f"the hub gives {named} only to those who accepted its licence. Accept it on the model's page, "
            "and run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise TeacherError(
            f"the hub has no model {named}, or it is private and you are not logged in (`hf auth login`). "
            f"Give {_KINDS}.{meant}"
        ) from error
    except RevisionNotFoundError as error:
        raise TeacherError(f"the hub has no {named}. Give a branch, tag or commit of it.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise TeacherError(
            f"there is no {place.name} here, the hub cannot be reached, and {named} was not fetched before. "
            "Connect to the network, or give a folder or a GGUF file that is here; "
            f"{EMBEDDED_TEACHER} comes from PyPI.{meant}"
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TeacherError(
            f"{named} could not be fetched from the hub: {reason}. Try again later."
        ) from error


__all__ = [
    "EMBEDDED_TEACHER",
    "Teacher",
    "TeacherKind",
    "TeacherSource",
    "load_teacher",
    "load_teacher_config",
    "load_tokenizer",
    "resolve_teacher",
]
