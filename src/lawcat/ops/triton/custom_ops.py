"""The kernels as operators of PyTorch's dispatcher: a compiler takes them into its graph as they are.

``torch.compile`` cannot look into a launch. What it traces calls these operators, what it has compiled runs
them; they do what eager code does, which calls it directly. Legend: ``ops/shapes.py``.
"""

# mypy is told to leave triton out, and PyTorch has no types for its operators' registration.
# mypy: disable-error-code="no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, library

from ...errors import BackendError
from .decode_step import decode_step
from .layout import MixerOptions
from .mixer import MixerInputs, forward, gradients_of, make_plan, saved_numbers
from .support import on_device_of

# The first fields of MixerInputs, in their order: those that a gradient is taken of.
DIFFERENTIABLE = ("q", "k", "v", "gate", "q_taps", "k_taps", "map_weight", "initial_state")

# The fields of MixerInputs in their order, then those of MixerOptions but for the last; and their numbers.
_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor gate, Tensor? q_taps, Tensor? k_taps, Tensor? map_weight, "
    "Tensor? initial_state, Tensor? q_before, Tensor? k_before, Tensor? keep, SymInt[]? boundaries, "
    "SymInt num_state_heads, bool is_logit, float gate_divisor, float min_log_decay, bool normalize, "
    "float eps"
)
_NUM_INPUTS = len(fields(MixerInputs))
_NUM_TENSORS = _NUM_INPUTS - 2
_NUM_ARGUMENTS = _NUM_INPUTS + len(fields(MixerOptions)) - 1


def _call(arguments: Sequence[Any]) -> tuple[MixerInputs, MixerOptions]:
    """Return what the arguments of ``_CALL`` stand for."""
    inputs = MixerInputs(*arguments[:_NUM_INPUTS])
    if inputs.boundaries is not None:
        inputs.boundaries = tuple(inputs.boundaries)
    return inputs, MixerOptions(*arguments[_NUM_INPUTS:])


@library.custom_op(
    "lawcat::mixer",
    mutates_args=(),
    schema=f"({_CALL}, bool save) -> (Tensor output, Tensor final, Tensor saved)",
)
def _mixer(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, final state and, with ``save``, what the backward needs, else nothing in its place."""
    *call, save = arguments
    inputs, options = _call(call)
    with on_device_of(inputs.q):
        result = forward(make_plan(inputs, options), save_sums=save)
    return result.output, result.final, result.saved if save else result.saved.new_empty(0)


@_mixer.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *call, save = arguments
    inputs, options = _call(call)
    q, v, weight, n = inputs.q, inputs.v, inputs.map_weight, inputs.num_state_heads
    sequences = q.shape[0] if inputs.boundaries is None else len(inputs.boundaries) - 1
    width = q.shape[3] if weight is None else 2 * weight.shape[2]
    output = v.new_empty(*q.shape[:3], v.shape[3])
    final = v.new_empty(sequences, n, width, v.shape[3] + 1, dtype=torch.float32)
    return output, final, final.new_empty(saved_numbers(inputs, options) if save else 0)


@library.custom_op(
    "lawcat::mixer_backward",
    mutates_args=(),
    schema=f"({_CALL}, Tensor output, Tensor saved, Tensor? grad_output, Tensor? grad_final) -> Tensor[]",
)
def _mixer_backward(*arguments: Any) -> list[Tensor]:
    """Return the gradients of those of ``DIFFERENTIABLE`` that are there."""
    inputs, options = _call(arguments[:_NUM_ARGUMENTS])
    gradients = gradients_of(inputs, options, *arguments[_NUM_ARGUMENTS:])
    return [getattr(gradients, name) for name in DIFFERENTIABLE if getattr(inputs, name) is not None]


@_mixer_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    there = (t for t in arguments[: len(DIFFERENTIABLE)] if t is not None)
    return [t.new_empty(t.shape) for t in there]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    result, _, saved = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], result, saved)
    ctx.constants = inputs[_NUM_TENSORS:_NUM_ARGUMENTS]


def _differentiate(ctx: Any, grad_output: Tensor | None, grad_final: Tensor | None, _: None) -> Any:
    *tensors, output, saved = ctx.saved_tensors
    found = torch.ops.lawcat.mixer_backward(*tensors, *ctx.constants, output, saved, grad_output, grad_final)
    gradients = iter(found)
    of_tensors = [None if t is None else next(gradients) for t in tensors[: len(DIFFERENTIABLE)]]
    return (*of_tensors, *[None] * (_NUM_ARGUMENTS + 1 - len(of_tensors)))


_mixer.register_autograd(_differentiate, setup_context=_save_for_backward)


def traced_mixer(
    tensors: Sequence[Tensor | None],
    boundaries: tuple[int, ...] | None,
    num_state_heads: int,
    options: MixerOptions,
    *,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Return output and final state of a call that is being traced.

    Args:
        tensors: Those of ``MixerInputs``, contiguous.
        boundaries: See there.
        num_state_heads: See there.
        options: With the table's configuration.
        save: There may be a backward.
    """
    if options.configuration is not None:
        raise BackendError("a configuration other than the table's cannot be compiled; call without it.")
    output, final, _ = torch.ops.lawcat.mixer(
        *tensors, boundaries, num_state_heads, options.is_logit, options.gate_divisor, options.min_log_decay,
        options.normalize, options.eps, save,
    )  # fmt: skip
    return output, final


@library.custom_op(
    "lawcat::decode_step",
    mutates_args=("state", "q_inputs", "k_inputs"),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? gate_logits, Tensor(a!) state, Tensor(b!)? q_inputs, "
        "Tensor(c!)? k_inputs, Tensor? q_conv, Tensor? k_conv, Tensor feature_weight, float gate_divisor, "
        "float min_log_decay, bool normalize, float eps) -> Tensor"
    ),
)
def _decode_step(*arguments: Any) -> Tensor:
    *tensors, gate_divisor, min_log_decay, normalize, eps = arguments
    return decode_step(
        *tensors, gate_divisor=gate_divisor, min_log_decay=min_log_decay, normalize=normalize, eps=eps
    )


@_decode_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(q.shape)


def traced_decode_step(*arguments: Any) -> Tensor:
    """Return what ``decode_step`` does, whose arguments but for the last these are, while it is traced."""
    output: Tensor = torch.ops.lawcat.decode_step(*arguments)
    return output
