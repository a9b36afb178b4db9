"""The main job: a teacher goes in, a linear-attention checkpoint comes out.

While it runs, everything it needs to go on after an interruption is in ``<out>.training``; ``<out>`` itself appears
at the end, whole.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lawcat import __version__
from lawcat.convert.adapter import Adapter
from lawcat.convert.families import family_of
from lawcat.convert.initialize import ConversionReport, cast_teacher_weights, convert, is_new_parameter
from lawcat.convert.save import save_student
from lawcat.convert.teacher import Teacher, load_teacher, resolve_teacher
from lawcat.distill.checkpoint import TrainingState, latest_checkpoint
from lawcat.distill.mixture import Mixture, build_mixture
from lawcat.distill.precision import resolve_precision
from lawcat.distill.recipe import Recipe
from lawcat.distill.recovery import RecoveryModel, plain_name
from lawcat.distill.text import Progress
from lawcat.distill.trainer import (
    AttentionTransferStage,
    Interruption,
    RecoveryStage,
    StageContext,
    Workers,
    peak_memory_bytes,
    train_stage,
)
from lawcat.distill.training_log import TrainingLog, read_log
from lawcat.errors import CheckpointError, ConfigurationError, MissingDependencyError
from lawcat.files import write_atomic
from lawcat.model.modeling_lawcat import LawcatForCausalLM

RUN_NAME = "lawcat_run.json"
RECIPE_NAME = "recipe.yaml"
LOG_NAME = "training_log.jsonl"


@dataclass(frozen=True)
class LinearizeResult:
    """What a run left.

    Attributes:
        path: The finished student's directory; ``path / "adapter"`` is the same as an adapter, where LoRA was used.
        is_reused: Whether it was there already, from the same teacher and recipe.
    """

    path: Path
    is_reused: bool = False


def linearize(
    teacher: str,
    out: str | Path,
    recipe: str | Path | Recipe = "quick",
    *,
    progress: Progress | None = None,
    message: Callable[[str], None] = lambda text: None,
    tensorboard: bool = False,
    **overrides: Any,
) -> LinearizeResult:
    """Turn a teacher into a linear-attention model and save it.

    A run that was interrupted goes on where it was when it is called again with the same arguments; a finished one
    is left alone.

    Args:
        teacher: A hub id, a local folder, a GGUF file, or ``smollm2-135m-instruct``.
        out: Directory of the student; must not exist, but from this same run.
        recipe: A recipe, the name of a shipped one, or a YAML file.
        progress: Called after each step with the stage, the step, the number of steps and what was measured.
        message: Called with a line of text when something begins.
        tensorboard: Also write TensorBoard files, beside the log.
        overrides: Recipe fields to change, as ``recovery={"steps": 10}`` or ``**{"recovery.steps": 10}``.

    Returns:
        Where the student is.

    Raises:
        LawcatError: for a teacher, recipe, data or directory that cannot be used; nothing is overwritten.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when the work so far is saved.

    Example:
        >>> from lawcat import linearize
        >>> result = linearize("smollm2-135m-instruct", "out/student", recipe="quick")  # doctest: +SKIP
    """
    settings = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if overrides:
        settings = settings.with_overrides(_dotted(overrides))
    directory = Path(out)
    training = directory.with_name(directory.name + ".training")
    _check_peft(settings)

    with Interruption().handled() as interruption:
        workers = _start_workers()
        if not workers.is_main:  # the first process fetches and converts, the others find it done
            workers.wait()
        source = resolve_teacher(teacher, progress=message, check_config=_check_config)
        if workers.is_main:
            workers.wait()
        base = load_teacher(source)
        identity = {"teacher": base.fingerprint, "recipe": settings.fingerprint()}
        if directory.exists():
            _check_same_run(directory, identity)
            return LinearizeResult(directory, is_reused=True)
        if workers.is_main:
            _prepare(training, settings, identity, base.name)
        workers.wait()

        started = time.perf_counter()
        student, report = _untrained(base, settings)
        message(report.summary())
        fields = {"base": base.name, "conversion": report.summary()}
        state = latest_checkpoint(training / "checkpoints") if _has_checkpoints(training) else None
        if state is not None:
            message(f"resuming from stage {state.stage}, step {state.step}")
        done = _train(
            student, settings, base, identity, training, state, workers, interruption, progress, message, tensorboard
        )
        if not workers.is_main:
            return LinearizeResult(directory)
        fields |= {"training_s": round(time.perf_counter() - started, 1)} | done.facts
        message(f"writing {directory}")
        _finish(directory, training, teacher, base, done, settings, identity, fields)
    return LinearizeResult(directory)


@dataclass(frozen=True)
class _Trained:
    """What training gives: the trained tensors as in an adapter, or the whole student where all weights trained."""

    tensors: dict[str, torch.Tensor]
    lora_scale: float
    student: LawcatForCausalLM | None
    facts: dict[str, Any]


def _train(
    student: LawcatForCausalLM,
    recipe: Recipe,
    base: Teacher,
    identity: dict[str, str],
    training: Path,
    state: TrainingState | None,
    workers: Workers,
    interruption: Interruption,
    progress: Progress | None,
    message: Callable[[str], None],
    tensorboard: bool,
) -> _Trained:
    torch.manual_seed(recipe.seed)
    dtype = resolve_precision(recipe.precision, workers.device)
    if state is not None:
        dtype = getattr(torch, state.extra["dtype"])  # "auto" measures; a resumed run keeps what it began with
    trains_all = recipe.recovery.steps > 0 and recipe.recovery.train == "all"
    if not trains_all:
        cast_teacher_weights(student, dtype)
    student.to(workers.device)
    student.train()
    message(f"training on {workers.device} with {str(dtype).removeprefix('torch.')} weights frozen")

    mixture = _mixture(recipe, base, workers, progress)
    stage_1 = AttentionTransferStage(student, recipe.attention_transfer)
    log = None
    if workers.is_main:
        done = (state.stage, state.step) if state is not None else (1, 0)
        folder = training / "tensorboard" if tensorboard else None
        log = TrainingLog(training / LOG_NAME, resume_from=done, tensorboard_dir=folder)
    context = StageContext(
        recipe=recipe,
        recipe_fingerprint=identity["recipe"],
        teacher_fingerprint=identity["teacher"],
        mixture=mixture,
        first_sequence=0,
        checkpoints=training / "checkpoints",
        log=log,
        workers=workers,
        interruption=interruption,
        progress=progress,
        extra={"dtype": str(dtype).removeprefix("torch.")},
    )
    autocast = torch.autocast(workers.device.type, dtype=dtype, enabled=trains_all and dtype != torch.float32)
    with autocast:
        if state is None or state.stage == 1:
            train_stage(stage_1, context, state)
        student.requires_grad_(False)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(is_new_parameter(name))
        lora_scale = 0.0
        if recipe.recovery.steps:
            torch.manual_seed(recipe.seed + 1)
            recovery = RecoveryModel(student, recipe.recovery)
            student.train()
            context.first_sequence = recipe.attention_transfer.steps * recipe.attention_transfer.batch_sequences
            stage_2 = RecoveryStage(recovery, recipe.recovery, recipe.sequence_length)
            train_stage(stage_2, context, state if state is not None and state.stage == 2 else None)
            lora_scale = recovery.lora_scale
    if log is not None:
        log.close()
    trained = {
        plain_name(name): parameter.detach().float().cpu()
        for name, parameter in student.named_parameters()
        if is_new_parameter(name) or ".lora_" in name
    }
    facts = {
        "device": torch.cuda.get_device_name(workers.device) if workers.device.type == "cuda" else _cpu_name(),
        "processes": workers.count,
        "precision": str(dtype).removeprefix("torch."),
        "peak_memory_bytes": peak_memory_bytes(workers.device),
        "data": mixture.describe(),
        "stages": _stage_facts(training / LOG_NAME) if workers.is_main else {},
    }
    return _Trained(trained, lora_scale, student if trains_all else None, facts)


def _finish(
    directory: Path,
    training: Path,
    teacher: str,
    base: Teacher,
    trained: _Trained,
    recipe: Recipe,
    identity: dict[str, str],
    fields: dict[str, Any],
) -> None:
    """Merge and save. The merged student is made from the teacher and the adapter, so the two cannot differ."""
    adapter = None
    if trained.student is None:
        adapter = Adapter(
            base_name=teacher,
            base_fingerprint=identity["teacher"],
            operator=recipe.model.config_fields(),
            softmax_layers=recipe.model.softmax_layers,
            tensors=trained.tensors,
            lora_scale=trained.lora_scale,
            recipe=recipe.to_dict(),
        )
        base = load_teacher(base.source)
        student, _ = _untrained(base, recipe)
        adapter.apply(student)
    else:
        student = trained.student.cpu()
    run = {"lawcat": __version__, "versions": versions(), **identity, **fields}

    def add_records(place: Path) -> None:
        write_atomic(place / RECIPE_NAME, recipe.to_yaml())
        write_atomic(place / RUN_NAME, json.dumps(run, indent=2) + "\n")
        if (training / LOG_NAME).is_file():
            shutil.copy(training / LOG_NAME, place / LOG_NAME)

    save_student(student, base.tokenizer, directory, adapter=adapter, add_records=add_records)
    shutil.rmtree(training)


def _check_config(config: Any) -> None:
    family_of(config)


def _untrained(base: Teacher, recipe: Recipe) -> tuple[LawcatForCausalLM, ConversionReport]:
    return convert(
        base.model,
        softmax_layers=recipe.model.softmax_layers,
        seed=recipe.seed,
        **recipe.model.config_fields(),
    )


def _mixture(recipe: Recipe, base: Teacher, workers: Workers, progress: Progress | None) -> Mixture:
    """Build the data; the first process makes what is cached, the others find it."""

    def model() -> Any:
        return load_teacher(base.source, device=workers.device).model

    if not workers.is_main:
        workers.wait()
    mixture = build_mixture(
        recipe, base.tokenizer, teacher=model, teacher_fingerprint=base.fingerprint, progress=progress
    )
    if workers.is_main:
        workers.wait()
    return mixture


def _start_workers() -> Workers:
    from accelerate import Accelerator

    return Workers(Accelerator())


def _check_peft(recipe: Recipe) -> None:
    """Say at the start, not after stage 1, that stage 2 will need peft."""
    if recipe.recovery.steps and recipe.recovery.train == "lora":
        try:
            metadata.version("peft")
        except metadata.PackageNotFoundError as error:
            raise MissingDependencyError("peft", "distill", "stage 2 with train: lora") from error


def _prepare(training: Path, recipe: Recipe, identity: dict[str, str], base_name: str) -> None:
    """Begin a run, or make sure that the one that is there is this one."""
    if (training / RUN_NAME).is_file():
        _check_same_run(training, identity)
        return
    training.mkdir(parents=True, exist_ok=True)
    write_atomic(training / RECIPE_NAME, recipe.to_yaml())
    record = {"lawcat": __version__, "base": base_name, **identity}
    write_atomic(training / RUN_NAME, json.dumps(record, indent=2) + "\n")


def _check_same_run(directory: Path, identity: dict[str, str]) -> None:
    try:
        found = json.loads((directory / RUN_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{directory} exists and is not a student made by lawcat; nothing was overwritten. Choose another output "
            "directory."
        ) from error
    for what, fingerprint in identity.items():
        if found.get(what) != fingerprint:
            raise CheckpointError(
                f"{directory} holds a run with another {what}; nothing was overwritten. Choose another output "
                f"directory, or remove that one to begin again."
            )


def _has_checkpoints(training: Path) -> bool:
    return (training / "checkpoints").is_dir()


def _dotted(overrides: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"recovery": {"steps": 1}}`` as ``{"recovery.steps": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in overrides.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{inner}": v for inner, v in _dotted(value).items()})
        else:
            flat[name] = value
    return flat


def _stage_facts(log: Path) -> dict[str, Any]:
    """Return what a reader of the record wants of each stage: steps, losses at both ends, speed."""
    facts: dict[str, Any] = {}
    for stage in (1, 2):
        rows = [row for row in read_log(log) if row["stage"] == stage]
        if not rows:
            continue
        steady = sorted(row["seconds"] for row in rows)[len(rows) // 2]
        facts[str(stage)] = {
            "steps": len(rows),
            "tokens": sum(row["tokens"] for row in rows),
            "first_loss": rows[0]["loss"],
            "last_loss": sum(row["loss"] for row in rows[-10:]) / len(rows[-10:]),
            "first_step_s": round(rows[0]["seconds"], 2),
            "median_step_s": round(steady, 4),
            "tokens_per_s": round(sum(row["tokens"] for row in rows[1:]) / max(sum(row["seconds"] for row in rows[1:]), 1e-9)),
        }
        if "layer_losses" in rows[0]:
            facts[str(stage)]["first_layer_losses"] = rows[0]["layer_losses"]
            last = [row["layer_losses"] for row in rows[-10:]]
            facts[str(stage)]["last_layer_losses"] = [sum(layer) / len(layer) for layer in zip(*last, strict=True)]
    return facts


def versions() -> dict[str, str]:
    """Return the versions that decide what a run gives."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "accelerate", "safetensors", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    return f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
