"""The fused mixer on one GPU: is it right, how fast is it, what takes the time.

    python benchmarks/kernel_mixer.py --parts correctness,forward,split,first
    python benchmarks/kernel_mixer.py --parts sweep --lengths 2048,8192,32768
    python benchmarks/kernel_mixer.py --parts candidates --lengths 2048,4096,8192,32768 --json out.json
    python benchmarks/kernel_mixer.py --parts training --lengths 1024,8192
    ncu --profile-from-start off python benchmarks/kernel_mixer.py --parts profile --lengths 32768

"Mixer" is everything between the projections and W_o: convolution of q and k, feature map, gate, recurrence,
division. Against PyTorch's SDPA with the flash backend on the same q, k and v, in the same run; medians of
``--repeats`` calls, eager and replayed from CUDA graphs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import util
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lawcat.bench.mixers import MixerInputs, chunk_gla
from lawcat.bench.shapes import MixerShape
from lawcat.ops.fused import linear_attention_mixer
from lawcat.ops.triton import launch
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
                    "kernels": relative_error(ours[what], truth),
                    "torch": relative_error(theirs[what], truth),
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
    """Time forward and backward against PyTorch operations and, where it is there, fla's chunk_gla."""
    has_fla = util.find_spec("fla") is not None
    if not has_fla:
        print("fla is not installed: no figures of chunk_gla")
    shapes = [Shape(t, w) for w in arguments.widths for t in arguments.lengths if t <= 32768]
    shapes.append(Shape(1024, 64, batch=16, heads=9, kv_heads=3))  # a training step of SmolLM2-135M
    RESULTS["training"] = []
    for shape in shapes:
        tensors = {name: t.requires_grad_() for name, t in shape.tensors().items()}
        weights = torch.randn_like(tensors["q"])

        def step(function: Callable[[], Tensor], t: dict[str, Tensor] = tensors, w: Tensor = weights) -> None:
            torch.autograd.grad(function(), list(t.values()), w)

        def with_fla(t: dict[str, Tensor] = tensors, shape: Shape = shape) -> Tensor:
            widths = MixerShape("", shape.heads, shape.kv_heads, shape.width, shape.width)
            tokens = (t[name] for name in ("q", "k", "v", "gate", "q_taps", "k_taps", "map_weight"))
            return chunk_gla(MixerInputs(widths, *tokens))

        calls = {
            "ours": lambda t=tensors: linear_attention_mixer(**t, backend="triton")[0],
            "torch": lambda t=tensors: linear_attention_mixer(**t, backend="torch")[0],
        }
        if has_fla:
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
        if len(RESULTS["training"]) == 1:
            print("\n# forward and backward, bf16; ms (peak MB)\n")
        cells = [f"{n} {row[n]['median']:.2f} ({row.get(n + ' MB')})" for n in calls]
        print(f"D=F={row['width']} B={row['batch']} T={row['tokens']}: " + ", ".join(cells))
        print(
            "    " + ", ".join(f"{name[:40]} {t}" for name, t in list(row["kernels"].items())[:12]),
            flush=True,
        )


# What the sweep tries: warps, stages, registers. Kernels are timed one by one, so that the i-th of each list
# can run together.
# Of the feature kernel: registers for q and for k, taps in one product, chunks and heads (q, k) of a program.
FEATURES = [
    (128, None, 4, 4, 1, 4), (128, 128, 4, 4, 1, 1), (None, None, 0, 4, 1, 1), (128, 128, 0, 4, 1, 1),
    (168, 168, 0, 4, 1, 1), (96, None, 0, 4, 1, 4), (None, None, 2, 4, 1, 1), (None, None, 0, 8, 1, 4),
    (128, None, 4, 2, 1, 4), (128, 128, 4, 2, 1, 1), (128, None, 4, 1, 1, 4), (128, 128, 0, 2, 1, 1),
]  # fmt: skip
STATE = [(4, 1, None), (4, 2, None), (4, 3, None), (8, 2, None), (4, 4, None)]
OUTPUT = [(4, 2, None), (4, 3, None), (4, 2, 168), (4, 2, 128), (8, 2, None), (4, 1, None), (8, 3, None)]
GRADIENT = [(4, 1, None), (8, 1, None), (4, 1, 168), (4, 2, None)]
KERNELS = ("feature_kernel", "prepared_state_kernel", "scan_kernel", "prepared_output_kernel")


