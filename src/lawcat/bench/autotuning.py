"""Triton's autotuner, when it is another library's."""

from __future__ import annotations

import functools
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

_LOGGER = logging.getLogger(__name__)


@functools.cache
def compile_candidates_together() -> None:
    """Let Triton's autotuner compile in threads what it is to choose from, from now on in this process.

    What it chooses is its own affair. One after the other, the candidates of fla's ``chunk_gla`` took more
    than 330 seconds for one shape, forward and backward; side by side on 16 cores 90.
    """
    modes = import_module("triton.runtime._async_compile")
    tuner = import_module("triton.runtime.autotuner").Autotuner
    prune_configs = tuner.prune_configs

    def compile_and_prune(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        candidates: list[Any] = prune_configs(self, kwargs)
        start = time.perf_counter()
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool, modes.AsyncCompileMode(pool):
                for candidate in candidates:
                    options = {**kwargs, "warmup": True, **candidate.all_kwargs()}
                    self.fn.run(*self.nargs.values(), **options)
        except Exception as error:  # it skips what does not compile, and says so itself where nothing does
            _LOGGER.info("%s: %s", self.base_fn.__name__, error)
        seconds = time.perf_counter() - start
        _LOGGER.info("%s: %d candidates in %.1f s", self.base_fn.__name__, len(candidates), seconds)
        return candidates

    tuner.prune_configs = compile_and_prune
