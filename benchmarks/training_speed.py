"""Tokens a second of the training steps, and what they spend their time on.

`python benchmarks/training_speed.py` runs SmolLM2-135M's shape with random weights; `--tiny` tries the script
out on a CPU. `LAWCAT_BACKEND` chooses the backend, `--parts` the steps, `--ways` eager steps, graphs or both.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lawcat.bench.models import random_pair
from lawcat.bench.timing import synchronize
from lawcat.bench.training import OneProcess
from lawcat.distill.recipe import AttentionTransferSettings, RecoverySettings
from lawcat.distill.recovery import RecoveryModel
from lawcat.distill.sequence import Batch
from lawcat.distill.step_graph import ENVIRONMENT_VARIABLE
from lawcat.distill.trainer import AttentionTransferStage, RecoveryStage, Stage, Workers
from lawcat.distill.training_step import Measured, TrainingStep
from lawcat.memory import free_memory
from lawcat.ops import choose_backend

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Name, stage, sequences and segments of a step of smollm2-135m-longcontext.
PARTS = {
    "stage1": (1, 16, 1),
    "stage2": (2, 16, 1),
    "carried2": (2, 8, 2),
    "carried8": (2, 8, 8),
    "carried16": (2, 8, 16),
}


def make_stage(number: int, tokens: int, shape: str, device: torch.device) -> Stage:
    """Return a stage with random weights, with the settings of the recipe."""
    torch.manual_seed(0)
    is_gpu = device.type == "cuda"
    student = random_pair(shape, dtype=torch.bfloat16 if is_gpu else torch.float32, device=device).student
    if number == 1:
        return AttentionTransferStage(student.eval(), AttentionTransferSettings(batch_sequences=16))
    settings = RecoverySettings(
        batch_sequences=16,
        lora_rank=12,
        lora_alpha=24,
        lora_targets=LORA_TARGETS,
        carried_segments=15,
        carried_share=0.3,
        carried_sequences=8,
    )
    return RecoveryStage(RecoveryModel(student.eval(), settings), settings, tokens)


def random_batch(stage: Stage, sequences: int, tokens: int) -> Batch:
    """Return random tokens, all of weight one, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, stage.student.config.vocab_size, (sequences, tokens), generator=generator)
    no_answer = torch.zeros(ids.shape, dtype=torch.bool)
    return Batch(ids, torch.ones(ids.shape), no_answer, ("random",) * sequences)


def make_step(stage: Stage, batch: Batch, device: torch.device, way: str) -> Callable[[], object]:
    """Return what does a step and, as training does, looks at the one before it."""
    os.environ[ENVIRONMENT_VARIABLE] = "off" if way == "eager" else "auto"
    step = TrainingStep(stage, Workers(OneProcess(device)))
    queued: deque[Measured] = deque()

    def run() -> object:
        queued.append(step(batch, learning_rate_factor=1e-3))
        if len(queued) > int(step.is_queued):
            return queued.popleft().tensors()["loss"].tolist()
        return None

    run.step = step  # type: ignore[attr-defined]
    return run


def steps_in(step: Callable[[], object], seconds: float, device: torch.device) -> tuple[int, float]:
    """Return how many steps were done in about so many seconds, and the seconds."""
    synchronize(device)
    started = time.perf_counter()
    count = 0
    while count < 3 or time.perf_counter() - started < seconds:
        step()
        count += 1
    synchronize(device)
    return count, time.perf_counter() - started


def show_profile(step: Callable[[], object], device: torch.device, rows: int) -> None:
    """Print the share of time the GPU is busy, and the most expensive kernels and host operations."""
    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    synchronize(device)
    with profile(activities=activities) as found:
        started = time.perf_counter()
        for _ in range(3):
            step()
        synchronize(device)
        wall = time.perf_counter() - started
    averages = found.key_averages()
    kernels: list[Any] = sorted(
        (
            event
            for event in averages
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ),
        key=lambda event: -event.self_device_time_total,
    )
    host = sorted(
        (event for event in averages if event.device_type == DeviceType.CPU),
        key=lambda event: -event.self_cpu_time_total,
    )
    busy = sum(e.self_device_time_total for e in kernels) / 1e6
    count = sum(e.count for e in kernels) / 3
    print(f"  profiled: {wall / 3 * 1e3:.1f} ms a step, kernels {busy / 3 * 1e3:.1f} ms in {count:.0f} "
          f"launches, GPU busy {busy / wall:.0%}", flush=True)  # fmt: skip
    for title, events, attribute in (
        ("kernels", kernels, "self_device_time_total"),
        ("host operations", host, "self_cpu_time_total"),
    ):
        print(f"  {title}, ms a step:", flush=True)
        for event in events[:rows]:
            milliseconds = getattr(event, attribute) / 3e3
            print(f"    {milliseconds:8.2f}  x{event.count / 3:<7.0f} {event.key[:110]}", flush=True)


def measure(part: str, way: str, options: argparse.Namespace, device: torch.device) -> None:
    """Print one part done one way."""
    number, sequences, segments = PARTS[part]
    tokens = 64 if options.tiny else options.tokens
    sequences = 2 if options.tiny else sequences
    shape = "tiny" if options.tiny else options.shape
    free_memory()
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    stage = make_stage(number, tokens, shape, device)
    step: Any = make_step(stage, random_batch(stage, sequences, tokens * segments), device, way)
    for _ in range(4):  # compiles kernels, and captures
        step()
    synchronize(device)
    first = time.perf_counter() - started
    count, seconds = steps_in(step, options.seconds, device)
    size = sequences * tokens * segments
    gib = torch.cuda.max_memory_allocated(device) / 2**30 if is_gpu else 0.0
    print(
        f"\n{part}, {way}, {choose_backend('auto', device.type)}: {size * count / seconds:,.0f} tokens/s, "
        f"{seconds / count * 1e3:.1f} ms a step of {size:,} tokens, peak {gib:.1f} GiB, "
        f"{first:.1f} s before, {step.step.num_graphs} graphs",
        flush=True,
    )
    if options.rows:
        show_profile(step, device, options.rows)


def main() -> None:
    """Print a part after the other; one that fails prints why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a try on a CPU")
    parser.add_argument("--shape", default="smollm2-135m", help="as lawcat bench --shape")
    parser.add_argument("--tokens", type=int, default=1024, help="of a segment")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--rows", type=int, default=15, help="of the profile; 0 for none")
    parser.add_argument("--parts", default=",".join(PARTS), help="of them, which")
    parser.add_argument("--ways", default="eager,graph", help="eager, graph or both")
    options = parser.parse_args()
    if options.tiny:
        options.seconds = min(options.seconds, 0.3)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    for part in options.parts.split(","):
        for way in options.ways.split(","):
            try:
                measure(part, way, options, device)
            except Exception:
                print(f"\n{part}, {way}: failed", flush=True)
                traceback.print_exc()
            free_memory()


if __name__ == "__main__":
    main()