def table_configuration(shape: Shape) -> Configuration:
    """Return what the table has for a shape."""
    return choose_configuration(
        shape.width, shape.width, shape.dtype, shape.tokens, shape.batch * shape.heads, -2.5,
        kernels.processors(torch.device("cuda")),
    )  # fmt: skip


def prepared_candidates(shape: Shape) -> list[Configuration]:
    """Return configurations with features made once, the i-th tuning of each kernel together.

    The scan has a launch of its own, so that each kernel has its time.
    """
    found = []
    for values in (64, 128)[: shape.width // 64]:
        chunk = 64
        for i in range(max(len(FEATURES), len(STATE), len(OUTPUT))):
            q_registers, k_registers, taps, run, queries, keys = FEATURES[i % len(FEATURES)]
            found.append(
                replace(
                    table_configuration(shape), is_prepared=True, chunk=chunk, value_block=values,
                    sub_block=sub_block_tokens(-2.5, chunk), segment=max(chunk, 256),
                    query_features=Tuning(4, 1, q_registers), key_features=Tuning(4, 1, k_registers),
                    feature_taps=taps, feature_chunks=run,
                    query_heads=queries, key_heads=keys, scan_with_queries=False,
                    state=Tuning(*STATE[i % len(STATE)]), output=Tuning(*OUTPUT[i % len(OUTPUT)]),
                )
            )  # fmt: skip
    return found


def gradient_candidates(shape: Shape) -> list[Configuration]:
    """Return configurations of the backward kernels."""
    return [
        replace(table_configuration(shape), gradient_chunk=chunk, gradient=Tuning(*tuning))
        for chunk, tuning in itertools.product((32, 64, 16), GRADIENT)
    ]


def gradient_shapes() -> list[Shape]:
    """Return 16 K tokens of SmolLM2-135M's shape and 8 K of Llama-3.2-1B's, 1,024 a sequence."""
    return [Shape(1024, 64, batch=16, heads=9, kv_heads=3), Shape(1024, 64, batch=8)]


def run_gradients(shape: Shape, configuration: Configuration) -> Callable[[], kernels.Gradients]:
    """Return a call of the backward kernels."""
    tensors = shape.tensors()
    inputs = kernels.MixerInputs(**tensors, num_state_heads=shape.heads)
    plan = kernels.make_plan(inputs, kernels.MixerOptions(is_logit=True, configuration=configuration))
    saved = kernels.forward(plan, save_sums=True)
    weights = torch.randn(saved.output.shape, device="cuda").to(saved.output.dtype)
    return lambda: kernels.backward(plan, saved, weights, None)


def compile_share(arguments: argparse.Namespace) -> None:
    """Compile every n-th candidate and leave: what a helper process of the sweep does."""
    index, count = map(int, arguments.share.split("/"))
    jobs: list[tuple[Shape, Configuration, bool]] = []
    for width in arguments.widths:
        shape = Shape(256, width)
        jobs += [(shape, c, False) for c in (table_configuration(shape), *prepared_candidates(shape))]
    if not arguments.no_gradients:
        for shape in gradient_shapes():
            short = replace(shape, tokens=128, batch=1)
            jobs += [(short, c, True) for c in gradient_candidates(shape)]
    for shape, configuration, is_gradient in jobs[index::count]:
        try:
            if is_gradient:
                run_gradients(shape, configuration)()
            else:
                run_kernels(shape.tensors(), configuration)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"D=F={shape.width} {brief(configuration)}: {type(error).__name__}", flush=True)


def tuning(t: Tuning) -> str:
    """Return warps, stages and registers in a word."""
    return f"{t.warps}/{t.stages}/{t.registers or '-'}"


def brief(c: Configuration) -> str:
    """Return a configuration in a line."""
    if c.is_prepared:
        return (
            f"prepared, chunk {c.chunk}, segment {c.segment}, values {c.value_block}, "
            f"features {tuning(c.query_features)} {tuning(c.key_features)} "
            f"taps {c.feature_taps} run {c.feature_chunks} heads {c.query_heads} {c.key_heads}, "
            f"state {tuning(c.state)}, output {tuning(c.output)}"
            + ", scan with queries"
            * c.scan_with_queries
        )
    return (
        f"fused, chunk {c.chunk}, segment {c.segment}, values {c.value_block}, state {tuning(c.state)}, "
        f"output {tuning(c.output)}, gradient {c.gradient_chunk}: {tuning(c.gradient)}"
    )


