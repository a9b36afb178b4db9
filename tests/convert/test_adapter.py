"""Adapters: what training added, on the base it belongs to and on no other."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from comparison import assert_near
from lawcat import LawcatForCausalLM
from lawcat.convert.adapter import DESCRIPTION_NAME, TENSORS_NAME, Adapter, is_adapter
from lawcat.convert.initialize import convert, is_new_parameter
from lawcat.distill.recovery import plain_name
from lawcat.errors import CheckpointError, LawcatError
from lawcat.files import write_manifest
from tiny_teachers import random_ids, tiny_teacher

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

OPERATOR = {"gate": "head", "feature_dim": 4}
TARGETS = ["q_proj", "o_proj", "down_proj"]


def student_with_factors(**fields: Any) -> tuple[LawcatForCausalLM, Any, Adapter]:
    """Return a student in peft's hands, all that trains moved; what peft made of it; its adapter."""
    student, _ = convert(tiny_teacher(**fields), softmax_layers=(1,), **OPERATOR)
    wrapped = get_peft_model(student, LoraConfig(r=3, lora_alpha=12, target_modules=TARGETS))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if is_new_parameter(name) or ".lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    tensors = {
        plain_name(name): parameter.detach().clone()
        for name, parameter in student.named_parameters()
        if is_new_parameter(name) or ".lora_" in name
    }
    return student, wrapped, Adapter("some/base", "f" * 64, dict(OPERATOR), (1,), tensors, 4.0, {"name": "x"})


def fresh_student(**fields: Any) -> LawcatForCausalLM:
    return convert(tiny_teacher(**fields), softmax_layers=(1,), **OPERATOR)[0]


@pytest.fixture
def adapter() -> Adapter:
    return student_with_factors()[2]


def test_what_is_saved_is_what_is_loaded(adapter: Adapter, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    assert not is_adapter(folder)
    assert adapter.save(folder) == folder
    assert is_adapter(folder)
    loaded = Adapter.load(folder)
    assert dataclasses.replace(loaded, tensors={}) == dataclasses.replace(adapter, tensors={})
    assert loaded.tensors.keys() == adapter.tensors.keys()
    for name, tensor in adapter.tensors.items():
        assert loaded.tensors[name].dtype == torch.float32
        assert torch.equal(loaded.tensors[name], tensor)
    assert sorted(path.name for path in folder.iterdir()) == [
        DESCRIPTION_NAME,
        TENSORS_NAME,
        "manifest.json",
    ]


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_word_embeddings": True}, {"family": "qwen2"}, {"family": "qwen3", "attention_bias": True}],
    ids=str,
)
def test_applied_it_is_what_peft_merges(fields: dict[str, Any]) -> None:
    ids = random_ids()
    trained, wrapped, adapter = student_with_factors(**fields)
    unmerged = trained(ids).logits
    applied = fresh_student(**fields)
    adapter.apply(applied)
    merged = wrapped.merge_and_unload()
    parameters = dict(merged.named_parameters())
    for name, parameter in applied.named_parameters():
        assert_near(parameter, parameters[name], 2e-7, name)
    assert_near(applied(ids).logits, unmerged, 1e-5, "logits")
    assert not torch.allclose(applied(ids).logits, fresh_student(**fields)(ids).logits)


