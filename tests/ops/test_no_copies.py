"""What heads share is made once: no intermediate result is as large as k, v or the gate for every head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixer_cases import MixerCase
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from comparison import assert_near
from lawcat.ops import gated_linear_attention, gated_linear_attention_step, linear_attention_mixer
from lawcat.ops.convolution import causal_conv1d_of_heads, last_inputs

KV_HEADS, HEADS, WIDTH = 2, 8, 32


class NewMemory(TorchDispatchMode):
    """Notes the operations that give tensors in memory of their own, and how many bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.made.append((str(function), t.untyped_storage().nbytes()))
        return result

    def larger_than(self, size: int) -> list[tuple[str, int]]:
        return [(name, nbytes) for name, nbytes in self.made if nbytes > size]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("state_heads", [HEADS, KV_HEADS])
@pytest.mark.parametrize("tokens", [256, 2304])  # within a segment, and several of them
def test_the_mixer(tokens: int, state_heads: int, needs_gradient: bool, dtype: torch.dtype) -> None:
    case = MixerCase(
        tokens, heads=HEADS, kv_heads=KV_HEADS, state_heads=state_heads, width=WIDTH, feature_dim=WIDTH
    )
    tensors = case.tensors(torch.float32)
    tensors |= {name: tensors[name].detach().to(dtype) for name in ("q", "k", "v")}
    with torch.set_grad_enabled(needs_gradient), NewMemory() as memory:
        output, *_ = linear_attention_mixer(**tensors, backend="torch")
    assert output.requires_grad is needs_gradient
    # As large as the output is an expanded copy in the dtype of the inputs.
    large = memory.larger_than(int(0.9 * tokens * HEADS * WIDTH * dtype.itemsize))
    assert len(large) == 1, large


@pytest.mark.parametrize("tokens", [1, 40])
def test_values_and_decays_that_heads_share(tokens: int) -> None:
    """The recurrence alone, of many tokens and of one, gives what it gives of copies, and makes none."""
    q, k = torch.rand(2, 2, tokens, HEADS, WIDTH, dtype=torch.float64)
    v, log_decay = torch.randn(2, 2, tokens, KV_HEADS, WIDTH, dtype=torch.float64)
    log_decay = -0.1 * log_decay.abs()
    state = torch.rand(2, HEADS, WIDTH, WIDTH + 1, dtype=torch.float64)
    copies = [t.repeat_interleave(HEADS // KV_HEADS, dim=2) for t in (v, log_decay)]
    for backend in ("torch", "reference"):
        options = {"initial_state": state, "backend": backend}
        found = gated_linear_attention(q, k, v, log_decay, **options)
        expected = gated_linear_attention(q, k, *copies, **options)
        for actual, wanted in zip(found, expected, strict=True):
            assert_near(actual, wanted, 1e-13)
    if tokens == 1:
        found = gated_linear_attention_step(q, k, v, log_decay, state)
        expected = gated_linear_attention_step(q, k, *copies, state)
        for actual, wanted in zip(found, expected, strict=True):
            assert_near(actual, wanted, 1e-13)


def test_a_convolution() -> None:
    """Its result is a head's own; its input is not."""
    x, taps = torch.randn(1, 256, KV_HEADS, WIDTH), torch.randn(HEADS * WIDTH, 4)
    with NewMemory() as memory:
        y, _ = causal_conv1d_of_heads(x, taps)
    assert len(memory.larger_than(y.nbytes // 2)) == 1, memory.made


@pytest.mark.parametrize("heads", [KV_HEADS, HEADS])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("taps", [2, 4])
def test_what_a_convolution_leaves_for_the_next_call(taps: int, batch: int, heads: int) -> None:
    """Copied once, heads that share an input included, and apart from the input, which may then be freed."""
    x = torch.randn(batch, 9, KV_HEADS, WIDTH)
    with NewMemory() as memory:
        found = last_inputs(x, heads, taps - 1, None)
    assert [nbytes for _, nbytes in memory.made] == [found.nbytes], memory.made
    expected = x[:, 10 - taps :].repeat_interleave(heads // KV_HEADS, dim=2).flatten(2).transpose(1, 2)
    assert torch.equal(found, expected)
    assert found.is_contiguous()
