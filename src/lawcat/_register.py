"""Tells transformers' Auto classes about lawcat, without importing transformers for it.

``import lawcat`` has to make ``AutoConfig`` and ``AutoModelForCausalLM`` know the model, in whatever order
things are imported, and ``lawcat --help`` has to answer at once. So: where transformers' auto modules are
loaded already, register now; else at the moment each of them is.

That moment may lie in the middle of an import: transformers' own modules load the auto modules before they
are complete. The configuration class needs nothing that could still be missing then. The model classes do, so
that stand-ins are registered, which import the classes when they are asked for anything.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def _register_config(auto_module: Any) -> None:
    from lawcat.model.configuration_lawcat import LawcatConfig

    auto_module.AutoConfig.register("lawcat", LawcatConfig, exist_ok=True)


def _register_models(auto_module: Any) -> None:
    from lawcat.model.configuration_lawcat import LawcatConfig

    for auto_name, name in (("AutoModel", "LawcatModel"), ("AutoModelForCausalLM", "LawcatForCausalLM")):
        auto_class = getattr(auto_module, auto_name)
        auto_class.register(LawcatConfig, _StandIn(auto_class, LawcatConfig, name), exist_ok=True)


_REGISTER_IN = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
}


class _StandIn:
    """Stands for a model class until it is asked for anything; then registers the class itself."""

    def __init__(self, auto_class: Any, config_class: Any, name: str) -> None:
        self._auto_class, self.config_class, self._name = auto_class, config_class, name

    def __getattr__(self, attribute: str) -> Any:
        from lawcat.model import modeling_lawcat

        model_class = getattr(modeling_lawcat, self._name)
        self._auto_class.register(self.config_class, model_class, exist_ok=True)
        return getattr(model_class, attribute)


class _ThenRegister(importlib.abc.Loader):
    """A module's own loader, followed by the registration in that module."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _REGISTER_IN[module.__name__](module)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._loader, attribute)


class _AutoModuleFinder(importlib.abc.MetaPathFinder):
    """Finds the auto modules and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _REGISTER_IN:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def register_when_transformers_loads() -> None:
    """Register in the auto modules that are loaded, and in the others as soon as they are."""
    for name, register in _REGISTER_IN.items():
        if name in sys.modules:
            register(sys.modules[name])
    if not any(isinstance(finder, _AutoModuleFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoModuleFinder())
