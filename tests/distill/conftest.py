"""What the tests of whole runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def module_patch() -> Iterator[pytest.MonkeyPatch]:
    """A monkeypatch that lasts as long as a module's tests."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch
