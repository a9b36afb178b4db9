"""The main job: a teacher goes in, a linear-attention checkpoint comes out.

While it runs, everything it needs to go on after an interruption is in ``<out>.training``; ``<out>`` itself
appears at the end, whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lawcat import __version__
from lawcat.convert.adapter import Adapter
from lawcat.convert.initialize import (
    ConversionReport,
    cast_teacher_weights,
    convert,
    is_new_parameter,
    student_config,
)
from lawcat.convert.save import save_student
from lawcat.convert.teacher import Teacher, load_teacher, resolve_teacher
from lawcat.distill.checkpoint import TrainingState, latest_checkpoint, list_checkpoints, load_checkpoint
from lawcat.distill.mixture import Mixture, build_mixture, check_files
from lawcat.distill.model_card import model_card
from lawcat.distill.precision import resolve_precision
from lawcat.distill.recipe import Recipe, dotted_keys
from lawcat.distill.recovery import (
    RecoveryModel,
    check_targets,
    is_lora_factor,
    is_trained_in_full,
    plain_name,
)
from lawcat.distill.text import Progress
from lawcat.distill.trainer import (
    AttentionTransferStage,
    Interruption,
    RecoveryStage,
    StageContext,
    TeacherTuningStage,
    Workers,
    peak_memory_bytes,
    train_stage,
)
from lawcat.distill.training_log import TrainingLog, read_log
from lawcat.errors import BusyError, CheckpointError, ConfigurationError, MissingDependencyError
from lawcat.files import (
    clear_write_errors,
    is_being_written,
    remove_directory,
    remove_leftovers,
    write_atomic,
)
from lawcat.model.configuration_lawcat import LINEAR, OPERATOR_FIELDS
from lawcat.model.modeling_lawcat import LawcatForCausalLM, LawcatModel
from lawcat.versions import versions

RUN_NAME = "lawcat_run.json"
RECIPE_NAME = "recipe.yaml"
LOG_NAME = "training_log.jsonl"
LOCK_NAME = "lock"
# In the folder of a run under way.
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"


def _silent(text: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class LinearizeResult:
    """What a run left.

    Attributes:
        path: The finished student's directory; ``path / "adapter"`` is the same as an adapter, where no
            weight of the teacher trained in full.
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
    message: Callable[[str], None] = _silent,
    tensorboard: bool = False,
    **overrides: Any,
) -> LinearizeResult:
    """Turn a teacher into a linear-attention model and save it.

    A run that was interrupted goes on where it was when it is called again with the same arguments; a
    finished one is left alone.

    Args:
        teacher: A hub id, a local folder, a GGUF file, or ``smollm2-135m-instruct``.
        out: Directory of the student; must not exist, unless from this same run.
        recipe: A recipe, the name of a shipped one, or a YAML file.
        progress: Called after each step with the stage, the step, the number of steps and what was measured.
        message: Called with a line of text when something begins.
        tensorboard: Also write TensorBoard files, beside the log.
        overrides: Recipe fields to change, as ``recovery={"steps": 10}`` or ``**{"recovery.steps": 10}``.

    Returns:
        Where the student is. Several processes go on as a group, for a further run; after the last one,
        ``lawcat.distill.linearize.end_process_group()`` ends it.

    Raises:
        BusyError: where another process trains into the same directory.
        LawcatError: for a teacher, recipe, data or directory that cannot be used; nothing is overwritten.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when the work so far is saved.

    Example:
        >>> from lawcat import linearize
        >>> result = linearize("smollm2-135m-instruct", "out/student", recipe="quick")  # doctest: +SKIP
    """
    settings = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if overrides:
        settings = settings.with_overrides(dotted_keys(overrides))
    if settings.matrix is not None:
        raise ConfigurationError(
            f"The recipe {settings.name!r} is a matrix of {len(settings.matrix.variants)} variants. Train "
            "all with lawcat.distill.matrix.linearize_matrix, or one, as "
            f"recipe.variant({settings.matrix.names[0]!r})."
        )
    directory = Path(out)
    found = _finished_run(directory)
    training = directory.with_name(directory.name + ".training")
    _check_peft(settings)
    if found is None:
        check_files(settings)

    interruption = Interruption()
    with interruption.handled(), contextlib.ExitStack() as held:
        workers = _start_workers()
        if not workers.is_main:  # one display; the others also find done what the first fetches and converts
            progress, message = None, _silent
            workers.wait()
        source = resolve_teacher(teacher, progress=message, check_config=check_config(settings))
        if workers.is_main:
            workers.wait()
        identity = {"teacher": source.fingerprint, "recipe": settings.fingerprint()}
        if found is not None:
            _check_same_run(directory, found, identity)
            if workers.is_main:
                _remove_rest(directory, training)
            return LinearizeResult(directory, is_reused=True)
        busy: BusyError | None = None
        if workers.is_main:
            try:
                _prepare(directory, training, settings, identity, source.name, held)
            except BusyError as error:
                busy = error
        if workers.any(busy is not None):  # which all must know: a matrix goes on with its next variant
            raise busy or BusyError(f"another process is at work in {directory}.")

        base = load_teacher(source)
        student, report = _untrained(base, settings)
        message(report.summary())
        state = _saved_state(training, identity)
        if state is not None:
            message(f"resuming from stage {state.stage}, step {state.step}")
        run = _Run(settings, base, identity, training, workers, interruption, progress, message, tensorboard)
        trained = _train(run, student, state)
        if workers.is_main:
            message(f"writing {directory}")
            fields = {"base": base.name, "conversion": report.summary()} | trained.facts
            _finish(run, directory, trained, fields)
        workers.wait()
    return LinearizeResult(directory)


@dataclass(frozen=True)
class _Run:
    """What stays the same from the beginning of a run to its end."""

    recipe: Recipe
    base: Teacher
    identity: dict[str, str]
    training: Path
    workers: Workers
    interruption: Interruption
    progress: Progress | None
    message: Callable[[str], None]
    tensorboard: bool


@dataclass(frozen=True)
class _Trained:
    """What training gives: the trained tensors as in an adapter, and weights of the teacher that trained in
    full beside them; or the whole student where all weights trained."""

    tensors: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    lora_scale: float
    student: LawcatForCausalLM | None
    facts: dict[str, Any]


def _train(run: _Run, student: LawcatForCausalLM, state: TrainingState | None) -> _Trained:
    recipe, workers = run.recipe, run.workers
    torch.manual_seed(recipe.seed)
    if workers.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(workers.device)
    dtype = resolve_precision(recipe.precision, workers.device)
    if state is not None:  # "auto" measures; a resumed run keeps what it began with
        dtype = getattr(torch, state.extra["dtype"])
    trains_all = recipe.recovery.steps > 0 and recipe.recovery.train == "all"
    trains_some = recipe.recovery.steps > 0 and bool(recipe.recovery.full_targets)
    if not trains_all:
        cast_teacher_weights(student, dtype)
    # In evaluation mode, here and below: no dropout, so that the teacher inside is the teacher itself.
    student.to(workers.device).eval()
    run.message(f"training on {workers.device} with {str(dtype).removeprefix('torch.')} weights frozen")

    mixture = _mixture(run)
    extra = {"dtype": str(dtype).removeprefix("torch."), "data": mixture.describe()["sha256"]}
    if state is not None and state.extra["data"] != extra["data"]:
        raise CheckpointError(
            f"{run.training} holds a run on other data: a file that the recipe names has changed since. "
            "Restore it, choose another output directory, or remove that one to begin again."
        )
    log = None
    if workers.is_main:
        done = (state.stage, state.step) if state is not None else (0, 0)
        folder = run.training / TENSORBOARD if run.tensorboard else None
        log = TrainingLog(run.training / LOG_NAME, resume_from=done, tensorboard_dir=folder)
    context = StageContext(
        recipe=recipe,
        recipe_fingerprint=run.identity["recipe"],
        teacher_fingerprint=run.identity["teacher"],
        mixture=mixture,
        first_sequence=0,
        checkpoints=run.training / CHECKPOINTS,
        log=log,
        workers=workers,
        interruption=run.interruption,
        progress=run.progress,
        extra=extra,
    )
    # Without its cache, which keeps casts of weights while the context lasts: that is all of training, and
    # casts made without gradient, where a state is carried over, would be used where there is one.
    is_mixed = (trains_all or trains_some) and dtype != torch.float32
    autocast = torch.autocast(workers.device.type, dtype=dtype, enabled=is_mixed, cache_enabled=False)
    lora_scale = 0.0
    tuning, transfer = recipe.teacher_tuning, recipe.attention_transfer
    first_stage = (0 if tuning.steps else 1) if state is None else state.stage
    states = {} if state is None else {state.stage: state}
    recovery = None
    with autocast, log or contextlib.nullcontext():
        if tuning.steps:  # its factors are there in stage 1, too
            torch.manual_seed(recipe.seed + 1)
            recovery = RecoveryModel(student, recipe.recovery)
        if recovery is not None and first_stage == 0:
            train_stage(TeacherTuningStage(recovery, tuning), context, states.get(0))
        context.first_sequence += tuning.steps * tuning.batch_sequences
        if first_stage <= 1:
            train_stage(AttentionTransferStage(student, transfer), context, states.get(1))
        context.first_sequence += transfer.steps * transfer.batch_sequences
        if recipe.recovery.steps:
            torch.manual_seed(recipe.seed + 1)
            recovery = recovery or RecoveryModel(student, recipe.recovery)
            stage_2 = RecoveryStage(recovery, recipe.recovery, recipe.sequence_length)
            train_stage(stage_2, context, states.get(2))
            lora_scale = recovery.lora_scale
    tensors, weights = {}, {}
    for name, parameter in student.named_parameters():
        if is_new_parameter(name) or is_lora_factor(name):
            tensors[plain_name(name)] = parameter.detach().float().cpu()
        elif is_trained_in_full(name):
            weights[plain_name(name)] = parameter.detach().cpu()
    # From the log, which has also what was done before an interruption.
    rows = read_log(run.training / LOG_NAME) if workers.is_main else []
    facts = {
        "training_s": round(sum(row["seconds"] for row in rows), 1),
        "device": _device_name(workers.device),
        "processes": workers.count,
        "precision": str(dtype).removeprefix("torch."),
        "peak_memory_bytes": max(
            [peak_memory_bytes(workers.device), *(row["peak_memory_bytes"] for row in rows)]
        ),
        "data": mixture.describe(),
        "stages": _stage_facts(rows, recipe),
    }
    return _Trained(tensors, weights, lora_scale, student if trains_all else None, facts)


def _finish(run: _Run, directory: Path, trained: _Trained, fields: dict[str, Any]) -> None:
    """Merge and save. The student is made from the teacher and the adapter, so the two cannot differ."""
    base, recipe = run.base, run.recipe
    adapter = None
    if trained.student is None:
        base = load_teacher(base.source)
        student, _ = _untrained(base, recipe)
        # All of the operator's fields, not only those that the recipe sets: defaults may change some day.
        adapter = Adapter(
            base_name=base.name,
            base_fingerprint=run.identity["teacher"],
            operator={name: getattr(student.config, name) for name in OPERATOR_FIELDS},
            softmax_layers=recipe.model.softmax_layers,
            tensors=trained.tensors,
            lora_scale=trained.lora_scale,
            recipe=recipe.to_dict(),
        )
        adapter.apply(student)
        if trained.weights:
            student.load_state_dict(trained.weights, strict=False)
            adapter = None
    else:
        student = trained.student.cpu()
    if adapter is None:
        what = ", ".join(recipe.recovery.full_targets or ()) or "all weights"
        run.message(f"no adapter beside it: {what} trained in full, so it would be as large as the student")
    record = {"lawcat": __version__, "versions": versions(), **run.identity, **fields}

    def add_records(place: Path) -> None:
        write_atomic(place / RECIPE_NAME, recipe.to_yaml())
        write_atomic(place / RUN_NAME, json.dumps(record, indent=2) + "\n")
        write_atomic(place / "README.md", model_card(record, recipe, name=directory.name))
        if (run.training / LOG_NAME).is_file():
            shutil.copy(run.training / LOG_NAME, place / LOG_NAME)

    remove_leftovers(directory.absolute().parent)  # of a run that was killed here
    save_student(student, base.tokenizer, directory, adapter=adapter, add_records=add_records)
    remove_directory(run.training)


