"""The same small run by one process and by two, each with a GPU of its own: losses, tensors and speed.

`python benchmarks/two_gpus.py` trains SmolLM2-135M by a shipped recipe, of which it takes a few steps;
`--tiny` takes a tiny random teacher, and `--cpu` needs no GPU. Losses of first and last steps stand side by
side; those of the first step differ by rounding alone, later ones by what rounding has led to (`--set
precision=float32` makes that little). `--eager` adds runs without CUDA graphs. Tokens a second are the median
of steps of a kind, but for the first few, which `--steps` has to allow for; nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from lawcat.distill.step_graph import ENVIRONMENT_VARIABLE, STEPS_BEFORE_CAPTURE
from lawcat.distill.training_log import read_log

ROOT = Path(__file__).resolve().parents[1]
# Twice those of one graph: steps that watch the gates have their own.
_FIRST_STEPS = 2 * (STEPS_BEFORE_CAPTURE + 1)
_FEWEST_STEPS = 5


@dataclass(frozen=True)
class Run:
    """What a run has left.

    Args:
        rows: Of its training log, a step each.
        tensors: What it trained, or the whole student where all weights trained.
        seconds: From its start to its end, in all.
    """

    rows: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]
    seconds: float

    def stage(self, number: int) -> list[dict[str, Any]]:
        """Return the rows of a stage."""
        return [row for row in self.rows if row["stage"] == number]

    def tokens_per_second(self, number: int) -> dict[str, float]:
        """Return the median speed of a stage's steps by how many tokens they have, and whether some of those
        are only read for the state that they leave.

        The first steps of each kind are left out, in which kernels are compiled and graphs captured, and
        kinds of which hardly any others are left.
        """
        by_kind: dict[tuple[int, bool], list[float]] = {}
        for row in self.stage(number):
            is_carried = number == 2 and "cross_entropy" not in row
            by_kind.setdefault((row["tokens"], is_carried), []).append(row["tokens_per_s"])
        return {
            f"{size:,} a step" + (", state carried" if is_carried else ""): median(speeds[_FIRST_STEPS:])
            for (size, is_carried), speeds in sorted(by_kind.items())
            if len(speeds) >= _FIRST_STEPS + _FEWEST_STEPS
        }


def tiny_teacher_and_recipe(place: Path) -> tuple[str, str]:
    """Make the teacher and the recipe of the tests of whole runs."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "distill")]
    from tiny_runs import tiny_recipe

    from tiny_teachers import save_teacher, write_text

    recipe = place / "recipe.yaml"
    sizes = {"attention_transfer__batch_sequences": 4, "recovery__batch_sequences": 4}
    recipe.write_text(tiny_recipe(write_text(place / "text.txt"), **sizes).to_yaml(), encoding="utf-8")
    return str(save_teacher(place / "teacher", tie_word_embeddings=True)), str(recipe)


def train(
    place: Path, teacher: str, recipe: str, settings: list[str], processes: int, environment: dict[str, str]
) -> Run:
    """Run `lawcat linearize` into a place, by as many processes as are asked for."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(several if processes > 1 else []), "-m", "lawcat", "linearize", teacher]
    command += [str(place), "--recipe", recipe, "--no-evaluate"]
    command += [part for setting in settings for part in ("--set", setting)]
    started = time.perf_counter()
    code = subprocess.run(command, env=os.environ | environment).returncode
    if code:
        sys.exit(f"ended with {code}: {' '.join(command)}")
    seconds = time.perf_counter() - started
    adapter = place / "adapter" / "lawcat_adapter.safetensors"
    tensors = load_file(adapter if adapter.is_file() else place / "model.safetensors")
    return Run(read_log(place / "training_log.jsonl"), tensors, seconds)


def differences(run: Run, other: Run) -> dict[str, Any]:
    """Return how far apart the trained tensors are: at most, where, and in all over the other's norm."""
    largest, where = max(
        ((tensor.float() - other.tensors[name].float()).abs().max().item(), name)
        for name, tensor in run.tensors.items()
    )
    apart = sum(
        (tensor.double() - other.tensors[name].double()).square().sum().item()
        for name, tensor in run.tensors.items()
    )
    norm = sum(tensor.double().square().sum().item() for tensor in other.tensors.values())
    return {"largest": largest, "tensor": where, "relative": (apart / norm) ** 0.5}


