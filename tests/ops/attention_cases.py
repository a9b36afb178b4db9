"""Inputs of gated linear attention, and the definition's answer to them in float64 with every gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lawcat.ops import gated_linear_attention_reference

NAMES = ("q", "k", "v", "log_decay", "initial_state")
GRADIENTS = tuple(f"gradient of {name}" for name in NAMES)


def _mixed(shape: tuple[int, ...], *choices: float) -> Tensor:
    return torch.tensor(choices, dtype=torch.float64)[torch.randint(len(choices), shape)]


# Logarithms of decays: from none, through the model's bound of -5, to what no factor in float32 can hold.
DECAYS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "none": lambda shape: torch.zeros(shape, dtype=torch.float64),
    "vanishing": lambda shape: torch.full(shape, -1e-6, dtype=torch.float64),
    "moderate": lambda shape: -0.2 * torch.rand(shape, dtype=torch.float64),
    "bound": lambda shape: torch.full(shape, -5.0, dtype=torch.float64),
    "up to bound": lambda shape: -5 * torch.rand(shape, dtype=torch.float64) ** 4,
    "bound or slow": lambda shape: _mixed(shape, -5.0, -1e-3, -1e-5),
    "-20": lambda shape: torch.full(shape, -20.0, dtype=torch.float64),
    "-100": lambda shape: torch.full(shape, -100.0, dtype=torch.float64),
    "-inf": lambda shape: torch.full(shape, -torch.inf, dtype=torch.float64),
    "-inf, 0 or slow": lambda shape: _mixed(shape, -torch.inf, 0.0, -1e-3),
    "everything": lambda shape: _mixed(shape, -torch.inf, -100.0, -5.0, -0.1, -1e-3, 0.0),
}


@dataclass(frozen=True)
class Case:
    """The arguments of one call; all hashable, so that answers are computed once."""

    tokens: int
    decay: str
    num_query_heads: int = 4
    num_state_heads: int = 2
    has_state: bool = True
    is_per_head: bool = False
    normalize: bool = True

    batch: int = 2
    feature_dim: int = 6
    value_dim: int = 5

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
        """Return fresh leaves q, k, v, log_decay and initial_state (None without one)."""
        torch.manual_seed(1)
        width = 1 if self.is_per_head else self.feature_dim
        by_state_head = (self.batch, self.tokens, self.num_state_heads)
        q = torch.randn(self.batch, self.tokens, self.num_query_heads, self.feature_dim, dtype=torch.float64)
        k = torch.randn(*by_state_head, self.feature_dim, dtype=torch.float64)
        tensors = {
            "q": q.softmax(-1),
            "k": k.softmax(-1),
            "v": torch.randn(*by_state_head, self.value_dim, dtype=torch.float64),
            "log_decay": DECAYS[self.decay]((*by_state_head, width)),
        }
        # As three earlier tokens leave it: the normaliser and what it divides belong together.
        earlier = (self.batch, self.num_state_heads, 3)
        values = torch.randn(*earlier, self.value_dim, dtype=torch.float64)
        values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
        state = torch.rand(*earlier, self.feature_dim, dtype=torch.float64).transpose(-1, -2) @ values
        leaves: dict[str, Tensor | None] = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
        leaves["initial_state"] = state.to(dtype).requires_grad_() if self.has_state else None
        return leaves

    @functools.cached_property
    def weights(self) -> tuple[Tensor, Tensor]:
        """What output and state are multiplied with before they are summed to a loss."""
        torch.manual_seed(2)
        output = torch.randn(
            self.batch, self.tokens, self.num_query_heads, self.value_dim, dtype=torch.float64
        )
        shape = (self.batch, self.num_state_heads, self.feature_dim, self.value_dim + 1)
        return output, torch.randn(shape, dtype=torch.float64)


Function = Callable[..., tuple[Tensor, Tensor]]


def run(function: Function, case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return output, state and the gradients of all inputs."""
    inputs = case.inputs(dtype)
    arguments = dict(inputs)
    q, k, v, log_decay = (arguments.pop(name) for name in NAMES[:4])
    output, state = function(q, k, v, log_decay, normalize=case.normalize, **arguments)
    output_weights, state_weights = (weights.to(dtype) for weights in case.weights)
    loss = (output * output_weights).sum() + (state * state_weights).sum()
    leaves = [leaf for leaf in inputs.values() if leaf is not None]
    gradients = torch.autograd.grad(loss, leaves)
    return {"output": output, "state": state, **dict(zip(GRADIENTS, gradients, strict=False))}


@functools.cache
def answer(case: Case) -> dict[str, Tensor]:
    """Return what the definition gives in float64."""
    return run(gated_linear_attention_reference, case)