def check_config(recipe: Recipe) -> Callable[[Any], None]:
    """Return what refuses a teacher by its configuration, before its weights are fetched."""

    def check(config: Any) -> None:
        student = student_config(
            config, softmax_layers=recipe.model.softmax_layers, **recipe.model.config_fields()
        )
        if LINEAR not in (student.layer_types or ()):
            raise ConfigurationError(
                f"model.softmax_layers names all {student.num_hidden_layers} layers, which leaves nothing to "
                "linearize; leave one out."
            )
        if recipe.recovery.steps and recipe.recovery.train == "lora":
            with torch.device("meta"):
                decoder = LawcatModel(student)
            check_targets(decoder, recipe.recovery)

    return check


def _untrained(base: Teacher, recipe: Recipe) -> tuple[LawcatForCausalLM, ConversionReport]:
    return convert(
        base.model,
        softmax_layers=recipe.model.softmax_layers,
        seed=recipe.seed,
        **recipe.model.config_fields(),
    )


def _mixture(run: _Run) -> Mixture:
    """Build the data; the first process makes what is cached, the others find it."""

    def model() -> Any:
        return load_teacher(run.base.source, device=run.workers.device).model

    assert run.base.tokenizer is not None
    if not run.workers.is_main:
        run.workers.wait()
    mixture = build_mixture(
        run.recipe,
        run.base.tokenizer,
        teacher=model,
        teacher_fingerprint=run.base.fingerprint,
        progress=run.progress,
    )
    if run.workers.is_main:
        run.workers.wait()
    return mixture


def end_process_group() -> None:
    """End the group of processes that train together, when they have trained all they will.

    Each of them calls it, where the others do, too: it waits for them. So none does after an error, when
    another may be in an exchange that waits for this one; whoever started them ends them then. A process
    whose group has ended trains with no others again.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _start_workers() -> Workers:
    from accelerate import Accelerator

    # Several processes without a GPU find each other only where accelerate is told that a CPU is meant.
    is_one_of_several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Workers(Accelerator(cpu=is_one_of_several and not torch.accelerator.is_available()))


def _check_peft(recipe: Recipe) -> None:
    """Say at the start, not after stage 1, that LoRA will need peft."""
    if recipe.recovery.steps and recipe.recovery.train == "lora":
        try:
            metadata.version("peft")
        except metadata.PackageNotFoundError as error:
            raise MissingDependencyError("peft", "distill", "stage 2 with train: lora") from error


def _finished_run(directory: Path) -> dict[str, Any] | None:
    """Return the record of the run that made a directory; None where there is no such directory yet."""
    if not os.path.lexists(directory):
        return None
    record = _read_record(directory)
    if record is None:
        raise ConfigurationError(
            f"{directory} exists and is not a student made by lawcat; nothing was overwritten. Choose "
            "another output directory."
        )
    return record


def _read_record(directory: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((directory / RUN_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _prepare(
    directory: Path,
    training: Path,
    recipe: Recipe,
    identity: dict[str, str],
    base_name: str,
    held: contextlib.ExitStack,
) -> None:
    """Begin a run, or make sure that the one that is there is this one. While `held` is, it is ours alone."""
    record = _read_record(training)
    if record is not None and list_checkpoints(training / CHECKPOINTS):
        _check_same_run(training, record, identity)
    with clear_write_errors(training):
        training.mkdir(parents=True, exist_ok=True)
    if record is None and not (training / LOCK_NAME).is_file():
        _check_empty(training)
    held.enter_context(_only_run(directory, training))
    if os.path.lexists(directory):
        raise BusyError(f"another process has just written {directory}; run the same command again.")
    if (record := _read_record(training)) is not None:
        if _difference(record, identity) is None:
            return
        if list_checkpoints(training / CHECKPOINTS):
            _check_same_run(training, record, identity)
        # A run that failed before it had anything to save, such as one whose data was misspelt.
        _clear(training)
    _check_empty(training)
    record = {"lawcat": __version__, "base": base_name, **identity}
    write_atomic(training / RUN_NAME, json.dumps(record, indent=2) + "\n")
    write_atomic(training / RECIPE_NAME, recipe.to_yaml())


def _clear(training: Path) -> None:
    # What says whose folder this is goes last: one that is cleared by half is known the next time.
    for path in sorted(training.iterdir(), key=lambda path: path.name == RUN_NAME):
        if path.name in (RUN_NAME, RECIPE_NAME, LOG_NAME):
            path.unlink()
        elif path.name in (CHECKPOINTS, TENSORBOARD):
            remove_directory(path)


def _check_empty(training: Path) -> None:
    remove_leftovers(training)
    if any(path.name != LOCK_NAME and not is_being_written(path) for path in training.iterdir()):
        raise ConfigurationError(
            f"{training}, where training keeps its state, exists and is not of a run of lawcat; nothing was "
            "overwritten. Choose another output directory, or move that one away."
        )


@contextlib.contextmanager
def _only_run(directory: Path, training: Path) -> Iterator[None]:
    """Keep other processes out of a run; where one dies, the system frees its lock."""
    from filelock import FileLock, Timeout

    lock = FileLock(training / LOCK_NAME)
    with clear_write_errors(training / LOCK_NAME):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BusyError(
                f"another process is training {directory} at this moment. Wait until it is done, or choose "
                "another output directory."
            ) from None
    try:
        yield
    finally:
        lock.release()


def _remove_rest(directory: Path, training: Path) -> None:
    """Remove what is there still where a run was killed between the last two things it does."""
    if (training / RUN_NAME).is_file():
        with contextlib.suppress(BusyError), _only_run(directory, training):
            remove_directory(training)


def _difference(record: dict[str, Any], identity: dict[str, str]) -> str | None:
    """Return what of a recorded run is not this one's, if anything."""
    return next((what for what, fingerprint in identity.items() if record.get(what) != fingerprint), None)


