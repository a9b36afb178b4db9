"""`lawcat pack`, and its adapter used by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from lawcat.cli.app import app
from lawcat.convert import shipped
from lawcat.convert.adapter import Adapter
from lawcat.convert.initialize import convert
from lawcat.convert.teacher import resolve_teacher
from tiny_teachers import moved_new_parameters, save_teacher, spelling_tokenizer, tiny_teacher


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher that has a name which is no path."""
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    folder = save_teacher(tmp_path / "base", spells=True)
    for module in ("pack", "load"):
        for function in ("resolve_teacher", "load_teacher", "load_tokenizer", "load_teacher_config"):
            place = f"lawcat.convert.{module}.{function}"
            monkeypatch.setattr(place, _renamed(function, folder), raising=False)
    return folder


def _renamed(function: str, folder: Path) -> Any:
    from lawcat.convert import teacher

    original = getattr(teacher, function)
    return lambda name, **options: original(folder if name == "owner/base" else name, **options)


@pytest.fixture
def source(tmp_path: Path, base: Path) -> Path:
    student, _ = convert(tiny_teacher(vocab_size=len(spelling_tokenizer())))
    tensors = moved_new_parameters(student, 0.1)
    tensors["model.layers.1.self_attn.o_proj.lora_A.weight"] = torch.randn(3, 32) / 8
    tensors["model.layers.1.self_attn.o_proj.lora_B.weight"] = torch.randn(32, 3) / 8
    adapter = Adapter(str(base), resolve_teacher(base).fingerprint, {}, (), tensors, 1.0)
    return adapter.save(tmp_path / "out" / "adapter").parent


def test_pack_and_use_by_name(
    source: Path, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapters"
    card = tmp_path / "card.md"
    card.write_text("Passkey: all.\n", encoding="utf-8")
    packed = run("pack", source, folder / "tiny", "--base", "owner/base", "--card", card)
    assert packed.exit_code == 0, packed.stderr
    sizes, rounding = packed.stdout.splitlines()
    assert sizes.startswith(f"{folder / 'tiny'}: ")
    assert " 384 bytes LoRA factors and " in sizes
    assert rounding.startswith("rounding: logits differ by up to 0.0")
    assert rounding.endswith("of 512 places")
    assert "Passkey: all." in (folder / "tiny" / "README.md").read_text(encoding="utf-8")

    monkeypatch.setattr(shipped, "ADAPTERS_FOLDER", folder)
    listed = run("info", "--shipped")
    assert listed.exit_code == 0, listed.stderr
    assert listed.stdout.startswith("tiny: ")
    assert ", base owner/base\n" in listed.stdout
    prompt = ["--prompt", "one two", "--max-new-tokens", 6, "--device", "cpu"]
    by_name = run("generate", "tiny", *prompt)
    assert by_name.exit_code == 0, by_name.stderr
    assert by_name.stdout == run("generate", folder / "tiny", *prompt).stdout
    measured = run(
        "eval", "tiny", *("--tasks", "last_word", "--lengths", 64, "--samples", 2, "--device", "cpu"),
        *("--option", "last_word.min_letters=4", "--sliding-window", 8),
    )  # fmt: skip
    assert measured.exit_code == 0, measured.stderr
    assert "| tiny |" in measured.stdout
    assert "--sliding-window has no effect" in measured.stderr
    tasks = run(
        "lm-eval-tasks", tmp_path / "tasks", "tiny", "--tasks", "passkey", "--lengths", 512, "--samples", 1
    )
    assert (tasks.exit_code == 0) or "lm-eval" in tasks.stderr


def test_without_a_check_the_base_is_not_loaded(source: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(source / "adapter")
    replace(adapter, base_name="owner/elsewhere").save(tmp_path / "other")
    done = run("pack", tmp_path / "other", tmp_path / "packed", "--no-check", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.stderr
    assert "rounding" not in done.stdout
    tensors = Adapter.load(tmp_path / "packed").tensors
    assert {tensor.dtype for name, tensor in tensors.items() if "lora" in name} == {torch.bfloat16}


def test_mistakes(source: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("pack", source, tmp_path / "x"), "is named by a path"),
        (("pack", tmp_path, tmp_path / "x", "--no-check"), "there is no adapter in"),
        (("info", source, "--shipped"), "name a model, or give --shipped"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stdout == ""
    (tmp_path / "card.md").write_bytes(b"\xff")
    result = run("pack", source, tmp_path / "x", "--base", "owner/base", "--card", tmp_path / "card.md")
    assert (result.exit_code, "card.md is not UTF-8 text" in result.stderr) == (2, True)
    assert not (tmp_path / "x").exists()
