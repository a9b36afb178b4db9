"""A student that carries its code loads where lawcat is not installed, and computes the same."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_variants import VARIANTS, model_of, random_tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lawcat import LawcatConfig, LawcatForCausalLM, LawcatModel
from lawcat.errors import CheckpointError
from lawcat.model.remote_code import write_remote_code

# Neither lawcat nor triton can be imported, as if they were not installed.
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lawcat", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Block())
try:
    import lawcat
    sys.exit("lawcat is not blocked")
except ModuleNotFoundError:
    pass
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("student")
    window = {"sliding_window": 5, "num_sinks": 2}
    projections = {"attention_bias": True, "attention_output_bias": False, "use_qk_norm": True}
    model = model_of(VARIANTS["hybrid"] | window | projections, torch.float32)
    model.save_pretrained(place)
    write_remote_code(place)
    tokens = random_tokens(1, 20)
    torch.save({"tokens": tokens, "logits": model(tokens).logits.detach()}, place / "expected.pt")
    return place


def python(code: str, *arguments: object, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )


def test_it_loads_without_lawcat(saved: Path, tmp_path: Path) -> None:
    """And is saved with its code, loads again from there, and generates."""
    code = (
        BLOCK
        + """
import torch
from pathlib import Path
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
place, again = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
expected = torch.load(place / "expected.pt")
tokens = expected["tokens"]
for directory in (place, again):
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    assert type(config).__name__ == "LawcatConfig"
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    assert torch.equal(model(tokens).logits, expected["logits"])
    base = AutoModel.from_pretrained(directory, trust_remote_code=True)
    assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=5, do_sample=False)
    generated = model.generate(tokens, **options)
    assert torch.equal(generated, model.generate(tokens, use_cache=False, **options))
    model.save_pretrained(again)
    half = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.bfloat16)
    assert half.model.layers[0].self_attn.decay_gate.bias.dtype == torch.float32
    assert half.model.layers[0].self_attn.q_norm.weight.dtype == torch.bfloat16
assert "lawcat" not in sys.modules
"""
    )
    result = python(code, saved, tmp_path / "again", cache=tmp_path / "modules")
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_kernels_are_not_there_without_lawcat(tmp_path: Path) -> None:
    """Also with triton: 'auto' is PyTorch, and who asks for the kernels is told where they are."""
    place = tmp_path / "student"
    model_of(VARIANTS["paper"], torch.float32).save_pretrained(place)
    write_remote_code(place)
    code = (
        BLOCK.replace('("lawcat", "triton")', '("lawcat",)')
        + """
import importlib, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
backend = importlib.import_module(type(model).__module__.replace("modeling_lawcat", "lawcat_ops_backend"))
assert backend.choose_backend("auto", "cuda") == "torch"
tokens = torch.tensor([[3, 4, 5]])
with backend.use_backend("torch"):
    model(tokens)
with backend.use_backend("triton"):
    model(tokens)
"""
    )
    result = python(code, place, cache=tmp_path / "modules")
    assert result.returncode != 0
    assert "BackendError: use_backend='triton' cannot run: the kernels come with the package lawcat" in (
        result.stderr
    )


def test_it_is_not_run_without_trust(saved: Path, tmp_path: Path) -> None:
    code = BLOCK + "from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1])"
    result = python(code, saved, cache=tmp_path / "modules")
    assert result.returncode != 0
    assert "trust_remote_code" in result.stderr
    assert not (tmp_path / "modules").exists()


@pytest.mark.parametrize("trust", [None, False, True])
def test_where_lawcat_is_imported_its_own_classes_win(saved: Path, trust: bool | None) -> None:
    options = {} if trust is None else {"trust_remote_code": trust}
    assert type(AutoConfig.from_pretrained(saved, **options)) is LawcatConfig
    assert type(AutoModelForCausalLM.from_pretrained(saved, **options)) is LawcatForCausalLM
    assert type(AutoModel.from_pretrained(saved, **options)) is LawcatModel


def test_the_configuration_names_the_classes(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_lawcat.LawcatConfig",
        "AutoModel": "modeling_lawcat.LawcatModel",
        "AutoModelForCausalLM": "modeling_lawcat.LawcatForCausalLM",
    }
    assert config["model_type"] == "lawcat"
    for reference in config["auto_map"].values():
        module, name = reference.split(".")
        assert re.search(rf"^class {name}\b", (saved / f"{module}.py").read_text(), re.MULTILINE)


def test_every_import_is_of_a_file_beside_it_or_of_a_dependency(saved: Path) -> None:
    files = list(saved.glob("*.py"))
    assert {"configuration_lawcat.py", "modeling_lawcat.py"} < {path.name for path in files}
    packages = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                packages.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                packages.add(node.module.partition(".")[0])
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1
                assert (saved / f"{node.module}.py").exists(), f"{path.name} imports {node.module}"
    assert packages - sys.stdlib_module_names == {"huggingface_hub", "torch", "transformers"}


def test_only_what_the_model_needs_is_written(saved: Path) -> None:
    names = {path.name for path in saved.glob("*.py")}
    assert "lawcat_ops_chunked.py" in names
    assert [name for name in names if "triton" in name] == ["lawcat_ops_triton.py"]
    assert not any("remote_code" in name or "register" in name for name in names)


def test_writing_twice_is_writing_once(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    files = write_remote_code(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert {path.name for path in files} == {path.name for path in saved.glob("*.py")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config\.json cannot be read: .*Save the model first"),
        ("{", r"config\.json cannot be read"),
        ("[]", "is not the configuration of a lawcat model"),
        ('{"model_type": "llama"}', "is not the configuration of a lawcat model"),
    ],
)
def test_a_folder_without_a_lawcat_model(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        write_remote_code(tmp_path)
    assert not list(tmp_path.glob("*.py"))
