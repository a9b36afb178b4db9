"""Tells transformers' Auto classes about lawcat, without importing transformers for it.

``import lawcat`` has to make ``AutoModelForCausalLM.from_pretrained`` know the model, and ``lawcat --help`` has to
answer at once. So: where transformers' auto module is loaded already, register now; else register at the moment
somebody loads it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_AUTO_MODULE = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Register ``LawcatConfig`` and the two model classes with the Auto classes now; harmless to repeat."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from lawcat.model.configuration_lawcat import LawcatConfig
    from lawcat.model.modeling_lawcat import LawcatForCausalLM, LawcatModel

    AutoConfig.register("lawcat", LawcatConfig, exist_ok=True)
    AutoModel.register(LawcatConfig, LawcatModel, exist_ok=True)
    AutoModelForCausalLM.register(LawcatConfig, LawcatForCausalLM, exist_ok=True)


class _RegisterAfterLoading(importlib.abc.Loader):
    """The auto module's own loader, followed by ``register``."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        register()


class _AutoModuleFinder(importlib.abc.MetaPathFinder):
    """Finds nothing but the auto module, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfterLoading(spec.loader)
        return spec


def register_when_transformers_loads() -> None:
    """Register now if transformers' auto module is loaded, else as soon as it is."""
    if _AUTO_MODULE in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AutoModuleFinder())
