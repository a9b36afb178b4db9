"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import lawcat.bench

MODULES = [
    module.name for module in pkgutil.iter_modules(lawcat.bench.__path__, "lawcat.bench.") if not module.ispkg
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
