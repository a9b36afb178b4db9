"""The models that are measured: ours and the teacher, in each of the ways they can run here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from lawcat.bench.limits import timed_backends
from lawcat.bench.shapes import MixerShape, teacher_config
from lawcat.convert.initialize import convert
from lawcat.convert.load import load_model
from lawcat.model.modeling_lawcat import LawcatForCausalLM
from lawcat.ops import use_backend


@dataclass(frozen=True)
class Subject:
    """A model and a way to run it.

    Attributes:
        name: In tables.
        is_ours: Whether its attention is lawcat's.
        model: In eval mode.
        running: A context to run it in, anew each time.
        reason: Why it cannot run here; None when it can.
        backend: Which of our backends it runs.
    """

    name: str
    is_ours: bool
    model: Any
    running: Callable[[], contextlib.AbstractContextManager[object]]
    reason: str | None = None
    backend: str | None = None


@dataclass(frozen=True)
class Pair:
    """A student and what it is measured against, their weights shared.

    Attributes:
        name: In tables.
        student: Ours.
        teacher: The model it was made from; the student itself, where it alone is there.
    """

    name: str
    student: LawcatForCausalLM
    teacher: Any

    def mixer_shape(self) -> MixerShape:
        """Return the heads and widths of the student's linear layers."""
        return MixerShape.of(self.name, self.student.config)

    def subjects(self, backends: tuple[str, ...] | None = None) -> list[Subject]:
        """Return every way to run the two.

        Args:
            backends: Which of our backends; all but the slow definition when None.
        """
        device = next(self.student.parameters()).device
        names = backends or timed_backends()
        ours = [
            Subject(f"lawcat ({name})", True, self.student, _backend_context(name), backend=name)
            for name in names
        ]
        return ours + [
            Subject(f"teacher, {name}", False, self.teacher, self._teacher_context(name), reason)
            for name, reason in _attentions(device, next(self.student.parameters()).dtype)
        ]

    def _teacher_context(self, name: str) -> Callable[[], contextlib.AbstractContextManager[object]]:
        @contextlib.contextmanager
        def running() -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                if self.teacher is self.student:
                    stack.enter_context(self.student.teacher_mode())
                config = self.teacher.config
                before = config._attn_implementation
                if name == "flash-attn":
                    if before != "flash_attention_2":  # it costs time, which would be counted
                        self.teacher.set_attn_implementation("flash_attention_2")
                        stack.callback(self.teacher.set_attn_implementation, before)
                else:
                    config._attn_implementation = _sdpa_of(config)
                    stack.callback(setattr, config, "_attn_implementation", before)
                if name in _SDPA:
                    stack.enter_context(sdpa_kernel(_SDPA[name]))
                yield

        return running


_SDPA = {
    "FlashAttention-2 (torch SDPA)": [SDPBackend.FLASH_ATTENTION],
    "cuDNN attention (torch SDPA)": [SDPBackend.CUDNN_ATTENTION],
}


_UNMASKED_SDPA = "lawcat_bench_sdpa"
AttentionInterface.register(_UNMASKED_SDPA, sdpa_attention_forward)
AttentionMaskInterface.register(_UNMASKED_SDPA, lambda *_, **__: None)


def _sdpa_of(config: Any) -> str:
    """Return the name of SDPA that is never given a mask, for a model without a window.

    While a CUDA graph is captured, transformers (5.17) gives SDPA a mask of all pairs of tokens, with which
    FlashAttention does not run; the teacher was 9 times slower than it is at 64K. Nothing here is padded, so
    that ``is_causal`` says all.
    """
    if getattr(config, "sliding_window", None) is not None:
        return "sdpa"
    return _UNMASKED_SDPA


def _attentions(device: torch.device, dtype: torch.dtype) -> list[tuple[str, str | None]]:
    """Return the softmax attentions that are measured on a device, and why one cannot run."""
    if device.type != "cuda":
        return [("torch SDPA", None)]
    wrong = None if dtype in (torch.bfloat16, torch.float16) else "runs in bfloat16 and float16 only"
    absent = None if util.find_spec("flash_attn") else "the package 'flash_attn' is not installed"
    return [*((name, wrong) for name in _SDPA), ("flash-attn", absent or wrong)]


def _backend_context(name: str) -> Callable[[], contextlib.AbstractContextManager[object]]:
    return lambda: use_backend(name)


def random_pair(shape: str, *, dtype: torch.dtype, device: torch.device) -> Pair:
    """Return a teacher of a named shape with random weights and its untrained student.

    Args:
        shape: One of ``shape_names()``.
        dtype: Of the weights; the student's new parameters are float32.
        device: Where.

    Raises:
        ConfigurationError: for an unknown shape.

    Example:
        >>> pair = random_pair("tiny", dtype=torch.float32, device=torch.device("cpu"))
        >>> pair.student.config.num_hidden_layers
        2
    """
    from transformers import AutoModelForCausalLM

    config = teacher_config(shape)
    with _building(dtype, device):
        teacher = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return _converted(shape, teacher.eval(), dtype, device)


def load_pair(name: str, *, dtype: torch.dtype | None, device: torch.device) -> Pair:
    """Return a saved model with what it is measured against.

    Of a teacher that is its untrained student: what that computes does not depend on its values. Of a student
    or adapter it is itself with the teacher's softmax attention.

    Args:
        name: A directory, or anything that is accepted as a teacher.
        dtype: Of the weights; as saved when None.
        device: Where.

    Raises:
        CheckpointError: for a damaged student or adapter.
        TeacherError: for a teacher that cannot be found, read or converted.
    """
    loaded = load_model(name, dtype=dtype, device=device)
    title = Path(name).name or name
    if isinstance(loaded.model, LawcatForCausalLM):
        return Pair(title, loaded.model, loaded.model)
    return _converted(title, loaded.model, next(loaded.model.parameters()).dtype, device)


def _converted(name: str, teacher: Any, dtype: torch.dtype, device: torch.device) -> Pair:
    with _building(dtype, device):
        student, _ = convert(teacher)
    return Pair(name, student.to(device), teacher)


@contextlib.contextmanager
def _building(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Make new tensors in their place: a float32 model of 7 B parameters on the CPU would be 28 GB."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
