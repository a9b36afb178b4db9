"""LoRA layers in half precision against the definition in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from comparison import assert_near
from lawcat.distill.lora import HalfLoraLinear, use_half_precision


def layers(rank: int, *, bias: bool, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return peft's layer and ours with the same weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, bias=bias)).requires_grad_(False)
    get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"]))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 4)
    model[0].base_layer.to(dtype)
    assert type(model[0]) is Linear
    ours = copy.deepcopy(model)
    use_half_precision(ours)
    assert type(ours[0]) is HalfLoraLinear
    return model[0], ours[0]


def run(layer: Any, x: Tensor, needs_input_grad: bool) -> dict[str, Tensor]:
    x = x.clone().requires_grad_(needs_input_grad)
    weights = torch.randn(*x.shape[:-1], 40, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    output = layer(x)
    torch.autograd.backward((output * weights).sum())
    found = {"output": output.detach(), "A": layer.lora_A.default.weight.grad}
    found["B"] = layer.lora_B.default.weight.grad
    if needs_input_grad:
        assert x.grad is not None
        found["x"] = x.grad
    return found


@pytest.mark.parametrize("rank", [1, 8, 12])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("needs_input_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_and_gradients(rank: int, bias: bool, needs_input_grad: bool, dtype: torch.dtype) -> None:
    theirs, ours = layers(rank, bias=bias, dtype=dtype)
    x = torch.randn(3, 50, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = copy.deepcopy(theirs).double()
    expected = run(exact, x.double(), needs_input_grad)
    for layer, tolerance in ((ours, 0.02), (theirs, 0.02)):
        found = run(layer, x, needs_input_grad)
        assert found.keys() == expected.keys()
        assert found["output"].dtype == dtype
        assert found["A"].dtype == found["B"].dtype == torch.float32
        for name, value in found.items():
            assert_near(value, expected[name], tolerance, name)
    assert ours.base_layer.weight.grad is None


def test_elsewhere_it_is_pefts_own() -> None:
    for dtype, autocast in ((torch.float32, False), (torch.bfloat16, True), (torch.float32, True)):
        theirs, ours = layers(4, bias=True, dtype=dtype)
        x = torch.randn(2, 7, 24, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(ours(x), theirs(x))
    theirs, ours = layers(4, bias=True, dtype=torch.bfloat16)
    x = torch.randn(2, 7, 24, dtype=torch.bfloat16)
    ours._disable_adapters = True
    assert torch.equal(ours(x), ours.base_layer(x))