def sweep(arguments: argparse.Namespace) -> None:
    """Find the fastest configuration: tunings at one length, then chunks and segments at each. Compile first.

    What gives a wrong output is named and not timed.
    """
    if arguments.share:
        compile_share(arguments)
        return
    started = time.perf_counter()
    count = min(15, os.cpu_count() or 1)
    command = [sys.executable, __file__, "--parts", "sweep", "--widths", ",".join(map(str, arguments.widths))]
    command += ["--no-gradients"] * arguments.no_gradients
    helpers = [subprocess.Popen([*command, "--share", f"{i}/{count}"]) for i in range(count)]
    for helper in helpers:
        helper.wait()
    print(f"\n# sweep; compiled in {time.perf_counter() - started:.0f} s", flush=True)
    RESULTS["sweep"] = []
    table: list[str] = []
    with torch.no_grad():
        for width in arguments.widths:
            _sweep_forward(width, arguments, started, table)
        if not arguments.no_gradients:
            for shape in gradient_shapes():
                _sweep_gradients(shape, arguments, started, table)
    print(f"\n# best, after {time.perf_counter() - started:.0f} s\n")
    print("\n".join(table))


def _is_late(arguments: argparse.Namespace, started: float, seconds: float = 220) -> bool:
    late = time.perf_counter() - started > (arguments.seconds or seconds)
    if late:
        print("out of time", flush=True)
    return late


def _checked_times(
    tensors: dict[str, Tensor], configuration: Configuration, expected: Tensor
) -> dict[str, float]:
    """Return the microseconds of each kernel; nothing where the output is wrong or a launch fails."""
    try:
        error = relative_error(run_kernels(tensors, configuration).output, expected)["rms"]
        if not error < 1.5e-2:
            print(f"WRONG, rms {error:.1e}: {brief(configuration)}", flush=True)
            return {}
        return kernel_split(lambda: run_kernels(tensors, configuration), 5)
    except Exception as error:
        print(f"{type(error).__name__}: {brief(configuration)}", flush=True)
        return {}


def _sweep_forward(width: int, arguments: argparse.Namespace, started: float, table: list[str]) -> None:
    def expected_of(tensors: dict[str, Tensor]) -> Tensor:
        exact = {name: t.float() for name, t in tensors.items()}
        return linear_attention_mixer(**exact, backend="torch")[0]

    best: dict[tuple[int, int, str], tuple[float, Configuration]] = {}
    shape = Shape(8192, width)
    tensors = shape.tensors()
    expected = expected_of(tensors)
    for configuration in prepared_candidates(shape):
        if _is_late(arguments, started):
            break
        times = _checked_times(tensors, configuration, expected)
        if not times:
            continue
        print(f"D=F={width} {brief(configuration)}: {times}", flush=True)
        RESULTS["sweep"].append({"width": width, "configuration": repr(configuration), "microseconds": times})
        for kernel in KERNELS:
            key = (configuration.chunk, configuration.value_block, kernel)
            if key not in best or times[kernel] < best[key][0]:
                best[key] = (times[kernel], configuration)
    combined = []
    for chunk, values in sorted({key[:2] for key in best}):
        features, state, _, output = (best[chunk, values, kernel][1] for kernel in KERNELS)
        combined.append(
            replace(
                features, state=state.state, output=output.output,
                scan_with_queries=table_configuration(shape).scan_with_queries,
            )
        )  # fmt: skip
    for tokens in arguments.lengths:
        shape = Shape(tokens, width)
        tensors = shape.tensors()
        expected = expected_of(tensors)
        found = []
        for segment in (128, 256, 512, 1024, 2048):
            for configuration in combined:
                if segment < configuration.chunk or _is_late(arguments, started):
                    continue
                configuration = replace(configuration, segment=segment)
                times = _checked_times(tensors, configuration, expected)
                if times:
                    found.append((sum(times.values()), configuration, times))
        found.sort(key=lambda item: item[0])
        finalists = [configuration for _, configuration, _ in found[:3]]
        theirs = milliseconds(flash(tensors), 20, graph=True)["median"]
        for configuration in (table_configuration(shape), *finalists):
            call = functools.partial(run_kernels, tensors, configuration)
            graph, eager = (milliseconds(call, 20, graph=by_graph)["median"] for by_graph in (True, False))
            line = (
                f"D=F={width} T={tokens}: {graph:.3f} ms graph, {eager:.3f} eager, {graph / theirs:.3f} of "
                f"flash ({theirs:.3f}): {brief(configuration)}"
            )
            table.append(line)
            print(line, flush=True)
        for total, configuration, times in found[:3]:
            print(f"    {total:.0f} us: {brief(configuration)}: {times}", flush=True)


