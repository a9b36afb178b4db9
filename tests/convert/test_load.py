"""Whatever a command is given: a student's directory, an adapter, a teacher; and what is damaged."""

from __future__ import annotations

import errno
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from comparison import assert_near
from lawcat import LawcatForCausalLM, load_model
from lawcat.convert.adapter import Adapter
from lawcat.convert.initialize import convert, is_new_parameter
from lawcat.convert.save import save_student
from lawcat.convert.teacher import resolve_teacher
from lawcat.errors import CheckpointError, LawcatError, TeacherError
from tiny_teachers import random_ids, save_teacher, tiny_teacher, tiny_tokenizer

IDS = random_ids()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))


def make_student(directory: Path, base: Path, **fields: Any) -> Path:
    """Save a student, with its adapter, whose new parameters and one projection moved."""
    student, _ = convert(tiny_teacher(**fields))
    torch.manual_seed(1)
    tensors = {
        name: parameter.detach() + 0.2 * torch.randn_like(parameter)
        for name, parameter in student.named_parameters()
        if is_new_parameter(name)
    }
    q_proj = student.model.layers[0].self_attn.q_proj
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.randn(2, q_proj.in_features)
    tensors["model.layers.0.self_attn.q_proj.lora_B.weight"] = torch.randn(q_proj.out_features, 2)
    adapter = Adapter(str(base), resolve_teacher(base).fingerprint, {}, (), tensors, 0.5)
    adapter.apply(student)
    return save_student(student, tiny_tokenizer(), directory, adapter=adapter)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_teacher(tmp_path / "base")


@pytest.fixture
def student(tmp_path: Path, base: Path) -> Path:
    return make_student(tmp_path / "student", base)


def test_student_and_adapter_give_the_same_logits(student: Path, base: Path) -> None:
    merged, adapted = load_model(student), load_model(student / "adapter")
    assert (merged.kind, adapted.kind) == ("student", "adapter")
    assert (merged.name, adapted.name) == (str(student), str(student / "adapter"))
    assert torch.equal(merged.model(IDS).logits, adapted.model(IDS).logits)
    for loaded in (merged, adapted):
        assert not loaded.model.training
        assert loaded.tokenizer("w3 w9").input_ids == [3, 9]
        assert loaded.tokenizer.eos_token_id == 2
    teacher = load_model(base)
    assert teacher.kind == "teacher"
    assert torch.equal(teacher.model(IDS).logits, tiny_teacher()(IDS).logits)
    assert not torch.allclose(teacher.model(IDS).logits, merged.model(IDS).logits)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True},
        {"family": "qwen2"},
        {"family": "qwen3", "tie_word_embeddings": True},
    ],
    ids=str,
)
def test_transformers_loads_the_directory(tmp_path: Path, fields: dict[str, Any]) -> None:
    base = save_teacher(tmp_path / "base", **fields)
    student = make_student(tmp_path / "student", base, **fields)
    model = AutoModelForCausalLM.from_pretrained(student)
    assert isinstance(model, LawcatForCausalLM)
    assert model.config.teacher_model_type == fields.get("family", "llama")
    loaded = load_model(student).model
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    assert torch.equal(model(IDS).logits, load_model(student / "adapter").model(IDS).logits)
    assert loaded.generation_config.eos_token_id == 2
    assert AutoTokenizer.from_pretrained(student)("w5").input_ids == [5]
    assert torch.equal(model.generate(IDS, max_new_tokens=3), loaded.generate(IDS, max_new_tokens=3))


