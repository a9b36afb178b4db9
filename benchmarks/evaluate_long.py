"""Evaluation of a student against its teacher by SDPA, in one run.

`python benchmarks/evaluate_long.py smollm2-135m-instruct STUDENT 22528 3`: the length in tokens, and how
many samples of passkey. Both models answer the same samples, as `lawcat eval` runs them; only the time that
a model is at work counts. The student need not be trained: what it computes does not depend on its values,
but for the number of tokens that it says, up to ten a sample.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from lawcat.convert.load import load_model
from lawcat.evaluation.attention import set_attention
from lawcat.evaluation.lengths import parse_length
from lawcat.evaluation.runner import CellResult, evaluate
from lawcat.evaluation.samples import SampleCache


def run(
    name: str, length: int, samples: int, task: str, dtype: torch.dtype, cache: SampleCache
) -> CellResult:
    """Return the cell of a model after a short warm-up."""
    loaded = load_model(name, dtype=dtype)
    attention = set_attention(loaded.model, "sdpa")
    evaluate(loaded.model, loaded.tokenizer, tasks=[task], lengths=[512], samples=1)
    started = time.perf_counter()
    result = evaluate(
        loaded.model, loaded.tokenizer, tasks=[task], lengths=[length], samples=samples, sample_cache=cache
    )
    cell = result.cells[0]
    found = cell.to_json()
    print(
        f"{name} ({attention}): {found['seconds']:.1f} s for {samples} samples of "
        f"{found['mean_tokens']:.0f} tokens, {found['tokens_per_second']:.0f} tokens/s, "
        f"{sum(record.num_new_tokens for record in cell.records)} tokens said, "
        f"{(found['state_bytes'] or 0) / 1e6:.1f} MB kept of a sequence, "
        f"accuracy {found['accuracy']}, errors {found['errors']}; "
        f"{time.perf_counter() - started:.1f} s in all, {result.settings}",
        flush=True,
    )
    return cell


def main() -> None:
    """Print a line a model, and how many times as fast the student is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("length", type=parse_length)
    parser.add_argument("samples", type=int)
    parser.add_argument("--task", default="passkey")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    given = parser.parse_args()
    cache = SampleCache()
    seconds = []
    for name in (given.teacher, given.student):
        cell = run(
            name, given.length, given.samples, given.task, getattr(torch, given.dtype), cache
        ).to_json()
        if cell["errors"]:
            sys.exit(f"{name}: {cell['errors']} samples crashed, so there is nothing to compare")
        seconds.append(cell["seconds"])
    print(f"ratio {seconds[0] / seconds[1]:.2f} at {given.length} tokens")


main()
