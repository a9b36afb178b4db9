# ruff: noqa: F401
"""lawcat: turn a pretrained transformer into a linear-attention model.

``import lawcat`` is cheap: names are resolved when they are first used. Importing it makes
``AutoModelForCausalLM.from_pretrained`` know lawcat's checkpoints (see ``_register``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lawcat._register import register_when_transformers_loads

__version__ = "0.1.0"

_EXPORTS = {
    "LawcatConfig": "lawcat.model.configuration_lawcat",
    "LawcatForCausalLM": "lawcat.model.modeling_lawcat",
    "LawcatModel": "lawcat.model.modeling_lawcat",
    "LawcatCache": "lawcat.model.cache",
    "LawcatError": "lawcat.errors",
    "linearize": "lawcat.distill.linearize",
    "load_model": "lawcat.convert.load",
    "evaluate": "lawcat.evaluation.runner",
}

__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from lawcat.convert.load import load_model
    from lawcat.distill.linearize import linearize
    from lawcat.errors import LawcatError
    from lawcat.evaluation.runner import evaluate
    from lawcat.model.cache import LawcatCache
    from lawcat.model.configuration_lawcat import LawcatConfig
    from lawcat.model.modeling_lawcat import LawcatForCausalLM, LawcatModel


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lawcat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


register_when_transformers_loads()