def table(title: str, rows: list[tuple[str, list[str]]]) -> str:
    """Return rows of a name and a cell for each run, right-aligned."""
    wide = max(len(name) for name, _ in rows)
    lines = [f"{name:<{wide}}" + "".join(f"{cell:>24}" for cell in cells) for name, cells in rows]
    return "\n".join([title, *lines])


def show(runs: dict[str, Run], shown_steps: int) -> dict[str, Any]:
    """Print runs side by side, and return what was printed."""
    first, *others = runs
    found: dict[str, Any] = {
        "losses": {},
        "tokens_per_s": {},
        "differences": {name: differences(runs[name], runs[first]) for name in others},
        "seconds": {name: run.seconds for name, run in runs.items()},
    }
    for number in sorted({row["stage"] for row in runs[first].rows}):
        losses = {name: [row["loss"] for row in run.stage(number)] for name, run in runs.items()}
        found["losses"][number] = losses
        speeds = {name: run.tokens_per_second(number) for name, run in runs.items()}
        found["tokens_per_s"][number] = speeds
        steps = range(len(losses[first]))
        steps_shown = sorted({*steps[:shown_steps], *steps[-shown_steps:]})
        rows = [("", list(runs))]
        rows += [(f"loss, step {i + 1}", [f"{losses[name][i]:.6f}" for name in runs]) for i in steps_shown]
        for kind, speed in speeds[first].items():
            cells = [f"{ours[kind]:,.0f} ({ours[kind] / speed:.2f}x)" for ours in speeds.values()]
            rows.append((f"tokens/s, {kind}", cells))
        print(table(f"\nstage {number}", rows), flush=True)
    print()
    for name, difference in found["differences"].items():
        print(
            f"{name} against {first}: trained tensors differ by at most {difference['largest']:.3g} "
            f"({difference['tensor']}), in all by {difference['relative']:.2g} of their norm"
        )
    seconds = ", ".join(f"{name} {run.seconds:.0f}" for name, run in runs.items())
    print(f"seconds in all: {seconds}", flush=True)
    return found


def main() -> None:
    """Train and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="smollm2-135m-instruct")
    parser.add_argument("--recipe", default="smollm2-135m-short")
    parser.add_argument("--text", default=str(ROOT / "docs" / "*.md"), help="of the recipe's first source")
    parser.add_argument("--steps", type=int, default=80, help="of each of stages 1 and 2")
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", help="as lawcat linearize --set"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="also without CUDA graphs")
    parser.add_argument("--tiny", action="store_true", help="a tiny random teacher and its recipe")
    parser.add_argument("--cpu", action="store_true", help="processes of the CPU")
    parser.add_argument("--show", type=int, default=3, help="how many first and last steps")
    parser.add_argument("--json", type=Path, help="also write what is printed, and all losses, to this file")
    options = parser.parse_args()
    if not options.cpu and torch.cuda.device_count() < options.processes:
        parser.error(
            f"there are {torch.cuda.device_count()} GPUs for {options.processes} processes; try --cpu"
        )
    settings = [f"{stage}.steps={options.steps}" for stage in ("attention_transfer", "recovery")]
    warmup = min(2, options.steps - 1)
    settings += [f"{stage}.warmup_steps={warmup}" for stage in ("attention_transfer", "recovery")]
    settings += [f"checkpoint.every_steps={options.steps}"]
    environment = {"ACCELERATE_USE_CPU": "true"} if options.cpu else {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        teacher, recipe = options.teacher, options.recipe
        if options.tiny:
            teacher, recipe = tiny_teacher_and_recipe(place)
        else:
            settings += [f"data.0.path={options.text}"]
        settings += options.settings
        runs: dict[str, Run] = {}
        for way in ("auto", "off") if options.eager else ("auto",):
            for processes in (1, options.processes):
                name = f"{processes} process{'es' if processes > 1 else ''}" + (", eager" * (way == "off"))
                print(f"\n{name}", flush=True)
                variables = environment | {ENVIRONMENT_VARIABLE: way}
                out = place / name.replace(" ", "-").replace(",", "")
                runs[name] = train(out, teacher, recipe, settings, processes, variables)
    device = "CPU" if options.cpu else torch.cuda.get_device_name(0)
    print(f"\n{device}, torch {torch.__version__}, {teacher}, {recipe}, {' '.join(settings)}")
    found = show(runs, options.show)
    if options.json:
        facts = {"device": device, "teacher": teacher, "recipe": recipe, "settings": settings}
        options.json.write_text(json.dumps(facts | found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
