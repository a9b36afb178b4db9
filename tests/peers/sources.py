"""Makes the fetched suites importable, each as a package, with stand-ins for what no archive holds."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
from fetch import folder_of


def import_suite(
    package: str, module: str, stand_ins: dict[str, dict[str, object]] | None = None
) -> ModuleType:
    """Return a module of the package's tests; skip the calling module where they were not fetched.

    Args:
        package: ``"transformers"`` or ``"peft"``.
        module: A module of its ``tests`` folder.
        stand_ins: Modules that the folder lacks, by their dotted path in it: the names they have to hold.
    """
    folder = folder_of(package)
    if not (folder / f"{module}.py").is_file():
        pytest.skip(f"{folder} is not there; python tests/peers/fetch.py gets it", allow_module_level=True)
    suite = f"{package}_test_suite"
    if suite not in sys.modules:
        root = sys.modules[suite] = ModuleType(suite)
        root.__path__ = [str(folder)]
    for path, names in (stand_ins or {}).items():
        parent, _, _ = f"{suite}.{path}".rpartition(".")
        for name in (parent, f"{suite}.{path}"):
            if name not in sys.modules:
                sys.modules[name] = ModuleType(name)
        vars(sys.modules[f"{suite}.{path}"]).update(names)
    return importlib.import_module(f"{suite}.{module}")