def _sweep_gradients(shape: Shape, arguments: argparse.Namespace, started: float, table: list[str]) -> None:
    small = replace(shape, batch=1)
    with torch.enable_grad():
        leaves = {name: t.float().requires_grad_() for name, t in small.tensors().items()}
        output = linear_attention_mixer(**leaves, backend="torch")[0]
        weights = torch.randn(output.shape, device="cuda").to(shape.dtype)
        wanted = torch.autograd.grad(output, list(leaves.values()), weights.float())
    expected = dict(zip(leaves, wanted, strict=True))
    found = []
    for configuration in gradient_candidates(shape):
        if _is_late(arguments, started):
            break
        try:
            inputs = kernels.MixerInputs(**small.tensors(), num_state_heads=shape.heads)
            options = kernels.MixerOptions(is_logit=True, configuration=configuration)
            plan = kernels.make_plan(inputs, options)
            ours = kernels.backward(plan, kernels.forward(plan, save_sums=True), weights, None)
            errors = {name: relative_error(getattr(ours, name), t)["rms"] for name, t in expected.items()}
            if not max(errors.values()) < 3e-2:
                print(f"WRONG {errors}: {brief(configuration)}", flush=True)
                continue
            call = run_gradients(shape, configuration)
            times = kernel_split(call, 5)
            found.append((milliseconds(call, 10, graph=False)["median"], brief(configuration), times))
        except Exception as error:
            print(f"{type(error).__name__}: {brief(configuration)}", flush=True)
            continue
        print(f"B={shape.batch} H={shape.heads} {found[-1]}", flush=True)
        RESULTS["sweep"].append({"heads": shape.heads, "gradient": found[-1]})
    found.sort(key=lambda item: item[0])
    for total, what, times in found[:3]:
        table.append(
            f"backward, B={shape.batch} T={shape.tokens} H={shape.heads}: {total:.3f} ms: {what}: {times}"
        )


# What each field of the table's configuration is replaced with, one at a time.
NEIGHBOURS: dict[str, list[Any]] = {
    "segment": [192, 256, 320, 384, 448, 512, 640, 768, 1024, 2048],
    "feature_chunks": [1, 2, 3, 4, 8],
    "key_heads": [1, 2, 4],
    "feature_taps": [0, 1, 2, 4],
    "query_features": [Tuning(4, 1, registers) for registers in (None, 128, 168)],
    "key_features": [Tuning(4, 1, registers) for registers in (None, 128, 168)],
    "state": [Tuning(4, 1), Tuning(4, 2), Tuning(4, 3), Tuning(8, 1), Tuning(8, 2)],
    "output": [Tuning(4, 2), Tuning(4, 3), Tuning(8, 2), Tuning(8, 3)],
    "scan_with_queries": [False, True],
}
CANDIDATE_SECONDS = 100


def candidates(shape: Shape) -> dict[str, Configuration]:
    """Return the table's configuration, as "table", and after it those one change away, by that change."""
    table = table_configuration(shape)
    found = {"table": table}
    for field, values in NEIGHBOURS.items():
        for value in values:
            if value != getattr(table, field):
                text = tuning(value) if isinstance(value, Tuning) else value
                found[f"{field} {text}"] = replace(table, **{field: value})
    if shape.width <= 64:
        for segment in (384, 512):
            name = f"scan_with_queries True, segment {segment}"
            found[name] = replace(table, scan_with_queries=True, segment=segment)
    return found


def _compiled_alike(configuration: Configuration) -> Configuration:
    """Return the one that stands for all that are compiled to the same kernels."""
    # Of a segment's length, only the scan beside the features of q has something compiled in.
    chunks = configuration.segment // configuration.chunk if configuration.scan_with_queries else 1
    return replace(configuration, segment=configuration.chunk << (chunks - 1).bit_length())


