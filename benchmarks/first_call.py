"""How long a whole model's first prefill and first training step take where nothing is compiled yet.

`python benchmarks/first_call.py --shapes smollm2-135m,llama-3.2-1b` starts a process for each, with Triton's
cache in an empty folder; weights are random and on the GPU before the clock starts. A process does the same
again, so that the difference is what compiling costs. `--tiny` tries the script out without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from training_speed import make_stage, make_step, random_batch

from lawcat.bench.models import random_pair
from lawcat.bench.timing import synchronize
from lawcat.ops import choose_backend

PARTS = ("prefill", "stage1", "stage2")


def prefill(shape: str, tokens: int, device: torch.device) -> Callable[[], object]:
    """Return a forward of one prompt that fills the state, as generation does first."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_pair(shape, dtype=dtype, device=device).student.eval()
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), device=device)

    def run() -> object:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1, 0].item()

    return run


def training(number: int, shape: str, tokens: int, device: torch.device) -> Callable[[], object]:
    """Return a step of a stage as training does it: 16 sequences of at most 1,024 tokens."""
    tokens = min(tokens, 1024)
    stage = make_stage(number, tokens, shape, device)
    return make_step(stage, random_batch(stage, 16 if tokens == 1024 else 2, tokens), device, "graph")


def measure(part: str, shape: str, tokens: int) -> dict[str, object]:
    """Return the seconds of the first call, the second and the fastest of the next five."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = (
        prefill(shape, tokens, device)
        if part == "prefill"
        else training(int(part[-1]), shape, tokens, device)
    )
    seconds = []
    for _ in range(7):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    backend = choose_backend("auto", device.type)
    return {
        "part": part, "shape": shape, "tokens": tokens, "device": name, "backend": backend,
        "first_s": seconds[0], "second_s": seconds[1], "fastest_s": min(seconds[2:]),
    }  # fmt: skip


def main() -> None:
    """Print a row a process; one that fails leaves its message."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="smollm2-135m,llama-3.2-1b", help="as lawcat bench --shape")
    parser.add_argument("--parts", default=",".join(PARTS), help="of them, which")
    parser.add_argument(
        "--tokens", type=int, default=2048, help="of the prompt; of a training sequence 1,024"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a try on a CPU")
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--here", help=argparse.SUPPRESS)  # one part in this process
    options = parser.parse_args()
    if options.tiny:
        options.shapes, options.tokens = "tiny", 64
    if options.here:
        print(json.dumps(measure(options.here, options.shapes, options.tokens)))
        return
    rows = []
    for shape in options.shapes.split(","):
        for part in options.parts.split(","):
            with tempfile.TemporaryDirectory() as folder:
                command = [
                    sys.executable,
                    __file__,
                    "--here",
                    part,
                    "--shapes",
                    shape,
                    "--tokens",
                    str(options.tokens),
                ]
                found = subprocess.run(
                    command, env={**os.environ, "TRITON_CACHE_DIR": folder}, stdout=subprocess.PIPE, text=True
                )
            if found.returncode:
                print(f"{shape}, {part}: failed with {found.returncode}", flush=True)
                continue
            row = json.loads(found.stdout.splitlines()[-1])
            rows.append(row)
            print(
                f"{shape}, {part}, {row['backend']}: first {row['first_s']:.1f} s, "
                f"second {row['second_s']:.2f} s, "
                f"then {row['fastest_s'] * 1e3:.0f} ms",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
