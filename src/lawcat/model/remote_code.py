"""The model's code beside its weights, so that transformers loads a student where lawcat is not installed.

transformers copies the files that a saved configuration names and what these import from the same folder, one
dot deep. So the modules of ``model`` and ``ops`` that the model needs are written side by side:
``lawcat.ops.backend`` as ``lawcat_ops_backend.py``, and ``from ..ops.backend import x`` as ``from
.lawcat_ops_backend import x``. Where lawcat is imported its own classes are used, and these files are not
looked at.

The kernels stay in lawcat: in place of ``ops/triton`` is one file that says so, and the forms in PyTorch run.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

from .. import __version__
from ..errors import CheckpointError

AUTO_MAP = {
    "AutoConfig": "configuration_lawcat.LawcatConfig",
    "AutoModel": "modeling_lawcat.LawcatModel",
    "AutoModelForCausalLM": "modeling_lawcat.LawcatForCausalLM",
}
_ENTRANCE = "lawcat.model.modeling_lawcat"
# These two keep their names, by which transformers' users know what they are.
_FILE_NAMES = {_ENTRANCE: "modeling_lawcat", "lawcat.model.configuration_lawcat": "configuration_lawcat"}
_KERNELS = "lawcat.ops.triton"
# In place of all of its files. What functions import from them is looked for here, and not reached.
_NO_KERNELS = '''"""The fused kernels are in the package lawcat; without it the forms in PyTorch run."""

from types import SimpleNamespace


def _missing(*unused: object, **unused_too: object) -> str:
    return "the kernels come with the package lawcat, which is not installed"


support = SimpleNamespace(missing=_missing, unsupported_because=_missing)
'''
_HEADER = f"# Written by lawcat {__version__} (Apache-2.0); the original is in its package.\n"


def write_remote_code(directory: str | Path) -> list[Path]:
    """Write the model's code into a saved model's folder and name it in its configuration.

    ``AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`` works without lawcat then.

    Args:
        directory: A folder that ``save_pretrained`` has written; files of an earlier call are replaced.

    Returns:
        The files of code.

    Raises:
        CheckpointError: where the folder holds no configuration of a lawcat model.
    """
    place = Path(directory)
    config_path = place / "config.json"
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config_path} cannot be read: {error}. Save the model first.") from error
    if not isinstance(config, dict) or config.get("model_type") != "lawcat":
        raise CheckpointError(f"{config_path} is not the configuration of a lawcat model.")

    written = []
    for name, source in _flat_modules().items():
        written.append(place / f"{name}.py")
        written[-1].write_text(source, encoding="utf-8")
    config["auto_map"] = AUTO_MAP
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return written


def _flat_modules() -> dict[str, str]:
    """Return the sources of the model's module and of all it imports from lawcat, by their flat names."""
    sources: dict[str, str] = {}
    waiting = [_ENTRANCE]
    while waiting:
        module = waiting.pop()
        if _flat_name(module) not in sources:
            sources[_flat_name(module)], imported = _flatten(module)
            waiting += imported
    return sources


def _flat_name(module: str) -> str:
    if _is_of_kernels(module):
        return _KERNELS.replace(".", "_")
    return _FILE_NAMES.get(module, module.replace(".", "_"))


def _is_of_kernels(module: str) -> bool:
    return f"{module}.".startswith(f"{_KERNELS}.")


def _flatten(module: str) -> tuple[str, list[str]]:
    """Return a module's source with flat relative imports, and the modules these are of."""
    if _is_of_kernels(module):
        return _HEADER + _NO_KERNELS, []
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    imported = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        # A name imported from a package would be a module or not; ours import from modules only.
        assert node.module is not None
        written = "." * node.level + node.module
        name = importlib.util.resolve_name(written, module.rpartition(".")[0])
        imported.append(name)
        line = node.lineno - 1
        lines[line] = lines[line].replace(f"from {written} import", f"from .{_flat_name(name)} import", 1)
    return _HEADER + "".join(lines), imported
