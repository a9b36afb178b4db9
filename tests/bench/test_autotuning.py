"""What an autotuner is to choose from is compiled before it chooses."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from lawcat.bench import autotuning


class Candidate:
    def __init__(self, block: int) -> None:
        self.block = block

    def all_kwargs(self) -> dict[str, int]:
        return {"BLOCK": self.block}


@pytest.mark.parametrize("fails", [False, True])
def test_all_candidates_are_compiled_and_none_is_launched(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    compiled: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    class Tuner:
        def __init__(self) -> None:
            self.fn, self.base_fn = self, test_all_candidates_are_compiled_and_none_is_launched
            self.nargs = {"x": 7}

        def prune_configs(self, kwargs: dict[str, Any]) -> list[Candidate]:
            return [Candidate(16), Candidate(32)]

        def run(self, *args: Any, **kwargs: Any) -> None:
            compiled.append((args, kwargs))
            if fails:
                raise RuntimeError("out of shared memory")

    modules = {
        "triton.runtime._async_compile": SimpleNamespace(AsyncCompileMode=contextlib.nullcontext),
        "triton.runtime.autotuner": SimpleNamespace(Autotuner=Tuner),
    }
    monkeypatch.setattr(autotuning, "import_module", modules.__getitem__)
    autotuning.compile_candidates_together.__wrapped__()
    found = Tuner().prune_configs({"grid": (1,), "warmup": False})
    assert [candidate.block for candidate in found] == [16, 32]
    expected = [((7,), {"grid": (1,), "warmup": True, "BLOCK": block}) for block in (16, 32)]
    assert compiled == expected[: 1 if fails else 2]
