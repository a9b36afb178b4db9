"""Whole runs of a tiny teacher in a second or less."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

from lawcat.distill.linearize import LinearizeResult, end_process_group, linearize
from lawcat.distill.recipe import Recipe
from tiny_teachers import save_teacher, write_text

# Wall times and memory: all else in a log has to be the same when a run is repeated.
_MEASURED = ("seconds", "tokens_per_s", "peak_memory_bytes")


def tiny_recipe(text: Path, **overrides: Any) -> Recipe:
    """Return a recipe of six steps a stage, of which some in stage 2 carry a state over."""
    recipe = Recipe.from_dict(
        {
            "name": "tiny",
            "seed": 3,
            "sequence_length": 16,
            "precision": "float32",
            "data": [{"provider": "text", "path": str(text)}],
            "attention_transfer": {"steps": 6, "batch_sequences": 2, "learning_rate": 0.02},
            "recovery": {
                "steps": 6,
                "batch_sequences": 2,
                "lora_rank": 2,
                "learning_rate": 0.01,
                "carried_segments": 3,
            },
            "checkpoint": {"every_steps": 2, "keep": 2},
            "evaluation": {"tasks": [], "perplexity_tokens": 0},
        }
    )
    return recipe.with_overrides({name.replace("__", "."): value for name, value in overrides.items()})


class TinyRun:
    """A teacher, of the fields of ``save_teacher``, a text and a place for students."""

    def __init__(self, place: Path, **fields: Any) -> None:
        self.place = place
        self.teacher = save_teacher(place / "teacher", tie_word_embeddings=True, **fields)
        self.text = write_text(place / "text.txt")

    def __call__(self, out: str | Path, progress: Any = None, **overrides: Any) -> LinearizeResult:
        """Run in this process."""
        recipe = tiny_recipe(self.text, **overrides)
        return linearize(str(self.teacher), self.place / out, recipe, progress=progress)

    def in_a_process(self, work: Callable[[], object]) -> int:
        """Run something in a child process, which a signal may kill; return how it exited."""
        child = multiprocessing.get_context("fork").Process(target=_quietly, args=(work,))
        child.start()
        child.join(120)
        assert child.exitcode is not None
        return child.exitcode

    def in_two_processes(self, work: Callable[[int], object], port: int) -> None:
        """Run something in two processes that train together."""
        in_two_processes(work, port)


def in_two_processes(work: Callable[[int], object], port: int, *, method: str = "fork") -> None:
    """Run something in two processes that train together, of which it gets the number.

    Args:
        work: What to run; where they are spawned, to be found by its name.
        port: Where they meet; see ``free_port``.
        method: How they start. What has used a GPU cannot be forked.
    """
    context: Any = multiprocessing.get_context(method)
    children = [context.Process(target=_one_of_two, args=(work, rank, port)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    ended = [child.exitcode for child in children]
    for child in children:
        child.kill()  # one that waits for the other in vain
    assert ended == [0, 0]


def _one_of_two(work: Callable[[int], object], rank: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    work(rank)
    end_process_group()


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _quietly(work: Callable[[], object]) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        work()


def on_one_processor(monkeypatch: Any, cache: Path) -> None:
    """Keep a run on the CPU and its cache to itself."""
    monkeypatch.setenv("LAWCAT_CACHE", str(cache))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def tensors_of(student: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a student and of its adapter."""
    found = {f"student {name}": t for name, t in load_file(student / "model.safetensors").items()}
    if (student / "adapter").is_dir():
        file = student / "adapter" / "lawcat_adapter.safetensors"
        found |= {f"adapter {name}": t for name, t in load_file(file).items()}
    return found


def assert_same_student(one: Path, other: Path) -> None:
    """Fail unless two students are the same bit for bit."""
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def without_measurements(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a log's rows without what the machine's speed decides."""
    return [{name: value for name, value in row.items() if name not in _MEASURED} for row in rows]


@contextlib.contextmanager
def files_unchanged(folder: Path) -> Iterator[None]:
    """Fail if anything inside a folder changes meanwhile."""

    def content() -> dict[Path, bytes | None]:
        return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}

    before = content()
    yield
    assert content() == before
