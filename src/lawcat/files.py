"""Files on disk: written whole or not at all, and checked against a manifest of SHA-256 sums.

Everything is filled under a temporary name beside its target, forced to disk and then renamed, so that a
process that is killed, or a disk that is full, leaves either the old file or the new one. Below everything
else of lawcat: imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lawcat.errors import CheckpointError, LawcatError

MANIFEST_NAME = "manifest.json"

_TEMPORARY = re.compile(r"^\..+\.tmp-(?P<pid>\d+)-(?P<process>[0-9a-f]{8})-\d+$")
# Tells this process from an earlier one of the same number, as every container starts its own count.
_PROCESS = secrets.token_hex(4)
_COUNT = itertools.count()
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and torch report a failed write in their own exceptions, with the system's words inside at best.
_FULL_WORDS = re.compile(r"no space left|os error (28|122|27)\b|disk quota|file too large", re.IGNORECASE)
_WRITE_WORDS = re.compile(
    r"I/O error|PytorchStreamWriter|iostream|unexpected pos|os error \d+", re.IGNORECASE
)


def human_bytes(count: int) -> str:
    """Return a number of bytes as people read it, in decimal units.

    >>> human_bytes(540_090_408)
    '540.1 MB'
    """
    if count < 1000:
        return f"{count} bytes"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


@contextlib.contextmanager
def clear_write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a failed write inside the block into a `LawcatError` that says what failed and what is safe.

    Args:
        path: What was being written, for the message.

    Raises:
        LawcatError: for an `OSError`, or for safetensors' and torch's own reports of one. Every other
            exception passes unchanged.
    """
    try:
        yield
    except LawcatError:
        raise
    except OSError as error:
        full = error.errno in _FULL
        raise _write_error(path, full, error.strerror or str(error)) from error
    except Exception as error:
        text = str(error)
        full = bool(_FULL_WORDS.search(text))
        if not full and not _WRITE_WORDS.search(text):
            raise
        # torch does not say why its writer failed, so a disk without room is looked for.
        full = full or _free_bytes(Path(path)) < 1_000_000
        raise _write_error(path, full, text.splitlines()[0]) from error


def _write_error(path: str | os.PathLike[str], full: bool, reason: str) -> LawcatError:
    if full:
        return LawcatError(
            f"disk full: {os.fspath(path)} could not be written ({reason}); nothing was overwritten. "
            "Free some space or choose another folder, then run again."
        )
    return LawcatError(
        f"cannot write {os.fspath(path)}: {reason}; nothing was overwritten. "
        "Check that the folder exists and may be written to, or choose another."
    )


def _free_bytes(path: Path) -> int:
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_free_space(path: str | os.PathLike[str], needed_bytes: int) -> None:
    """Refuse early to write what the disk has no room for.

    Args:
        path: Where it will be written; need not exist yet.
        needed_bytes: Size of what will be written.

    Raises:
        LawcatError: where the disk has less free than that.

    Example:
        >>> check_free_space(".", 1)
    """
    free = _free_bytes(Path(path))
    if free < needed_bytes:
        raise LawcatError(
            f"disk full: {os.fspath(path)} needs {human_bytes(needed_bytes)} and the disk has "
            f"{human_bytes(free)} free; nothing was written. Free some space or choose another folder."
        )


def temporary_sibling(path: str | os.PathLike[str]) -> Path:
    """Return an unused hidden name in the same folder, which carries this process's number.

    `remove_leftovers` knows it by that, and spares the temporaries of processes that still run.
    """
    target = Path(path)
    return target.with_name(f".{target.name}.tmp-{os.getpid()}-{_PROCESS}-{next(_COUNT)}")


def is_being_written(path: Path) -> bool:
    """Return whether this is what a process writes at the moment, or wrote when it was killed.

    >>> is_being_written(temporary_sibling("model.json"))
    True
    >>> is_being_written(Path("model.json"))
    False
    """
    return _TEMPORARY.match(path.name) is not None


def remove_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove temporaries that processes which are no more left in `folder`; return their paths."""
    removed = []
    with contextlib.suppress(FileNotFoundError):
        for entry in sorted(Path(folder).iterdir()):
            match = _TEMPORARY.match(entry.name)
            if match and not _is_running(int(match["pid"]), match["process"]):
                _remove(entry)
                removed.append(entry)
    return removed


def _is_running(pid: int, process: str) -> bool:
    if pid == os.getpid():
        return process == _PROCESS
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it runs, as somebody else
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def remove_directory(path: str | os.PathLike[str]) -> None:
    """Remove a folder so that no half of it can be taken for the whole: it is renamed first."""
    target = Path(path)
    aside = temporary_sibling(target)
    os.rename(target, aside)
    _remove(aside)


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Force a folder's list of names to disk, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems without it
            raise
    finally:
        os.close(descriptor)


def write_atomic(path: str | os.PathLike[str], content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Write one file, whole or not at all; an existing one is replaced.

    Args:
        path: The file. Missing parent folders are made.
        content: Its bytes, its text (UTF-8), or a function that writes to the open binary file it is given.

    Raises:
        LawcatError: where it could not be written. An existing file is then as it was.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "a.json"
        >>> write_atomic(file, "{}")
        >>> file.read_text()
        '{}'
    """
    target = Path(path)
    temporary = temporary_sibling(target)
    try:
        with clear_write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content.encode("utf-8") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            fsync_directory(target.parent)
    except BaseException:
        _remove(temporary)
        raise


