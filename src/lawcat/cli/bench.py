"""`lawcat bench`: time and memory against what lawcat replaces."""

from __future__ import annotations

from pathlib import Path

import torch

from lawcat.bench import generation, operators, training
from lawcat.bench.environment import environment
from lawcat.bench.limits import check_arguments
from lawcat.bench.models import Pair, load_pair, random_pair
from lawcat.bench.record import Record
from lawcat.bench.report import FORMATS, Results, markdown, write_report, write_results
from lawcat.bench.shapes import teacher_config
from lawcat.cli.command_line import command_line
from lawcat.cli.display import Display
from lawcat.cli.evaluate import parse_dtype
from lawcat.convert.load import check_device
from lawcat.errors import ConfigurationError, did_you_mean
from lawcat.evaluation.lengths import parse_lengths
from lawcat.memory import free_memory
from lawcat.ops import backend_names, choose_backend, explain

PARTS = ("operators", "generation", "training")
_LENGTHS = {"cpu": "256,1k,2k", "cuda": "1k,2k,4k,8k,16k,32k,64k"}
_SHAPES = {"cpu": ("smollm2-135m",), "cuda": ("llama-3.2-1b",)}
# Sequences of decoding, of a training step, and tokens of its sequences.
_DECODE_BATCH = {"cpu": 1, "cuda": 16}
_TRAINING = {"cpu": (2, 256), "cuda": (16, 1024)}
_SECONDS = {"cpu": 1.0, "cuda": 0.5}


def run_bench(
    models: list[str],
    what: str,
    shapes: list[str],
    lengths: str | None,
    batch: int,
    decode_batch: int | None,
    training_batch: int | None,
    seconds: float | None,
    cuda_graphs: bool,
    backends: str | None,
    output: Path | None,
    report: Path | None,
    image_format: str,
    seed: int,
    device: str | None,
    dtype: str,
) -> None:
    """See the command's help."""
    choose_backend()  # a name in LAWCAT_BACKEND that does not exist is said now, not after all is measured
    asked = _choices(what, PARTS, "--what")
    parts = [part for part in PARTS if part in asked]  # training last: it spoils the student
    place = check_device(device)
    kind = place.type if place.type in _LENGTHS else "cpu"
    tokens = parse_lengths(lengths or _LENGTHS[kind])
    check_arguments(place, tokens, cuda_graphs)
    chosen = None
    if backends is not None:
        names = tuple(name for name in backend_names() if name != "auto")
        chosen = tuple(_choices(backends, names, "--backends"))
    if image_format not in FORMATS:
        raise ConfigurationError(f"--image-format {image_format!r} is not a choice; use png or svg.")
    for shape in shapes:
        teacher_config(shape)
    number_format = _dtype(dtype, place)
    named = [] if models else shapes or list(_SHAPES[kind])
    records: list[Record] = []
    with Display() as display:
        try:
            for title in models or named:
                display.message(f"{'loading' if models else 'building'} {title}")
                pair = (
                    load_pair(title, dtype=number_format, device=place)
                    if models
                    else random_pair(title, dtype=number_format or torch.float32, device=place)
                )
                parameter = pair.teacher.lm_head.weight
                for part in parts:
                    records += _measure(
                        part,
                        pair,
                        tokens,
                        batch,
                        decode_batch or _DECODE_BATCH[kind],
                        (training_batch or _TRAINING[kind][0], _TRAINING[kind][1]),
                        seconds or _SECONDS[kind],
                        cuda_graphs,
                        chosen,
                        seed,
                        display,
                    )
                number_format = number_format or parameter.dtype
                del pair, parameter
                free_memory()
        finally:  # also what was found before Ctrl-C
            results = Results(
                environment(place, number_format or torch.float32),
                explain().splitlines(),
                records,
                command_line(),
            )
            if records and output is not None:
                write_results(output, results)
            if records and report is not None:
                display.message(f"report: {write_report(report, results, image_format=image_format)}")
    print(markdown(results))


def _measure(
    part: str,
    pair: Pair,
    lengths: list[int],
    batch: int,
    decode_batch: int,
    training_size: tuple[int, int],
    seconds: float,
    cuda_graphs: bool,
    backends: tuple[str, ...] | None,
    seed: int,
    display: Display,
) -> list[Record]:
    if part == "operators":
        parameter = pair.teacher.lm_head.weight
        return operators.measure(
            pair.mixer_shape(),
            lengths=lengths,
            device=parameter.device,
            dtype=parameter.dtype,
            batch=batch,
            decode_batch=decode_batch,
            backends=backends,
            seconds=seconds,
            cuda_graphs=cuda_graphs,
            seed=seed,
            progress=display.update,
        )
    if part == "generation":
        return generation.measure(
            pair,
            lengths=lengths,
            batch=batch,
            decode_batch=decode_batch,
            backends=backends,
            seconds=seconds,
            cuda_graphs=cuda_graphs,
            seed=seed,
            progress=display.update,
        )
    return training.measure(
        pair,
        batch=training_size[0],
        tokens=training_size[1],
        backends=backends,
        seconds=4 * seconds,
        seed=seed,
        progress=display.update,
    )


def _choices(text: str, allowed: tuple[str, ...], option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in allowed:
            raise ConfigurationError(
                f"{option} {name!r} is not a choice; use {', '.join(allowed)}.{did_you_mean(name, allowed)}"
            )
    if not names:
        raise ConfigurationError(f"{option} is empty; use {', '.join(allowed)}.")
    return list(dict.fromkeys(names))


def _dtype(text: str, device: torch.device) -> torch.dtype | None:
    if text == "auto":
        return torch.bfloat16 if device.type == "cuda" else None
    return parse_dtype(text)
