"""The fused mixer on one GPU: is it right, how fast is it, what takes the time.

    python benchmarks/kernel_mixer.py --parts correctness,forward,split,first
    python benchmarks/kernel_mixer.py --parts sweep --lengths 2048,32768
    python benchmarks/kernel_mixer.py --parts training --lengths 1024,8192

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

from lawcat.ops import fused
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


def run_kernels(tensors: dict[str, Tensor], configuration: Configuration | None = None) -> kernels.Forward:
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


def gradients(
    tensors: dict[str, Tensor], output_weights: Tensor, state_weights: Tensor, backend: str
) -> dict[str, Tensor]:
    """Return output, state and the gradients of all tensors of a weighted sum of both."""
    if tensors["q"].dtype == torch.float32 and tensors["q"].shape[3] > 64:  # the kernels have no gradient
        with torch.no_grad():
            output, state, _, _ = linear_attention_mixer(**tensors, backend=backend)
        return {"output": output, "state": state}
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    output, state, _, _ = linear_attention_mixer(**leaves, backend=backend)
    loss = (output * output_weights.to(output.dtype)).sum() + (state * state_weights.to(state.dtype)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {"output": output.detach(), "state": state.detach(), **dict(zip(leaves, found, strict=True))}


def correctness(arguments: argparse.Namespace) -> None:
    """Compare with PyTorch operations in float64; beside it, those in the inputs' own precision."""
    print(
        "\n# correctness: largest error against float64 as a part of the largest value, kernels (torch form)"
    )
    RESULTS["correctness"] = []
    for width, dtype, tokens in itertools.product(
        arguments.widths, (torch.bfloat16, torch.float32), (1000, 8192)
    ):
        for kind in ("trained", "strong"):
            shape = Shape(tokens, width, heads=8, kv_heads=2, dtype=dtype)
            tensors = shape.tensors()
            if kind == "strong":  # each channel as strong as the bound allows, or nearly none
                strong = torch.rand_like(tensors["gate"]) < 0.5
                tensors["gate"] = torch.where(strong, -100.0, 20.0)
                del strong
            generator = torch.Generator("cuda").manual_seed(1)
            output_weights = torch.randn(tensors["q"].shape, generator=generator, device="cuda")
            state_weights = torch.randn(8, width, width + 1, generator=generator, device="cuda")
            weights = (output_weights, state_weights)
            double = {name: t.double() for name, t in tensors.items()}
            expected = gradients(double, *weights, "torch")
            theirs = gradients(tensors, *weights, "torch")
            allocate, kernels.allocate = kernels.allocate, poisoned
            try:
                ours = gradients(tensors, *weights, "triton")
            finally:
                kernels.allocate = allocate
            cells = []
            for what in ours:
                truth = expected[what]
                row = {
                    "width": width, "dtype": str(dtype), "tokens": tokens, "kind": kind, "what": what,
                    "kernels": relative_error(ours[what], truth), "torch": relative_error(theirs[what], truth),
                }  # fmt: skip
                RESULTS["correctness"].append(row)
                cells.append(f"{what} {row['kernels']['max']:.1e} ({row['torch']['max']:.1e})")
            print(f"D=F={width} {dtype} T={tokens} {kind}: " + ", ".join(cells), flush=True)
            del double, expected, theirs, ours
            torch.cuda.empty_cache()


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


def training(arguments: argparse.Namespace) -> None:
    """Time forward and backward together against PyTorch operations, and fla's chunk_gla where it is there."""
    try:
        from fla.ops.gla import chunk_gla
    except ImportError:
        chunk_gla = None
        print("fla is not installed: no figures of chunk_gla")
    shapes = [Shape(t, w) for w in arguments.widths for t in arguments.lengths if t <= 32768]
    shapes.append(Shape(1024, 64, batch=16, heads=9, kv_heads=3))  # a training step of SmolLM2-135M
    RESULTS["training"] = []
    for shape in shapes:
        tensors = {name: t.requires_grad_() for name, t in shape.tensors().items()}
        weights = torch.randn_like(tensors["q"])

        def step(function: Callable[[], Tensor], t: dict[str, Tensor] = tensors, w: Tensor = weights) -> None:
            torch.autograd.grad(function(), list(t.values()), w)

        def with_fla(t: dict[str, Tensor] = tensors) -> Tensor:
            heads = t["map_weight"].shape[0]
            k, v, gate = (fused._repeat_heads(t[name], heads) for name in ("k", "v", "gate"))
            log_decay = (torch.nn.functional.logsigmoid(gate) / 16).clamp(min=-2.5)
            q = fused.causal_conv1d(t["q"].flatten(2), t["q_taps"])[0].view_as(t["q"])
            k = fused.causal_conv1d(k.flatten(2), t["k_taps"])[0].view_as(k)
            q, k = (fused.hedgehog_feature_map(x, t["map_weight"]).to(v.dtype) for x in (q, k))
            ones = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
            read = chunk_gla(q, k, ones, g=log_decay, scale=1.0)[0]
            return read[..., :-1] / (read[..., -1:] + 1e-6)

        calls = {
            "ours": lambda t=tensors: linear_attention_mixer(**t, backend="triton")[0],
            "torch": lambda t=tensors: linear_attention_mixer(**t, backend="torch")[0],
        }
        if chunk_gla is not None:
            calls["fla"] = with_fla
        row: dict[str, Any] = {"width": shape.width, "tokens": shape.tokens, "batch": shape.batch}
        for name, call in calls.items():
            try:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                row[name] = milliseconds(lambda c=call: step(c), 20 if name == "ours" else 5, graph=False)
                row[f"{name} MB"] = torch.cuda.max_memory_allocated() // 2**20
            except torch.cuda.OutOfMemoryError:
                row[name] = {"median": float("nan")}
        row["kernels"] = kernel_split(lambda: step(calls["ours"]), 5)  # noqa: B023
        RESULTS["training"].append(row)
    print("\n# forward and backward, bf16; ms (peak MB)\n")
    for row in RESULTS["training"]:
        cells = [
            f"{n} {row[n]['median']:.2f} ({row.get(n + ' MB')})" for n in ("ours", "torch", "fla") if n in row
        ]
        print(f"D=F={row['width']} B={row['batch']} T={row['tokens']}: " + ", ".join(cells))
        print("    " + ", ".join(f"{name[:40]} {t}" for name, t in list(row["kernels"].items())[:12]))


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
    """Time the first call, and the first with gradients, in a fresh process with nothing compiled."""
    if arguments.share:
        tensors = Shape(2048, arguments.widths[0]).tensors()
        torch.cuda.synchronize()
        started = time.perf_counter()
        run_kernels(tensors)
        torch.cuda.synchronize()
        forward_seconds = time.perf_counter() - started
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        linear_attention_mixer(**leaves, backend="triton")[0].sum().backward()
        torch.cuda.synchronize()
        print(
            f"D=F={arguments.widths[0]}: first forward {forward_seconds:.1f} s, "
            f"then first training step {time.perf_counter() - started - forward_seconds:.1f} s",
            flush=True,
        )
        return
    print("\n# first call, nothing compiled", flush=True)
    for width in arguments.widths:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--parts", "first", "--share", "0/1", "--widths", str(width)]
            subprocess.run(command, env={**os.environ, "TRITON_CACHE_DIR": folder}, check=True)


PARTS = {
    "correctness": correctness,
    "forward": forward,
    "split": split,
    "training": training,
    "sweep": sweep,
    "first": first,
}


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
