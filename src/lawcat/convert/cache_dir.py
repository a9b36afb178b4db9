"""The folder where lawcat keeps what took long to make: teachers that were downloaded or dequantized."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lawcat.errors import LawcatError
from lawcat.files import clear_write_errors, write_atomic

ENVIRONMENT_VARIABLE = "LAWCAT_CACHE"


def cache_dir(override: str | os.PathLike[str] | None = None) -> Path:
    """Return the root of the cache; it may not exist yet.

    Args:
        override: A folder that goes before the environment variable `LAWCAT_CACHE`, which goes before
            `~/.cache/lawcat`.

    Example:
        >>> cache_dir("/data/cache").as_posix()
        '/data/cache'
    """
    if override is not None:
        return Path(override).expanduser()
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE)
    if from_environment:
        return Path(from_environment).expanduser()
    return Path.home() / ".cache" / "lawcat"


@contextlib.contextmanager
def cache_lock(root: Path, name: str) -> Iterator[None]:
    """Let one process at a time make the entry `name`; another waits, and then finds it made.

    Raises:
        LawcatError: where the cache cannot be written to, saying how to choose another.
    """
    from filelock import FileLock

    folder = root / "locks"
    try:
        with clear_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f"{name}.lock")
            lock.acquire()
    except LawcatError as error:
        raise LawcatError(
            f"the cache folder {root} cannot be used: {error} Another is chosen with the environment "
            f"variable {ENVIRONMENT_VARIABLE}."
        ) from error
    try:
        yield
    finally:
        lock.release()


def remembered(root: Path, kind: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """Return what `compute` gives for `files`, computed anew only when one of them has changed.

    Changed means another size, time of modification or place on disk. A cache that cannot be written to costs
    time only.

    Args:
        root: Root of the cache.
        kind: What is computed; a part of the key.
        files: The files that the result depends on.
        compute: Called without arguments.
    """
    identity = [kind]
    for file in files:
        stat = file.stat()
        identity.append(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}")
    key = hashlib.sha256("\0\0".join(identity).encode()).hexdigest()
    entry = root / "digests" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        value = json.loads(entry.read_bytes())["value"]
        if isinstance(value, str):
            return value
    value = compute()
    with contextlib.suppress(LawcatError):
        write_atomic(
            entry, json.dumps({"kind": kind, "files": [str(file) for file in files], "value": value})
        )
    return value


__all__ = ["ENVIRONMENT_VARIABLE", "cache_dir", "cache_lock", "remembered"]
