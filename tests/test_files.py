"""Writing whole or not at all, and the manifest."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lawcat import files
from lawcat.errors import CheckpointError, LawcatError
from lawcat.files import (
    check_free_space,
    clear_write_errors,
    human_bytes,
    remove_directory,
    remove_leftovers,
    sha256_file,
    temporary_sibling,
    verify_manifest,
    write_atomic,
    write_directory_atomic,
    write_manifest,
)


def disk_full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("content", [b"bytes", "text \u00e9", lambda file: file.write(b"by a function")])
def test_write_atomic_writes(tmp_path: Path, content: object) -> None:
    target = tmp_path / "made" / "a.bin"
    write_atomic(target, content)  # type: ignore[arg-type]
    expected = (
        b"by a function" if callable(content) else content.encode() if isinstance(content, str) else content
    )
    assert target.read_bytes() == expected
    assert names(target.parent) == ["a.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_atomic_keeps_the_old_file_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, step, disk_full)
    with pytest.raises(LawcatError, match=r"disk full: .*a\.bin.*nothing was overwritten"):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_write_atomic_passes_other_errors_and_cleans_up(tmp_path: Path) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", interrupted)
    assert names(tmp_path) == []


def test_write_atomic_says_what_it_may_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(LawcatError, match=r"cannot write .*a: Permission denied.*may be written to"):
        write_atomic(tmp_path / "a", b"x")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LawcatError, match="cannot write"):
        write_atomic(tmp_path / "file" / "below" / "a", b"x")


def test_write_directory_atomic(tmp_path: Path) -> None:
    target = tmp_path / "made" / "model"
    seen = []

    def writer(place: Path) -> None:
        seen.append(place)
        assert not target.exists()
        (place / "sub").mkdir()
        (place / "sub" / "a").write_bytes(b"a")

    write_directory_atomic(target, writer)
    assert (target / "sub" / "a").read_bytes() == b"a"
    assert names(target.parent) == ["model"]
    assert seen[0].parent == target.parent

    with pytest.raises(LawcatError, match="exists already; nothing was overwritten"):
        write_directory_atomic(target, writer)
    write_directory_atomic(target, lambda place: (place / "b").write_bytes(b"b"), replace=True)
    assert names(target) == ["b"]
    assert names(target.parent) == ["model"]


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_who_may_read_a_folder_may_read_its_files(tmp_path: Path, mask: int, expected: int) -> None:
    def writer(place: Path) -> None:
        file = place / "model.safetensors"
        file.write_bytes(b"a")
        file.chmod(0o600)  # as safetensors leaves it

    before = os.umask(mask)
    try:
        write_directory_atomic(tmp_path / "model", writer)
    finally:
        os.umask(before)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == expected


def test_write_directory_atomic_refuses_what_appeared_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def writer(place: Path) -> None:
        (place / "mine").write_bytes(b"")
        target.mkdir()
        (target / "theirs").write_bytes(b"")

    with pytest.raises(LawcatError, match="exists already"):
        write_directory_atomic(target, writer)
    assert names(target) == ["theirs"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("step", ["fsync", "rename", "writer"])
def test_write_directory_atomic_leaves_no_trace_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, replace: bool
) -> None:
    target = tmp_path / "model"
    if replace:
        target.mkdir()
        (target / "old").write_bytes(b"old")
    if step != "writer":
        monkeypatch.setattr(os, step, disk_full)
    with pytest.raises(LawcatError, match="disk full"):
        write_directory_atomic(
            target,
            disk_full if step == "writer" else lambda place: (place / "new").write_bytes(b"new"),
            replace=replace,
        )
    assert names(tmp_path) == (["model"] if replace else [])
    if replace:
        assert names(target) == ["old"]


def test_replacing_puts_the_old_folder_back_when_the_second_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    rename = os.rename

    def fails_for_the_new_one(source: str, destination: str) -> None:
        if ".tmp-" in Path(source).name:
            disk_full()
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fails_for_the_new_one)
    with pytest.raises(LawcatError, match="disk full"):
        write_directory_atomic(target, lambda place: None, replace=True)
    assert names(target) == ["old"]
    assert names(tmp_path) == ["model"]


def test_errors_of_safetensors_and_torch_become_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LawcatError, match="disk full"), clear_write_errors(tmp_path):
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(LawcatError, match="cannot write"), clear_write_errors(tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    monkeypatch.setattr(files, "_free_bytes", lambda path: 0)
    with pytest.raises(LawcatError, match="disk full"), clear_write_errors(tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    with pytest.raises(RuntimeError, match="shape"), clear_write_errors(tmp_path):
        raise RuntimeError("shape mismatch")
    with pytest.raises(CheckpointError, match="ours"), clear_write_errors(tmp_path):
        raise CheckpointError("ours")


def test_leftovers_of_the_dead_are_removed_and_of_the_living_kept(tmp_path: Path) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    of_the_dead = tmp_path / f".a.tmp-{int(dead.stdout)}-0123abcd-0"
    of_the_dead.mkdir()
    (of_the_dead / "a").write_bytes(b"a")
    of_my_number = tmp_path / f".b.tmp-{os.getpid()}-0123abcd-0"
    of_my_number.write_bytes(b"")
    mine = temporary_sibling(tmp_path / "model")
    mine.mkdir()
    kept = tmp_path / ".model.replaced-1-0"
    kept.mkdir()
    assert remove_leftovers(tmp_path) == [of_the_dead, of_my_number]
    assert names(tmp_path) == sorted([mine.name, kept.name])
    assert remove_leftovers(tmp_path / "missing") == []


def test_remove_directory(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    remove_directory(tmp_path / "a")
    assert names(tmp_path) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "sub" / "b.txt").write_text("b")
    (tmp_path / "empty").write_bytes(b"")
    write_manifest(tmp_path)
    return tmp_path


def test_manifest_of_an_intact_folder(folder: Path) -> None:
    sums = verify_manifest(folder)
    assert sorted(sums) == ["a.bin", "empty", "sub/b.txt"]
    assert sums["a.bin"] == sha256_file(folder / "a.bin")
    (folder / "notes.txt").write_text("added by its owner")
    verify_manifest(folder)


def test_manifest_finds_every_flipped_bit(folder: Path) -> None:
    original = (folder / "a.bin").read_bytes()
    for bit in range(0, 2048, 97):
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / "a.bin").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"a\.bin is damaged: its content"):
            verify_manifest(folder)


def test_manifest_finds_truncated_and_missing_files(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"short")
    with pytest.raises(
        CheckpointError, match=r"a\.bin is damaged: it has 5 bytes and was written with 256.*Do this"
    ):
        verify_manifest(folder, remedy="Do this.")
    (folder / "a.bin").unlink()
    with pytest.raises(CheckpointError, match=r"a\.bin is missing"):
        verify_manifest(folder)


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"files": 1}',
        '{"files": {"a.bin": {}}}',
        '{"files": {"../a": {"size": 1, "sha256": ""}}}',
        "\x00\xff",
    ],
)
def test_damaged_manifest(folder: Path, manifest: str) -> None:
    (folder / "manifest.json").write_text(manifest, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        verify_manifest(folder)


def test_missing_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no manifest\.json, so it is not complete"):
        verify_manifest(folder)


def test_flips_in_the_manifest_never_pass_for_other_files(folder: Path) -> None:
    original = (folder / "manifest.json").read_bytes()
    expected = verify_manifest(folder)
    for bit in range(0, len(original) * 8, 5):
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / "manifest.json").write_bytes(damaged)
        try:
            sums = verify_manifest(folder)
        except CheckpointError:
            continue
        assert sums == expected  # white space, or a field that is not read


def test_check_free_space(tmp_path: Path) -> None:
    check_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(LawcatError, match=r"disk full: .* needs 1\d*\.\d TB and the disk has .* free"):
        check_free_space(tmp_path / "not" / "yet", 10**15)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (98_362_432, "98.4 MB"),
        (5e12, "5.0 TB"),
    ],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(int(count)) == text


def test_module_is_light() -> None:
    code = (
        "import sys, lawcat.files; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\[\]\s*", result.stdout)


def test_manifest_is_json(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["files"]["sub/b.txt"]["size"] == 1