def write_directory_atomic(
    path: str | os.PathLike[str], writer: Callable[[Path], object], *, replace: bool = False
) -> None:
    """Write one folder, whole or not at all.

    Args:
        path: The folder. Missing parents are made.
        writer: Called with an empty temporary folder on the same disk, which it fills.
        replace: Whether an existing folder is replaced. The new one is complete before the old one is
            touched; a process killed between the two renames leaves the old one beside it as
            `.NAME.replaced-...`.

    Raises:
        LawcatError: where `path` exists and `replace` is false, or something could not be written. What
            existed is then as it was.

    Example:
        >>> import tempfile, pathlib
        >>> folder = pathlib.Path(tempfile.mkdtemp()) / "model"
        >>> write_directory_atomic(folder, lambda place: (place / "config.json").write_text("{}"))
        >>> [file.name for file in folder.iterdir()]
        ['config.json']
    """
    target = Path(path)
    if not replace:
        _refuse_existing(target)
    temporary = temporary_sibling(target)
    try:
        # The temporary is removed after the error is read: a disk is seen to be full only while it still is.
        with clear_write_errors(target):
            temporary.mkdir(parents=True)
            writer(temporary)
            _let_others_read(temporary)
            _fsync_tree(temporary)
            _rename_directory(temporary, target, replace)
            fsync_directory(target.parent)
    except BaseException:
        _remove(temporary)
        raise


def _let_others_read(folder: Path) -> None:
    """Give files the permissions that the folder has: safetensors lets their owner alone read them."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with contextlib.suppress(OSError):  # a file system without permissions
                file.chmod(file.stat().st_mode | mode)


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise LawcatError(
            f"{target} exists already; nothing was overwritten. Choose another place, or remove it if it is "
            "not needed."
        )


def _rename_directory(temporary: Path, target: Path, replace: bool) -> None:
    if not (replace and target.exists()):
        try:
            os.rename(temporary, target)
        except OSError as error:
            if error.errno in (
                errno.ENOTEMPTY,
                errno.EEXIST,
                errno.ENOTDIR,
            ):  # made by another process meanwhile
                _refuse_existing(target)
            raise
        return
    # Python has no system call that swaps two folders. The name is not one that `remove_leftovers` removes.
    aside = target.with_name(f".{target.name}.replaced-{os.getpid()}-{next(_COUNT)}")
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(aside, target)
        raise
    _remove(aside)


def _fsync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            # Read and write, because some systems refuse to force a descriptor that may only read.
            with open(os.path.join(root, name), "r+b") as file:
                os.fsync(file.fileno())
        fsync_directory(root)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: where it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: str | os.PathLike[str]) -> Path:
    """Write `manifest.json`: the size and SHA-256 of every file in `folder`, subfolders included.

    Call it last, inside the writer of `write_directory_atomic`.

    Returns:
        Path of the manifest.

    Raises:
        LawcatError: where it could not be written.
    """
    root = Path(folder)
    files = {
        file.relative_to(root).as_posix(): {"size": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(root.rglob("*"))
        if file.is_file() and file != root / MANIFEST_NAME
    }
    write_atomic(root / MANIFEST_NAME, json.dumps({"format": 1, "files": files}, indent=1) + "\n")
    return root / MANIFEST_NAME


def verify_manifest(
    folder: str | os.PathLike[str], *, remedy: str = "Restore it from a copy, or make it again."
) -> dict[str, str]:
    """Check every file that `manifest.json` lists; files it does not list are not looked at.

    Args:
        folder: The folder that holds the manifest.
        remedy: Last sentence of the message: what the user can do.

    Returns:
        SHA-256 by relative file name.

    Raises:
        CheckpointError: naming the first file that is missing, of another size or of other content; or where
            the manifest itself is missing or damaged.
    """
    root = Path(folder)
    try:
        manifest = json.loads((root / MANIFEST_NAME).read_bytes())
        files: dict[str, dict[str, Any]] = manifest["files"]
        listed = [(name, entry["size"], entry["sha256"]) for name, entry in files.items()]
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name, _, _ in listed):
            raise ValueError("a file name that leaves the folder")
    except FileNotFoundError as error:
        raise CheckpointError(f"{root} has no {MANIFEST_NAME}, so it is not complete. {remedy}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{root / MANIFEST_NAME} is damaged ({error}). {remedy}") from error
    for name, size, sha256 in listed:
        file = root / name
        try:
            found = file.stat().st_size
            if found != size:
                raise CheckpointError(
                    f"{file} is damaged: it has {found} bytes and was written with {size}. {remedy}"
                )
            if sha256_file(file) != sha256:
                raise CheckpointError(f"{file} is damaged: its content is not what was written. {remedy}")
        except FileNotFoundError as error:
            raise CheckpointError(f"{file} is missing. {remedy}") from error
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}. {remedy}") from error
    return {name: sha256 for name, _, sha256 in listed}


__all__ = [
    "MANIFEST_NAME",
    "check_free_space",
    "clear_write_errors",
    "fsync_directory",
    "human_bytes",
    "is_being_written",
    "remove_directory",
    "remove_leftovers",
    "sha256_file",
    "temporary_sibling",
    "verify_manifest",
    "write_atomic",
    "write_directory_atomic",
    "write_manifest",
]
