"""Fetching other packages' tests: once, checked, and never in the way where there is no network."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import fetch
import pytest

VERSION = "1.0"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "version_of", lambda package: VERSION)
    return tmp_path / "peers"


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("peft-1.0/tests/testing.py", "peft-1.0/tests/data.bin", "peft-1.0/src/peft.py"):
            tar.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


def pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[list[str]]:
    """Stand in for pip, which writes the archive, or fails; return the commands that were run."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, stderr="no network")
        place = Path(command[command.index("--dest") + 1])
        (place / "peft-1.0.tar.gz").write_bytes(content)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_only_python_files_of_tests_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive()
    commands = pip(monkeypatch, content)
    for _ in range(2):
        assert fetch.fetch("peft") == cache / "peft-1.0"
    assert len(commands) == 1
    assert {path.name for path in (cache / "peft-1.0").iterdir()} == {"testing.py", "SHA256"}
    assert (cache / "peft-1.0" / "SHA256").read_text().startswith(hashlib.sha256(content).hexdigest())
    assert [path.name for path in cache.iterdir()] == ["peft-1.0"]


def test_another_archive_than_the_known_one_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, archive())
    monkeypatch.setitem(fetch.SHA256, ("peft", VERSION), "0" * 64)
    with pytest.raises(RuntimeError, match="has the SHA-256"):
        fetch.fetch("peft")
    assert not list(cache.iterdir())


@pytest.mark.parametrize("content", [None, b"no archive"])
def test_a_failure_is_reported_and_leaves_nothing(
    content: bytes | None, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip(monkeypatch, content)
    monkeypatch.setattr(fetch, "PACKAGES", ("peft",))
    assert fetch.main() == 1
    assert "peft: not there, so its tests are skipped" in capsys.readouterr().err
    assert not list(cache.iterdir())
