"""Prefill of a student against its teacher by SDPA, in one run: `python benchmarks/prefill.py 8192 16384`.

The student is the untrained conversion: what it computes does not depend on its values.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from lawcat.convert.initialize import convert
from lawcat.convert.teacher import load_teacher


def seconds(model: Any, tokens: torch.Tensor) -> float:
    """Return the wall time of one prefill."""
    started = time.perf_counter()
    model(tokens, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - started


@torch.no_grad()
def main() -> None:
    """Print a line a length."""
    source = load_teacher("smollm2-135m-instruct").source
    teacher = load_teacher(source, attn_implementation="sdpa").model
    student, _ = convert(load_teacher(source).model)
    for length in map(int, sys.argv[1:]):
        tokens = torch.randint(3, 40000, (1, length), generator=torch.Generator().manual_seed(0))
        for model in (teacher, student):
            seconds(model, tokens[:, :512])  # warm-up
        times = [(seconds(teacher, tokens), seconds(student, tokens)) for _ in range(2)]
        best = [min(pair) for pair in zip(*times, strict=True)]
        print(
            f"{length}: teacher {best[0]:.1f} s, student {best[1]:.1f} s, ratio {best[0] / best[1]:.2f}",
            flush=True,
        )


main()
