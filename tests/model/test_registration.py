"""``import lawcat`` is cheap and makes transformers know the model, whatever is imported first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from small_models import make_model

# Each loads transformers' modules in another order, some of them while others are half loaded.
ORDERS = [
    "import lawcat; from transformers import AutoConfig",
    "import lawcat; from transformers import AutoModelForCausalLM",
    "import lawcat; from transformers import LlamaForCausalLM",
    "import lawcat; import transformers.modeling_utils",
    "from transformers import AutoConfig; import lawcat",
    "from transformers import AutoModelForCausalLM; import lawcat",
    "from lawcat import LawcatForCausalLM",
    "from lawcat import LawcatConfig",
    # Looking for a module without loading it must not use the registration up.
    "import lawcat, importlib.util as u; u.find_spec('transformers.models.auto.modeling_auto')",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    return path


def python(code: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_import_lawcat_imports_neither_torch_nor_transformers() -> None:
    code = """
import sys, lawcat
heavy = {"torch", "transformers", "huggingface_hub", "numpy", "triton", "peft"} & set(sys.modules)
assert not heavy, heavy
assert "LawcatForCausalLM" in dir(lawcat)
"""
    python(code)


# One process for all orders, which forks for each: torch is loaded once then.
TRY_EACH = """
import os, sys, torch
for order in sys.argv[2:]:
    if pid := os.fork():
        if os.waitpid(pid, 0)[1]:
            sys.exit(f"failed: {order}")
        continue
    exec(order)
    from transformers import AutoConfig
    config = AutoConfig.from_pretrained(sys.argv[1])
    from transformers import AutoModel, AutoModelForCausalLM
    from lawcat import LawcatConfig, LawcatForCausalLM, LawcatModel
    assert type(config) is LawcatConfig
    assert type(AutoModelForCausalLM.from_config(config)) is LawcatForCausalLM
    assert type(AutoModel.from_config(config)) is LawcatModel
    assert AutoModelForCausalLM._model_mapping[LawcatConfig] is LawcatForCausalLM
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_order_of_imports(directory: Path) -> None:
    python(TRY_EACH, str(directory), *ORDERS)


def test_auto_config_alone_loads_no_model(directory: Path) -> None:
    code = """
import sys, lawcat
from transformers import AutoConfig
assert type(AutoConfig.from_pretrained(sys.argv[1])).__name__ == "LawcatConfig"
assert "lawcat.model.modeling_lawcat" not in sys.modules
"""
    python(code, str(directory))
