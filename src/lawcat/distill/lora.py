"""LoRA layers whose frozen weights are in half precision, without copies of their inputs in float32.

peft computes such a layer's factors in float32: of each input a copy, of each output four. For a small model
on a GPU that is as much time as all else. Here the products are taken in the weights' precision, summed in
float32 inside each product as ever; factors and optimizer stay float32.
"""

# mypy is told to leave peft out.
# mypy: disallow-subclassing-any=False, disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_HALF = (torch.bfloat16, torch.float16)
# Products of other ranks are slow on tensor cores.
_RANK_MULTIPLE = 8


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        missing = -a.shape[0] % _RANK_MULTIPLE
        a_half = F.pad(a.to(x.dtype), (0, 0, 0, missing))  # [rank, in]
        b_half = F.pad((b * scale).to(x.dtype), (0, missing))  # [out, rank]
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ a_half.T
        output = F.linear(rows, weight, bias).addmm_(inner, b_half.T)
        ctx.save_for_backward(rows, weight, inner, a_half, b_half)
        ctx.rank, ctx.scale = a.shape[0], scale
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, inner, a_half, b_half = ctx.saved_tensors
        shape = (*grad.shape[:-1], rows.shape[1])
        grad = grad.reshape(-1, grad.shape[-1])
        inner_grad = grad @ b_half
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad @ weight).addmm_(inner_grad, a_half).view(shape)
        a_grad = (inner_grad.T @ rows)[: ctx.rank].float()
        b_grad = (grad.T @ inner)[:, : ctx.rank].float() * ctx.scale
        return x_grad, None, None, a_grad, b_grad, None


class HalfLoraLinear(Linear):
    """peft's layer with one set of factors; its own ``forward`` where weights are not in half precision."""

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """Return ``x W^T + bias + scale * x A^T B^T`` [..., out] for x [..., in].

        Source: LoRA (arXiv 2106.09685), equation 3.
        """
        base = self.base_layer
        is_plain = not arguments and not named and not self.merged and not self.disable_adapters
        if (
            not is_plain
            or x.dtype not in _HALF
            or base.weight.dtype != x.dtype
            or torch.is_autocast_enabled(x.device.type)
        ):
            output: Tensor = super().forward(x, *arguments, **named)
            return output
        (name,) = self.active_adapters
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        product: Tensor = _LoraProduct.apply(x, base.weight, base.bias, a, b, self.scaling[name])
        return product


def use_half_precision(model: nn.Module) -> None:
    """Turn peft's LoRA layers of a model into those above, in place.

    Args:
        model: After ``peft.get_peft_model``, of a configuration with neither dropout nor a variant as DoRA.
    """
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = HalfLoraLinear
