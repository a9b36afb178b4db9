"""The kernels as differentiable functions of tensors. Legend: ``ops/shapes.py``."""

# mypy is told to leave triton out, and autograd.Function has no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .custom_ops import DIFFERENTIABLE, traced_mixer
from .mixer import MixerInputs, MixerOptions, forward, gradients_of, make_plan
from .support import on_device_of

# The fields of MixerInputs in their order, after those that a gradient is taken of: the other tensors.
_CONSTANT = ("q_before", "k_before", "keep")


class MixerFunction(torch.autograd.Function):
    """Output and final state of the kernels; see ``run``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Arguments: the tensors of ``MixerInputs``, then boundaries, state heads and options."""
        *inputs, options = arguments
        with on_device_of(inputs[0]):
            result = forward(make_plan(MixerInputs(*inputs), options), save_sums=True)
        *tensors, boundaries, num_state_heads = inputs
        ctx.save_for_backward(*tensors, result.output, result.saved)
        ctx.constants = boundaries, num_state_heads, options
        ctx.set_materialize_grads(False)
        return result.output, result.final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of ``forward``'s arguments."""
        count = len(DIFFERENTIABLE) + len(_CONSTANT)
        # Asked for once: checkpointed ones may not be unpacked a second time.
        saved_tensors = ctx.saved_tensors
        *constants, options = ctx.constants
        inputs = MixerInputs(*saved_tensors[:count], *constants)
        output, saved = saved_tensors[count:]
        gradients = gradients_of(inputs, options, output, saved, grad_output, grad_final)
        wanted = [
            getattr(gradients, name) if needed else None
            for name, needed in zip(DIFFERENTIABLE, ctx.needs_input_grad, strict=False)
        ]
        return (*wanted, *[None] * (len(_CONSTANT) + 3))


def run(inputs: MixerInputs, options: MixerOptions) -> tuple[Tensor, Tensor]:
    """Return output [B, T, H, D] and final state [S, N, F, D + 1] float32 of checked inputs.

    They may be laid out in any way; q, k and v may differ in dtype.
    """
    q, k, v, state = inputs.q, inputs.k, inputs.v, inputs.initial_state
    output_dtype = v.dtype
    if not q.dtype == k.dtype == v.dtype:
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    tensors = (
        q, k, v, inputs.gate, inputs.q_taps, inputs.k_taps, inputs.map_weight,
        None if state is None else state.float(), inputs.q_before, inputs.k_before, inputs.keep,
    )  # fmt: skip
    arguments = [None if t is None else t.contiguous() for t in tensors]
    constants = inputs.boundaries, inputs.num_state_heads
    wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments)
    if torch.compiler.is_compiling():
        # Only then: the dispatcher would cost an eager call some 20 microseconds.
        output, final = traced_mixer(arguments, *constants, options, save=wants_gradient)
    elif wants_gradient:
        output, final = MixerFunction.apply(*arguments, *constants, options)
    else:
        with on_device_of(q):
            result = forward(make_plan(MixerInputs(*arguments, *constants), options))  # type: ignore[arg-type, call-arg]
        output, final = result.output, result.final
    return output.to(output_dtype), final
