"""The kernels as differentiable functions of tensors. Legend: ``ops/shapes.py``."""

# mypy is told to leave triton out, and autograd.Function has no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .mixer import Forward, MixerInputs, MixerOptions, Plan, backward, forward, make_plan

# The tensors that a gradient is taken of, in the order of MixerFunction's arguments.
_DIFFERENTIABLE = ("q", "k", "v", "gate", "q_taps", "k_taps", "map_weight", "initial_state")
_CONSTANT = ("q_before", "k_before", "keep")


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which kernels are launched on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class MixerFunction(torch.autograd.Function):
    """Output and final state of the kernels; see ``run``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Arguments: the tensors of ``MixerInputs``, then boundaries, state heads and options."""
        *tensors, boundaries, num_state_heads, options = arguments
        plan = _plan(tensors, boundaries, num_state_heads, options)
        with _on(plan.inputs.q.device):
            result = forward(plan, save_sums=True)
        ctx.save_for_backward(
            *tensors, result.output, result.states, result.normalisers, result.strongest, result.weight_sums
        )
        ctx.constants = boundaries, num_state_heads, options
        ctx.set_materialize_grads(False)
        return result.output, result.final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of ``forward``'s arguments."""
        count = len(_DIFFERENTIABLE) + len(_CONSTANT)
        # Asked for once: checkpointed ones may not be unpacked a second time.
        saved_tensors = ctx.saved_tensors
        tensors = saved_tensors[:count]
        output, states, normalisers, strongest, weight_sums = saved_tensors[count:]
        plan = _plan(tensors, *ctx.constants)
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        if grad_final is not None:
            grad_final = grad_final.float().contiguous()
        saved = Forward(output, output, states, normalisers, strongest, weight_sums)
        with _on(output.device):
            gradients = backward(plan, saved, grad_output.contiguous(), grad_final)
        wanted = [
            getattr(gradients, name) if needed else None
            for name, needed in zip(_DIFFERENTIABLE, ctx.needs_input_grad, strict=False)
        ]
        return (*wanted, *[None] * (len(_CONSTANT) + 3))


def _plan(
    tensors: Any, boundaries: tuple[int, ...] | None, num_state_heads: int, options: MixerOptions
) -> Plan:
    named = dict(zip((*_DIFFERENTIABLE, *_CONSTANT), tensors, strict=True))
    return make_plan(MixerInputs(**named, boundaries=boundaries, num_state_heads=num_state_heads), options)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def run(inputs: MixerInputs, options: MixerOptions) -> tuple[Tensor, Tensor]:
    """Return output [B, T, H, D] and final state [S, N, F, D + 1] float32 of checked inputs.

    They may be laid out in any way; q, k and v may differ in dtype.
    """
    dtype = torch.promote_types(torch.promote_types(inputs.q.dtype, inputs.k.dtype), inputs.v.dtype)
    output_dtype = inputs.v.dtype
    tensors = []
    for name in (*_DIFFERENTIABLE, *_CONSTANT):
        tensor = getattr(inputs, name)
        if tensor is not None:
            if name in ("q", "k", "v"):
                tensor = tensor.to(dtype)
            elif name == "initial_state":
                tensor = tensor.float()
            tensor = tensor.contiguous()
        tensors.append(tensor)
    constants = inputs.boundaries, inputs.num_state_heads, options
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        output, state = MixerFunction.apply(*tensors, *constants)
    else:
        plan = _plan(tensors, *constants)
        with _on(plan.inputs.q.device):
            result = forward(plan)
        output, state = result.output, result.final
    return output.to(output_dtype), state
