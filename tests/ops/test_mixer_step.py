"""One token in few operations: the same as the mixer gives of one token."""

from __future__ import annotations

import pytest
import torch
from mixer_cases import MixerCase, answer, run

from comparison import assert_near
from lawcat.ops.mixer_step import linear_attention_mixer_step

CASES = (
    MixerCase(1),
    MixerCase(1, taps=2, batch=3),
    MixerCase(1, heads=4, kv_heads=2, state_heads=4, batch=2),
    MixerCase(1, heads=6, kv_heads=1, state_heads=3, feature_dim=20, width=12),
    MixerCase(1, heads=4, kv_heads=2, state_heads=2, batch=2),
    MixerCase(1, taps=None, gate_width=1, batch=2, kv_heads=2),
    MixerCase(1, normalize=False, min_log_decay=-0.1, gate_scale=30.0),
)


def step(
    *, boundaries: None, gate_is_logit: bool, **arguments: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    assert gate_is_logit
    return linear_attention_mixer_step(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_definition(case: MixerCase) -> None:
    results = run(step, case, torch.float64)
    assert results.keys() == answer(case).keys()
    for what, actual in results.items():
        assert_near(actual, answer(case)[what], 1e-12, what)


def test_without_a_gate_nothing_is_forgotten() -> None:
    tensors = MixerCase(1, batch=2, state_heads=2, kv_heads=2).tensors()
    never = torch.full_like(tensors["gate"], 1e4)  # logsigmoid of it is 0
    kept = linear_attention_mixer_step(**{**tensors, "gate": None})  # type: ignore[arg-type]
    for actual, expected in zip(kept, linear_attention_mixer_step(**{**tensors, "gate": never}), strict=True):
        assert actual is not None
        assert expected is not None
        assert_near(actual, expected, 1e-14)


def test_a_half_precision_token_keeps_a_float32_state() -> None:
    case = MixerCase(1, heads=4, kv_heads=2, state_heads=4)
    tensors = case.tensors(torch.bfloat16)
    for name in ("map_weight", "q_taps", "k_taps", "initial_state"):
        tensors[name] = tensors[name].detach().float()
    output, state, q_inputs, k_inputs = linear_attention_mixer_step(**tensors)  # type: ignore[arg-type]
    assert (output.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert q_inputs is not None
    assert k_inputs is not None
    assert q_inputs.dtype == k_inputs.dtype == torch.bfloat16
    double = {name: tensor.detach().double() for name, tensor in tensors.items()}
    expected, expected_state, *_ = linear_attention_mixer_step(**double)  # type: ignore[arg-type]
    assert_near(state, expected_state, 1e-5)
    assert_near(output, expected, 1e-2)
    for name in ("initial_state", "q_inputs", "k_inputs"):  # none is written to: a fork may hold them
        assert torch.equal(tensors[name].double(), double[name])
