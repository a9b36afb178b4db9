"""The decoding kernel on a GPU: correctness, then time: `python benchmarks/kernel_decode.py out.json`.

Beside it the same step in plain PyTorch, and what reading and writing the state alone would take.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lawcat.bench.environment import environment
from lawcat.bench.mixers import (
    Context,
    MixerInputs,
    linear_reference,
    mixer_inputs,
    operator_inputs,
    random_context,
    step_by_torch,
    step_by_triton,
)
from lawcat.bench.operators import relative_error
from lawcat.bench.shapes import MixerShape
from lawcat.bench.timing import Timing, free_memory, time_by_turns
from lawcat.ops import gated_linear_attention_reference

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DEVICE = torch.device("cuda")


def shapes() -> list[MixerShape]:
    """Return the shapes of Llama-3.2-1B and Mistral-7B, with a state a query head and a kv head."""
    wide = [MixerShape(f"H 32, G 8, D {width}", 32, 8, width, width) for width in (64, 128)]
    return wide + [replace(shape, name=shape.name + ", kv", state_heads="kv") for shape in wide]


def state_bytes(shape: MixerShape, batch: int) -> int:
    """Return the bytes of the state of so many sequences."""
    return batch * shape.num_state_heads * shape.feature_dim * (shape.head_dim + 1) * 4


def step_with(shape: MixerShape, batch: int, dtype: torch.dtype) -> tuple[MixerInputs, Context]:
    """Return one token's inputs and what precedes it."""
    inputs = mixer_inputs(shape, batch=batch, tokens=1, dtype=dtype, device=DEVICE, seed=batch)
    return inputs, random_context(inputs, 1, seed=batch)


def check(shape: MixerShape, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compare the kernel with the definition in float64, its output poisoned, and time its first call."""
    inputs, context = step_with(shape, batch, dtype)
    exact = context.double()
    expected = linear_reference(inputs.map(Tensor.double), exact)
    torch.cuda.synchronize()
    started = time.perf_counter()
    output = step_by_triton(inputs, context)()  # its output is NaN before
    torch.cuda.synchronize()
    first_s = time.perf_counter() - started
    state_error = relative_error(context.state, _state_after(inputs.map(Tensor.double), exact))
    return {
        "error": relative_error(output, expected),
        "state_error": state_error,
        "first_call_s": first_s,
    }


def _state_after(inputs: MixerInputs, context: Context) -> Tensor:
    return gated_linear_attention_reference(*operator_inputs(inputs, context), initial_state=context.state)[1]


def main() -> None:
    """Check, time, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="JSON file")
    parser.add_argument("--seconds", type=float, default=0.1, help="a cell")
    parser.add_argument("--bytes-per-s", type=float, default=3e12, help="memory rate of the bound")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this needs a GPU")
    rows: list[dict[str, Any]] = []
    for shape in shapes():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for batch in (1, 3):
                found = check(shape, batch, dtype)
                limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
                is_right = found["error"] <= limit and found["state_error"] <= 1e-5
                print(shape.name, dtype, batch, found, "ok" if is_right else "WRONG", flush=True)
                if not is_right:
                    sys.exit(f"{shape.name}, {dtype}: wrong; no figure")
        for batch in BATCHES:
            rows.append(_timed(shape, batch, options.seconds, options.bytes_per_s))
            free_memory()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        json.dumps({"environment": environment(DEVICE, torch.bfloat16), "rows": rows}, indent=1)
    )
    print("\nbfloat16; microseconds; bound: the state read and written once")
    print(
        f"{'shape':<24}{'batch':>6}{'kernel':>9}{'graph':>9}{'torch':>9}{'graph':>9}{'bound':>9}{'graph/bound':>13}"
    )
    for row in rows:
        cells = [row[name] for name in ("kernel", "kernel_graph", "torch", "torch_graph", "bound")]
        shown = "".join(f"{'-':>9}" if cell is None else f"{cell * 1e6:9.1f}" for cell in cells)
        ratio = row["kernel_graph"] / row["bound"] if row["kernel_graph"] else float("nan")
        print(f"{row['shape']:<24}{row['batch']:>6}{shown}{ratio:13.2f}")


def _timed(shape: MixerShape, batch: int, seconds: float, bytes_per_s: float) -> dict[str, Any]:
    inputs, context = step_with(shape, batch, torch.bfloat16)
    functions = {"kernel": step_by_triton(inputs, context), "torch": step_by_torch(inputs, context)}
    row: dict[str, Any] = {
        "shape": shape.name,
        "batch": batch,
        "bound": 2 * state_bytes(shape, batch) / bytes_per_s,
    }
    with torch.no_grad():
        for is_graph in (False, True):
            found = time_by_turns(functions, DEVICE, seconds=seconds, cuda_graphs=is_graph)
            for name, timing in found.items():
                key = name + ("_graph" if is_graph else "")
                row[key] = timing.median_s if isinstance(timing, Timing) else None
                if isinstance(timing, Timing):
                    row[key + "_quartiles"] = timing.quartiles_s
                else:
                    print(f"{shape.name}, batch {batch}, {key}: {timing.reason}", flush=True)
    return row


if __name__ == "__main__":
    main()
