"""The fused mixer on one GPU: is it right, how fast is it, what takes the time.

    python benchmarks/kernel_mixer.py --parts correctness,forward,split,first
    python benchmarks/kernel_mixer.py --parts sweep --lengths 2048,32768
    python benchmarks/kernel_mixer.py --parts training

"Mixer" is everything between the projections and W_o: convolution of q and k, feature map, gate, recurrence,
division. Against PyTorch's SDPA with the flash backend on the same q, k and v, in the same run; medians of
``--repeats`` calls, eager and replayed from CUDA graphs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lawcat.ops.fused import linear_attention_mixer
from lawcat.ops.triton import mixer as kernels
from lawcat.ops.triton.configurations import Configuration, Tuning, choose_configuration, sub_block_tokens

RESULTS: dict[str, Any] = {}


@dataclass(frozen=True)
class Shape:
    """Sizes of one call."""

    tokens: int
    width: int = 64
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    dtype: torch.dtype = torch.bfloat16

    def tensors(self, device: str = "cuda") -> dict[str, Tensor]:
        """Return inputs as a trained layer might see them: gates from half-lives of 16 to 30,000 tokens."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*size, generator=generator, device=device)

        b, t, h, g, d = self.batch, self.tokens, self.heads, self.kv_heads, self.width
        taps = torch.tensor([0.001, 0.001, 0.001, 1.0], device=device)
        return {
            "q": (2 * normal(b, t, h, d)).to(self.dtype),
            "k": (2 * normal(b, t, g, d)).to(self.dtype),
            "v": normal(b, t, g, d).to(self.dtype),
            "gate": normal(b, t, g, d) + torch.linspace(0, 8, d, device=device),
            "map_weight": torch.eye(d, d // 2, device=device) + normal(h, d, d // 2, scale=0.1),
            "q_taps": taps + normal(h * d, 4, scale=0.1),
            "k_taps": taps + normal(h * d, 4, scale=0.1),
        }


def run_kernels(
    tensors: dict[str, Tensor], configuration: Configuration | None = None
) -> dict[str, Tensor | None]:
    """Run the forward kernels, with a configuration of one's own if wanted."""
    inputs = kernels.MixerInputs(**tensors, num_state_heads=tensors["map_weight"].shape[0])
    options = kernels.MixerOptions(is_logit=True, configuration=configuration)
    return kernels.forward(kernels.make_plan(inputs, options))


def milliseconds(function: Callable[[], object], repeats: int, *, graph: bool) -> dict[str, float]:
    """Return the median and the quartiles of the time of a call, by CUDA events."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    call = function
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            function()
        call = captured.replay
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(stop) for start, stop in events)
    return {
        "median": statistics.median(times),
        "low": times[len(times) // 4],
        "high": times[3 * len(times) // 4],
    }


def kernel_split(function: Callable[[], object], repeats: int = 10) -> dict[str, float]:
    """Return the microseconds of each kernel of a call, by the profiler."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    rows = [(event.key, event.device_time_total / repeats) for event in profile.key_averages()]
    return {name: round(time_, 1) for name, time_ in sorted(rows, key=lambda row: -row[1]) if time_ > 0}


def relative_error(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """Return the largest and the root-mean-square difference, relative to the same of what is expected."""
    difference = actual.double() - expected.double()
    if not torch.isfinite(difference).all():
        return {"max": float("nan"), "rms": float("nan")}
    return {
        "max": (difference.abs().max() / expected.abs().max()).item(),
        "rms": (difference.square().mean() / expected.double().square().mean()).sqrt().item(),
    }


def correctness(arguments: argparse.Namespace) -> None:
    """Compare with PyTorch operations in float64; beside it, those in the inputs' own precision."""
    print("\n# correctness: relative error against float64 (max / rms)")
    rows = []
    for width, dtype, tokens in itertools.product(
        arguments.widths, (torch.bfloat16, torch.float32), (1000, 8192)
    ):
        shape = Shape(tokens, width, heads=8, kv_heads=2, dtype=dtype)
        tensors = shape.tensors()
        if tokens == 1000:  # every channel as strong as the bound allows, and nearly none, in turn
            tensors["gate"] = torch.where(torch.rand_like(tensors["gate"]) < 0.5, -100.0, 20.0)
        double = {name: t.double() for name, t in tensors.items()}
        expected = linear_attention_mixer(**double, backend="torch")
        torch_form = linear_attention_mixer(**tensors, backend="torch")
        allocate, kernels.allocate = kernels.allocate, poisoned
        result = run_kernels(tensors)
        kernels.allocate = allocate
        for what, ours, theirs, truth in (
            ("output", result["output"], torch_form[0], expected[0]),
            ("state", result["final"], torch_form[1], expected[1]),
        ):
            row = {
                "width": width, "dtype": str(dtype), "tokens": tokens, "what": what,
                "kernels": relative_error(ours, truth), "torch": relative_error(theirs, truth),
            }  # fmt: skip
            rows.append(row)
            print(
                f"D=F={width} {dtype} T={tokens} {what}: kernels {row['kernels']['max']:.1e} / "
                f"{row['kernels']['rms']:.1e}, torch form {row['torch']['max']:.1e} / "
                f"{row['torch']['rms']:.1e}",
                flush=True,
            )
    RESULTS["correctness"] = rows


def poisoned(size: Any, **options: Any) -> Tensor:
    """Allocate a tensor of NaN: what is read before it is written shows."""
    return torch.full(size, float("nan"), **options)


def flash(tensors: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return a call of SDPA's flash backend on these q, k and v, laid out as models do."""
    q, k, v = (tensors[name].transpose(1, 2) for name in ("q", "k", "v"))

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return call


def forward(arguments: argparse.Namespace) -> None:
    """Time the forward at each length."""
    rows = []
    with torch.no_grad():
        for width, tokens in itertools.product(arguments.widths, arguments.lengths):
            tensors = Shape(tokens, width).tensors()
            row: dict[str, Any] = {"width": width, "tokens": tokens}
            for graph in (True, False):
                kind = "graph" if graph else "eager"
                repeats = arguments.repeats if tokens < 32768 else 20
                row[f"flash {kind}"] = milliseconds(flash(tensors), repeats, graph=graph)
                row[f"ours {kind}"] = milliseconds(lambda t=tensors: run_kernels(t), repeats, graph=graph)
            rows.append(row)
    RESULTS["forward"] = rows
    print("\n# forward, bf16, B=1, H=32, G=8; ms\n")
    print("| D=F | T | flash graph | ours graph | ratio | flash eager | ours eager | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = []
        for kind in ("graph", "eager"):
            theirs, ours = row[f"flash {kind}"]["median"], row[f"ours {kind}"]["median"]
            cells += [f"{theirs:.3f}", f"{ours:.3f}", f"{ours / theirs:.3f}"]
        print(f"| {row['width']} | {row['tokens']} | " + " | ".join(cells) + " |")


def split(arguments: argparse.Namespace) -> None:
    """Print the time of each kernel."""
    print("\n# kernels, microseconds")
    RESULTS["split"] = []
    with torch.no_grad():
        for width, tokens in itertools.product(arguments.widths, arguments.lengths):
            tensors = Shape(tokens, width).tensors()
            times = kernel_split(lambda t=tensors: run_kernels(t))
            RESULTS["split"].append({"width": width, "tokens": tokens, "microseconds": times})
            print(f"D=F={width} T={tokens}: " + ", ".join(f"{k} {v}" for k, v in times.items()))


def candidates(width: int, chunks: list[int]) -> list[tuple[int, Tuning]]:
    """Return what the sweep tries: chunks and compilations, the same for both kernels."""
    found = []
    for chunk in chunks:
        for warps, registers in ((4, None), (4, 168), (4, 128), (8, None), (8, 128), (2, None)):
            if (chunk < 64 and warps == 8) or (chunk >= 64 and warps == 2):
                continue
            if width > 64 and warps == 4 and registers is not None:
                continue
            for stages in (1, 2):
                if stages == 2 and registers is not None:
                    continue
                found.append((chunk, Tuning(warps, stages, registers)))
    return found


def with_candidate(shape: Shape, chunk: int, tuning: Tuning, segment: int | None) -> Configuration:
    """Return the table's configuration with another chunk, compilation and segment."""
    table = choose_configuration(
        shape.width, shape.width, shape.dtype, shape.tokens, shape.batch * shape.heads, -2.5,
        kernels.processors(torch.device("cuda")),
    )  # fmt: skip
    return replace(
        table, chunk=chunk, sub_block=sub_block_tokens(-2.5, chunk), state=tuning, output=tuning,
        segment=max(segment or table.segment, chunk),
    )  # fmt: skip


def sweep(arguments: argparse.Namespace) -> None:
    """Time the kernels under other configurations. Compiled in parallel first."""
    found = [(width, *c) for width in arguments.widths for c in candidates(width, arguments.chunks)]
    if arguments.share:  # a helper process: compile every n-th and leave
        index, count = map(int, arguments.share.split("/"))
        for width, chunk, tuning in found[index::count]:
            shape = Shape(2 * chunk, width)
            try:
                run_kernels(shape.tensors(), with_candidate(shape, chunk, tuning, None))
            except Exception as error:
                print(f"D=F={width} chunk {chunk} {tuning}: {type(error).__name__}", flush=True)
        return
    started = time.perf_counter()
    count = min(12, os.cpu_count() or 1)
    command = [sys.executable, __file__, "--parts", "sweep", "--widths", ",".join(map(str, arguments.widths))]
    command += ["--chunks", ",".join(map(str, arguments.chunks))]
    helpers = [subprocess.Popen([*command, "--share", f"{i}/{count}"]) for i in range(count)]
    for helper in helpers:
        helper.wait()
    print(
        f"\n# sweep; compiled in {time.perf_counter() - started:.0f} s; microseconds of each kernel",
        flush=True,
    )
    print("| D=F | T | chunk | segment | warps, stages, registers | state | output | all kernels |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    RESULTS["sweep"] = []
    with torch.no_grad():
        for width, tokens in itertools.product(arguments.widths, arguments.lengths):
            shape = Shape(tokens, width)
            tensors = shape.tensors()
            for (w, chunk, tuning), segment in itertools.product(found, arguments.segments):
                if time.perf_counter() - started > arguments.seconds:
                    print("out of time")
                    return
                if w != width:
                    continue
                configuration = with_candidate(shape, chunk, tuning, segment)
                try:
                    times = kernel_split(lambda t=tensors, c=configuration: run_kernels(t, c), 5)
                except Exception as error:
                    print(f"| {width} | {tokens} | {chunk} | | {tuning} | {type(error).__name__} | | |")
                    continue
                row = {
                    "width": width, "tokens": tokens, "chunk": chunk, "segment": configuration.segment,
                    "warps": tuning.warps, "stages": tuning.stages, "registers": tuning.registers,
                    "microseconds": times,
                }  # fmt: skip
                RESULTS["sweep"].append(row)
                print(
                    f"| {width} | {tokens} | {chunk} | {configuration.segment} | {tuning.warps}, "
                    f"{tuning.stages}, {tuning.registers} | {times.get('state_kernel')} | "
                    f"{times.get('output_kernel')} | {sum(times.values()):.1f} |",
                    flush=True,
                )


def first(arguments: argparse.Namespace) -> None:
    """Time the first call in a fresh process with nothing compiled."""
    if arguments.share:
        tensors = Shape(2048, arguments.widths[0]).tensors()
        torch.cuda.synchronize()
        started = time.perf_counter()
        run_kernels(tensors)
        torch.cuda.synchronize()
        print(f"first forward, D=F={arguments.widths[0]}: {time.perf_counter() - started:.1f} s", flush=True)
        return
    print("\n# first call, nothing compiled")
    for width in arguments.widths:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--parts", "first", "--share", "0/1", "--widths", str(width)]
            subprocess.run(command, env={**os.environ, "TRITON_CACHE_DIR": folder}, check=True)


PARTS = {"correctness": correctness, "forward": forward, "split": split, "sweep": sweep, "first": first}


def main() -> None:
    """Run the parts asked for."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="correctness,forward,split,first", help=", ".join(PARTS))
    parser.add_argument("--widths", type=numbers, default=[64, 128], help="D = F")
    parser.add_argument(
        "--lengths", type=numbers, default=[1024, 2048, 4096, 8192, 16384, 32768, 65536], help="T"
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--chunks", type=numbers, default=[64, 32], help="of the sweep")
    parser.add_argument(
        "--segments", type=lambda text: [int(s) or None for s in text.split(",")], default=[None],
        help="of the sweep; 0 is the table's",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=150, help="the sweep stops after so long")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    if not arguments.share:
        import triton

        RESULTS["versions"] = {
            "torch": torch.__version__, "triton": triton.__version__, "gpu": torch.cuda.get_device_name()
        }  # fmt: skip
        print(RESULTS["versions"])
    for part in arguments.parts.split(","):
        PARTS[part](arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(RESULTS, indent=1))


if __name__ == "__main__":
    main()