def _check_same_run(directory: Path, record: dict[str, Any], identity: dict[str, str]) -> None:
    what = _difference(record, identity)
    if what is not None:
        raise CheckpointError(
            f"{directory} holds a run with another {what}; nothing was overwritten. Choose another "
            f"output directory, or remove that one to begin again."
        )


def _saved_state(training: Path, identity: dict[str, str]) -> TrainingState | None:
    checkpoint = latest_checkpoint(training / CHECKPOINTS)
    if checkpoint is None:
        return None
    return load_checkpoint(
        checkpoint, recipe_fingerprint=identity["recipe"], teacher_fingerprint=identity["teacher"]
    )


def _stage_facts(log: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """Return what a reader of the record wants of each stage: steps, losses at both ends, speed."""
    recovery = recipe.recovery
    carried_tokens = (recovery.carried_sequences or recovery.batch_sequences) * recipe.sequence_length
    facts: dict[str, Any] = {}
    for stage in (0, 1, 2):
        rows = [row for row in log if row["stage"] == stage]
        if not rows:
            continue
        median = sorted(row["seconds"] for row in rows)[len(rows) // 2]
        last, steady = rows[-10:], rows[1:] or rows
        facts[str(stage)] = {
            "steps": len(rows),
            "tokens": sum(row["tokens"] for row in rows),
            # Of a step that carries a state over, the gradient reaches the last segment only.
            "trained_tokens": sum(
                carried_tokens if stage == 2 and "cross_entropy" not in row else row["tokens"] for row in rows
            ),
            "seconds": round(sum(row["seconds"] for row in rows), 2),
            "first_loss": rows[0]["loss"],
            "last_loss": sum(row["loss"] for row in last) / len(last),
            "first_step_s": round(rows[0]["seconds"], 2),
            "median_step_s": round(median, 4),
            "tokens_per_s": round(
                sum(row["tokens"] for row in steady) / max(sum(row["seconds"] for row in steady), 1e-9)
            ),
        }
        if "layer_losses" in rows[0]:
            facts[str(stage)]["first_layer_losses"] = rows[0]["layer_losses"]
            by_layer = zip(*(row["layer_losses"] for row in last), strict=True)
            facts[str(stage)]["last_layer_losses"] = [sum(losses) / len(losses) for losses in by_layer]
    return facts


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