def test_the_models_code_is_in_it(student: Path) -> None:
    assert (student / "modeling_lawcat.py").is_file()
    config = json.loads((student / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_lawcat.LawcatForCausalLM"


@pytest.mark.parametrize("what", ["student", "student/adapter", "base"])
def test_another_type_of_weights(tmp_path: Path, student: Path, what: str) -> None:
    model = load_model(tmp_path / what, dtype=torch.bfloat16, device="cpu").model
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if is_new_parameter(name) else torch.bfloat16), name
    assert_near(model(IDS).logits, load_model(tmp_path / what).model(IDS).logits, 0.1, "logits")


def test_nothing_shows_where_it_was_made(student: Path) -> None:
    for path in student.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors" and path.parent.name != "adapter":
            assert str(student.parent) not in path.read_text(encoding="utf-8"), path.name


def test_saving_and_loading_say_nothing(
    tmp_path: Path, base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student = make_student(tmp_path / "quiet", base)
        load_model(student)
        load_model(student / "adapter")
        load_model(base)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_directory_that_exists_is_left_alone(tmp_path: Path, student: Path) -> None:
    before = {path: path.read_bytes() for path in student.rglob("*") if path.is_file()}
    model = load_model(student).model
    with pytest.raises(LawcatError, match="exists already; nothing was overwritten"):
        save_student(model, tiny_tokenizer(), student)
    assert {path: path.read_bytes() for path in student.rglob("*") if path.is_file()} == before


def test_a_full_disk(tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(place: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = load_model(student).model
    before = sorted(tmp_path.iterdir())
    with pytest.raises(LawcatError, match=r"disk full: .* could not be written"):
        save_student(model, tiny_tokenizer(), tmp_path / "new", add_records=full)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    with pytest.raises(LawcatError, match=r"disk full: .* and the disk has 5 bytes free"):
        save_student(model, tiny_tokenizer(), tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before


def test_a_generation_config_that_transformers_finds_fault_with(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    teacher.generation_config.temperature = 0.6  # without do_sample, as some teachers have it
    teacher.generation_config.max_length = 99
    model, _ = convert(teacher)
    student = save_student(model, tiny_tokenizer(), tmp_path / "student")
    assert load_model(student).model.generation_config.max_length == 99
    teacher.generation_config.do_sample = True
    assert convert(teacher)[0].generation_config.temperature == 0.6


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["bit", "truncated", "missing"])
def test_a_damaged_student(student: Path, name: str, damage: str) -> None:
    path = student / name
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif name == "manifest.json":
        return
    else:
        path.unlink()
    with pytest.raises(CheckpointError):
        load_model(student)


def test_a_student_that_transformers_saved(tmp_path: Path, student: Path) -> None:
    place = tmp_path / "again"
    load_model(student).model.save_pretrained(place)
    with pytest.raises(CheckpointError, match=r"has no tokenizer that can be loaded.*--tokenizer"):
        load_model(place)  # without a tokenizer
    tiny_tokenizer().save_pretrained(place)
    loaded = load_model(place)
    assert loaded.kind == "student"
    assert torch.equal(loaded.model(IDS).logits, load_model(student).model(IDS).logits)

    weights = place / "model.safetensors"
    tensors = load_file(weights)
    lost = next(name for name in tensors if "q_conv" in name)
    save_file({name: t for name, t in tensors.items() if name != lost}, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensors, such as {lost}"):
        load_model(place)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(place)


def test_a_teacher_with_a_manifest_is_a_teacher(base: Path) -> None:
    (base / "manifest.json").write_text("{}")
    assert load_model(base).kind == "teacher"


def test_the_base_of_an_adapter(tmp_path: Path, student: Path, base: Path) -> None:
    expected = load_model(student).model(IDS).logits
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(TeacherError, match=r"the adapter's base cannot be loaded: .*give it with --base"):
        load_model(student / "adapter")
    assert torch.equal(load_model(student / "adapter", base=str(moved)).model(IDS).logits, expected)
    other = save_teacher(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="belongs to another base"):
        load_model(student / "adapter", base=str(other))
    with pytest.raises(TeacherError, match="there is no file or folder"):
        load_model(student / "adapter", base=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["lawcat_adapter.json", "lawcat_adapter.safetensors"])
def test_a_damaged_adapter(student: Path, name: str) -> None:
    path = student / "adapter" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(student / "adapter")
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_model(student / "adapter")
    with pytest.raises(CheckpointError, match="missing"):  # the manifest above lists it too
        load_model(student)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="there is no file or folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(TeacherError, match=r"no config\.json"):
        load_model(tmp_path)
