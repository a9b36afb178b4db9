"""The suites of other packages mark their tests with marks of their own."""

from __future__ import annotations

import re

import pytest
from fetch import PACKAGES, folder_of


def pytest_configure(config: pytest.Config) -> None:
    for package in PACKAGES:
        for path in folder_of(package).glob("*.py"):
            for name in set(re.findall(r"\bmark\.(\w+)", path.read_text(encoding="utf-8"))):
                config.addinivalue_line("markers", f"{name}: a mark of {package}")
