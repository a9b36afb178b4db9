"""The step exports as one graph, and torch.compile takes both forms without a break."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case
from torch import Tensor
from torch._subclasses import FakeTensorMode

from comparison import assert_near
from lawcat.ops import causal_conv1d, gated_linear_attention, gated_linear_attention_step


class Step(torch.nn.Module):
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        return gated_linear_attention_step(q, k, v, log_decay, state)


class Convolution(torch.nn.Module):
    def forward(self, x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(x, weight, state)


def inputs(tokens: int = 1) -> list[Tensor]:
    return [t.detach() for t in Case(tokens, "moderate").inputs(torch.float32).values()]


@pytest.mark.parametrize("strict", [True, False])
def test_the_step_exports(strict: bool) -> None:
    program = torch.export.export(Step(), tuple(inputs()), strict=strict)
    # Nothing but tensor operations: no autocast region, no assertion on data.
    kinds = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(kind.startswith("aten.") for kind in kinds), kinds
    expected = Step()(*inputs())
    for actual, wanted in zip(program.module()(*inputs()), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_the_step_exports_for_any_batch() -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Step(), tuple(inputs()), dynamic_shapes=[{0: batch}] * 5)
    tripled = [t.repeat_interleave(3, dim=0) for t in inputs()]
    for actual, wanted in zip(program.module()(*tripled), Step()(*tripled), strict=True):
        assert_near(actual, wanted, 1e-6)


def test_the_convolution_exports() -> None:
    arguments = (torch.randn(2, 1, 3), torch.randn(3, 4), torch.randn(2, 3, 3))
    program = torch.export.export(Convolution(), arguments)
    for actual, wanted in zip(program.module()(*arguments), Convolution()(*arguments), strict=True):
        assert torch.equal(actual, wanted)


def test_the_step_compiles_in_one_graph() -> None:
    compiled = torch.compile(gated_linear_attention_step, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(compiled(*inputs()), gated_linear_attention_step(*inputs()), strict=True):
        assert_near(actual, wanted, 1e-6)


def test_a_known_bound_lets_the_chunked_form_compile_in_one_graph() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return gated_linear_attention(q, k, v, log_decay, initial_state=state, min_log_decay=-1.0)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in inputs(40)]
    for actual, wanted in zip(compiled(*leaves), function(*leaves), strict=True):
        assert_near(actual, wanted, 1e-6)
    gradients, expected = (
        torch.autograd.grad(sum(t.sum() for t in form(*leaves)), leaves) for form in (compiled, function)
    )
    for actual, wanted in zip(gradients, expected, strict=True):
        assert_near(actual, wanted, 1e-5)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_shapes_without_data(kind: str) -> None:
    """Shapes and dtypes, as loading and planning of large models need them."""
    given = inputs(40)
    with FakeTensorMode() if kind == "fake" else torch.device("meta") as mode:
        without = (lambda t: t.to("meta")) if kind == "meta" else mode.from_tensor
        q, k, v, log_decay, state = map(without, given)
        output, state_after = gated_linear_attention(
            q, k, v, log_decay, initial_state=state, min_log_decay=-1.0
        )
    assert output.shape == (*v.shape[:2], q.shape[2], v.shape[3])
    assert state_after.shape == state.shape