def _compile_candidates(arguments: argparse.Namespace) -> None:
    """Compile every n-th candidate, of all lengths, and leave: what a helper process does."""
    index, count = map(int, arguments.share.split("/"))
    jobs = {
        (shape.width, _compiled_alike(configuration)): name
        for shape in candidate_shapes(arguments)
        for name, configuration in candidates(shape).items()
    }
    for (width, configuration), name in list(jobs.items())[index::count]:
        try:
            run_kernels(Shape(256, width).tensors(), configuration)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"D=F={width} {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            if "CUDA" in str(error):  # nothing runs in this process any more
                return


def candidate_shapes(arguments: argparse.Namespace) -> list[Shape]:
    """Return the shapes that candidates are timed at."""
    return [Shape(tokens, width) for tokens in arguments.lengths for width in arguments.widths]


def time_candidates(arguments: argparse.Namespace) -> None:
    """Time configurations beside the table's, each checked against it first, and FlashAttention-2.

    One that does not compile or is wrong is named and left out. Where the GPU itself fails, what was
    measured until then is printed and written.
    """
    if arguments.share:
        _compile_candidates(arguments)
        return
    started = time.perf_counter()
    count = min(16, os.cpu_count() or 1)
    command = [sys.executable, __file__, "--parts", "candidates"]
    for option in ("widths", "lengths"):
        command += [f"--{option}", ",".join(map(str, getattr(arguments, option)))]
    helpers = [subprocess.Popen([*command, "--share", f"{i}/{count}"]) for i in range(count)]
    until = started + 0.6 * (arguments.seconds or CANDIDATE_SECONDS)
    for helper in helpers:
        try:
            helper.wait(max(1.0, until - time.perf_counter()))
        except subprocess.TimeoutExpired:
            helper.kill()
    print(f"\n# candidates; compiled in {time.perf_counter() - started:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    RESULTS["candidates"] = rows
    failed: set[tuple[int, str]] = set()
    try:
        with torch.no_grad():
            for shape in candidate_shapes(arguments):
                _time_candidates_of(shape, arguments, started, failed, rows)
    except Exception as error:  # of the GPU: nothing runs any more
        print(f"stopped: {type(error).__name__}: {str(error)[:300]}", flush=True)
    _print_candidates(rows)


def _strong(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same with every other channel of a third of the tokens decaying as the bound allows."""
    gate = tensors["gate"].clone()
    tokens = gate.shape[1]
    gate[:, tokens // 3 : 2 * tokens // 3, :, ::2] = -100.0
    return {**tensors, "gate": gate}


def _time_candidates_of(
    shape: Shape, arguments: argparse.Namespace, started: float, failed: set[tuple[int, str]],
    rows: list[dict[str, Any]],
) -> None:  # fmt: skip
    if _is_late(arguments, started, CANDIDATE_SECONDS):
        return
    found = candidates(shape)
    tensors, short = shape.tensors(), Shape(1000, shape.width).tensors()  # no multiple of anything
    checks = [(t, run_kernels(t, found["table"])) for t in (short, _strong(short), tensors)]
    theirs = milliseconds(flash(tensors), 5 if shape.tokens > 16384 else 20, graph=True)
    size = {"width": shape.width, "tokens": shape.tokens}
    rows.append({**size, "name": "FlashAttention-2", "milliseconds": theirs})
    # The table's is timed again at the end: how far times drift.
    for name, configuration in [*found.items(), ("table again", found["table"])]:
        if (shape.width, name) in failed:
            continue
        if _is_late(arguments, started, CANDIDATE_SECONDS):
            return
        call = functools.partial(run_kernels, tensors, configuration)
        try:
            errors = [_candidate_error(run_kernels(t, configuration), expected) for t, expected in checks]
            if not all(error < 1e-2 for error in errors):
                failed.add((shape.width, name))
                print(f"WRONG D=F={shape.width} T={shape.tokens}: {name}: {errors}", flush=True)
                continue
            times = milliseconds(call, 20, graph=True)
            split = kernel_split(call, 3) if arguments.with_split else {}
        except Exception as error:
            failed.add((shape.width, name))
            print(f"FAILED D=F={shape.width} {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            if "CUDA error" in str(error):
                raise
            continue
        rows.append(
            {
                **size, "name": name, "milliseconds": times,
                "of FlashAttention-2": times["median"] / theirs["median"],
                "errors": errors, "kernels": split, "configuration": repr(configuration),
            }
        )  # fmt: skip
        if arguments.json:
            arguments.json.write_text(json.dumps(RESULTS, indent=1))


def _candidate_error(found: kernels.Forward, expected: kernels.Forward) -> float:
    """Return the larger of the rms errors of output and final state, NaN where anything is not finite."""
    pairs = (found.output, expected.output), (found.final, expected.final)
    errors = [relative_error(actual, wanted)["rms"] for actual, wanted in pairs]
    return float("nan") if any(math.isnan(error) for error in errors) else max(errors)


def _print_candidates(rows: list[dict[str, Any]]) -> None:
    """Print the split of the kernels, and last a table of all medians."""
    for row in rows:
        if row.get("kernels"):
            cells = ", ".join(f"{k.removesuffix('_kernel')} {v}" for k, v in row["kernels"].items())
            print(f"D=F={row['width']} T={row['tokens']} {row['name']}: {cells}")
    for width in dict.fromkeys(row["width"] for row in rows):
        of_width = [row for row in rows if row["width"] == width]
        lengths = list(dict.fromkeys(row["tokens"] for row in of_width))
        medians = {(r["name"], r["tokens"]): r["milliseconds"]["median"] for r in of_width}
        print(f"\n| D = F = {width}, ms | " + " | ".join(map(str, lengths)) + " |")
        print("| --- |" + " ---: |" * len(lengths))
        for name in dict.fromkeys(row["name"] for row in of_width):
            cells = [f"{medians[name, t]:.4f}" if (name, t) in medians else "" for t in lengths]
            print(f"| {name} | " + " | ".join(cells) + " |")


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
            command += ["--design", arguments.design]
            subprocess.run(command, env={**os.environ, "TRITON_CACHE_DIR": folder}, check=True)


def with_design(table: Configuration, is_prepared: bool) -> Configuration:
    """Return the configuration with features made once, or wherever they are needed."""
    if is_prepared == table.is_prepared:
        return table
    if is_prepared:
        return replace(table, is_prepared=True, chunk=64, sub_block=sub_block_tokens(-2.5, 64), segment=512)
    chunk = 64 if table.value_block <= 64 else 32
    tuning = Tuning(4 if chunk == 64 else 8)
    return replace(
        table, is_prepared=False, chunk=chunk, sub_block=sub_block_tokens(-2.5, chunk), state=tuning,
        output=tuning,
    )  # fmt: skip


def profile(arguments: argparse.Namespace) -> None:
    """Run one forward between the profiler's marks, for Nsight Compute."""
    runtime = torch.cuda.cudart()
    for width, tokens in itertools.product(arguments.widths, arguments.lengths):
        with torch.no_grad():
            tensors = Shape(tokens, width).tensors()
            run_kernels(tensors)
            torch.cuda.synchronize()
            runtime.cudaProfilerStart()
            run_kernels(tensors)
            torch.cuda.synchronize()
            runtime.cudaProfilerStop()


PARTS = {
    "correctness": correctness,
    "forward": forward,
    "split": split,
    "training": training,
    "sweep": sweep,
    "candidates": time_candidates,
    "first": first,
    "profile": profile,
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
    parser.add_argument("--no-gradients", action="store_true", help="the sweep leaves the backward out")
    parser.add_argument(
        "--design", choices=("table", "fused", "prepared"), default="table",
        help="what correctness, forward, split, training and first run, in place of the table's",
    )  # fmt: skip
    parser.add_argument("--with-split", action="store_true", help="candidates by kernel too")
    parser.add_argument(
        "--seconds", type=float,
        help=f"the sweep stops after so long (220), and so do candidates ({CANDIDATE_SECONDS})",
    )  # fmt: skip
    parser.add_argument("--share", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument(
        "--reuse", action=argparse.BooleanOptionalAction, default=True,
        help="launch without asking Triton what to compile",
    )  # fmt: skip
    arguments = parser.parse_args()
    launch.reuse_compiled = arguments.reuse
    if arguments.design != "table":
        choose = kernels.choose_configuration
        is_prepared = arguments.design == "prepared"
        kernels.choose_configuration = lambda *a: with_design(choose(*a), is_prepared)
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