def test_an_adapter_without_factors() -> None:
    adapter = student_with_factors()[2]
    tensors = {name: t for name, t in adapter.tensors.items() if ".lora_" not in name}
    student, untouched = fresh_student(), fresh_student()
    dataclasses.replace(adapter, tensors=tensors, lora_scale=0.0).apply(student)
    for (name, mine), theirs in zip(student.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(mine, tensors.get(name, theirs))


def test_a_base_in_bfloat16() -> None:
    adapter = student_with_factors()[2]
    student, exact = fresh_student(), fresh_student()
    adapter.apply(exact)
    for name, parameter in student.named_parameters():
        if not is_new_parameter(name):
            parameter.data = parameter.data.to(torch.bfloat16)
    adapter.apply(student)
    for (name, mine), theirs in zip(student.named_parameters(), exact.parameters(), strict=True):
        assert mine.dtype == (torch.float32 if is_new_parameter(name) else torch.bfloat16)
        assert_near(mine, theirs, 0.01, name)


def test_another_base_is_refused(adapter: Adapter) -> None:
    adapter.check_base("f" * 64, "some/base")
    with pytest.raises(
        CheckpointError, match=r"belongs to another base.*'some/base'.*ffffffffffff.*'other'.*aaaa"
    ):
        adapter.check_base("a" * 64, "other")


def remove_one(tensors: dict[str, torch.Tensor], ending: str) -> str:
    name = next(name for name in sorted(tensors) if name.endswith(ending))
    del tensors[name]
    return name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: remove_one(t, "decay_gate.bias"), r"decay_gate\.bias is missing"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_conv.bias": torch.ones(2)}),
            r"q_conv\.bias is unknown",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(2)}),
            r"up_proj\.weight is unknown",
        ),
        (lambda t: remove_one(t, "q_proj.lora_A.weight"), r"factors of .*q_proj have no counterpart"),
        (lambda t: remove_one(t, "q_proj.lora_B.weight"), r"factors of .*q_proj have no counterpart"),
        (lambda t: t.update({"lm.lora_A.weight": torch.ones(3, 8)}), "factors of lm have no counterpart"),
    ],
)
def test_tensors_that_do_not_belong_there(adapter: Adapter, change: Any, message: str) -> None:
    tensors = dict(adapter.tensors)
    change(tensors)
    student, untouched = fresh_student(), fresh_student()
    with pytest.raises(CheckpointError, match=message):
        dataclasses.replace(adapter, tensors=tensors).apply(student)
    for mine, theirs in zip(student.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("decay_gate.bias", r"decay_gate\.bias is \(3,\), its place \(2,\)"),
        ("down_proj.lora_B.weight", r"down_proj is \(33, 48\), its place \(32, 48\)"),
        ("down_proj.lora_A.weight", "the factors of .*down_proj differ in rank"),
    ],
)
def test_tensors_of_another_shape(adapter: Adapter, ending: str, message: str) -> None:
    tensors = dict(adapter.tensors)
    name = next(name for name in sorted(tensors) if name.endswith(ending))
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    with pytest.raises(CheckpointError, match=message):
        dataclasses.replace(adapter, tensors=tensors).apply(fresh_student())


def test_a_folder_that_exists_is_left_alone(adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for target in (tmp_path, tmp_path / "mine"):
        with pytest.raises(LawcatError, match="exists already; nothing was overwritten"):
            adapter.save(target)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [DESCRIPTION_NAME, TENSORS_NAME, "manifest.json"])
@pytest.mark.parametrize("damage", ["bit", "truncated", "missing", "empty"])
def test_damage_is_found(adapter: Adapter, tmp_path: Path, name: str, damage: str) -> None:
    folder = adapter.save(tmp_path / "adapter")
    path = folder / name
    if damage == "bit":
        flip_a_bit(path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[: math.ceil(path.stat().st_size / 2)])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(CheckpointError):
        Adapter.load(folder)


def test_there_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        Adapter.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=2), r"has form 2, and lawcat .* reads form 1"),
        (lambda d: d.pop("base_name"), "a field is missing or unknown.*base_name"),
        (lambda d: d.update(colour="red"), "a field is missing or unknown.*colour"),
        (lambda d: d.pop("softmax_layers"), "a field is missing or unknown.*softmax_layers"),
    ],
)
def test_a_description_of_another_form(adapter: Adapter, tmp_path: Path, change: Any, message: str) -> None:
    folder = adapter.save(tmp_path / "adapter")
    path = folder / DESCRIPTION_NAME
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    write_manifest(folder)
    with pytest.raises(CheckpointError, match=message):
        Adapter.load(folder)
    path.write_text("[]")
    write_manifest(folder)
    with pytest.raises(CheckpointError, match="has form None"):
        Adapter.load(folder)


def test_the_file_is_plain_safetensors_in_float32(adapter: Adapter, tmp_path: Path) -> None:
    tensors = {name: tensor.t() if tensor.ndim == 2 else tensor for name, tensor in adapter.tensors.items()}
    folder = dataclasses.replace(adapter, tensors=tensors).save(tmp_path / "transposed")
    for name, tensor in load_file(folder / TENSORS_NAME).items():
        assert torch.equal(tensor, tensors[name])
    save_file({}, folder / TENSORS_NAME)
    with pytest.raises(CheckpointError, match="damaged"):
        Adapter.load(folder)
