"""The mixer composed of PyTorch operations: what it gives, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixer_cases import MixerCase, answer, run
from torch.utils._python_dispatch import TorchDispatchMode

from comparison import assert_near
from lawcat.ops import gated_linear_attention
from lawcat.ops.chunked import AttentionShape
from lawcat.ops.fused import linear_attention_mixer

CASES = (
    MixerCase(1),
    MixerCase(3, taps=2),
    MixerCase(70, heads=4, kv_heads=2, state_heads=4, batch=2),
    MixerCase(33, heads=4, kv_heads=2, state_heads=2, feature_dim=20, width=12),
    MixerCase(33, taps=None, has_state=False, gate_width=1),
    MixerCase(33, gate_is_logit=False, normalize=False, min_log_decay=-5.0, gate_scale=3.0),
    MixerCase(33, batch=2, padding=5),
    MixerCase(40, boundaries=(0, 2, 3, 30, 40)),
    MixerCase(37, heads=8, kv_heads=2, state_heads=4, batch=3, padding=3, taps=8),
    MixerCase(2, heads=8, kv_heads=2, state_heads=4, batch=2, taps=5),
    MixerCase(
        20, heads=4, kv_heads=2, state_heads=4, batch=2, min_log_decay=-30.0, gate_scale=300.0, padding=4
    ),
    # More than a segment, with a convolution that reaches from one into the other.
    MixerCase(518, heads=4, state_heads=2, feature_dim=4, width=4, batch=2, padding=514),
)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_composition(case: MixerCase, backend: str) -> None:
    def function(**arguments: object) -> object:
        return linear_attention_mixer(**arguments, backend=backend)

    results = run(function, case, torch.float64)
    assert results.keys() == answer(case).keys()
    for what, actual in results.items():
        assert_near(actual, answer(case)[what], 1e-12, what)


class Operations(TorchDispatchMode):
    """Counts the operations that are no views."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_few_long_segments_where_starting_an_operation_costs_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; "meta" stands for one here."""
    counts = {}
    tensors = MixerCase(4096, heads=4, kv_heads=2, state_heads=4, width=4, feature_dim=4).tensors()
    for device in ("cpu", "meta"):
        with torch.no_grad(), Operations() as operations:
            linear_attention_mixer(**{name: t.to(device) for name, t in tensors.items()}, backend="torch")
        counts[device] = operations.count
    # The states of 128 chunks of 2 state heads are made one by one; of what else there is, an eighth is left.
    assert counts["meta"] < counts["cpu"] / 2, counts
    sizes = AttentionShape(16, 8192, 8, 4, 8, 8, 4), AttentionShape(1, 8192, 8, 4, 8, 2, 4)
    assert [size.segment_tokens(torch.device("cuda")) for size in sizes] == [512, 32768]
    case = MixerCase(600, heads=4, kv_heads=2, state_heads=4, width=4, feature_dim=4)
    monkeypatch.setattr(AttentionShape, "segment_tokens", lambda *_: 1024)
    output, state, *_ = linear_attention_mixer(**case.tensors(), backend="torch")
    assert_near(output, answer(case)["output"], 1e-12)
    assert_near(state, answer(case)["state"], 1e-12)


def call(**changes: object) -> None:
    tensors: dict[str, object] = MixerCase(5, heads=4, kv_heads=2, state_heads=4).tensors()
    linear_attention_mixer(**(tensors | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(1, 5, 64)}, r"q and k must have four dimensions .*; got 3, 4 and 3"),
        ({"q": torch.zeros(1, 5, 3, 16)}, "q has 3 heads, map_weight 4 and k 2; each must be a multiple"),
        ({"map_weight": torch.zeros(1, 16, 8)}, "map_weight 1 and k 2"),
        ({"k": torch.zeros(1, 6, 2, 16)}, r"k is \(1, 6, 2, 16\); .* it must be \[1, 5, 2, 16\]"),
        ({"v": torch.zeros(1, 5, 4, 16)}, r"v is \(1, 5, 4, 16\); .* \[1, 5, 2, any\]"),
        ({"gate": torch.zeros(1, 5, 2, 8)}, r"gate is .* \[1, 5, 2, 16\]"),
        ({"q_taps": torch.zeros(64, 3)}, r"k_taps is \(64, 4\); .* \[64, 3\]"),
        ({"k_taps": None}, "q_taps and k_taps come together"),
        ({"k_inputs": None}, "q_inputs and k_inputs come together"),
        ({"initial_state": torch.zeros(1, 4, 16, 16)}, r"initial_state is .* \[1, 4, 16, 17\]"),
        ({"mask": torch.ones(1, 4)}, r"mask is \(1, 4\)"),
        ({"mask": torch.ones(1, 5, device="meta")}, "mask is on meta and q on cpu"),
        ({"boundaries": (0, 3)}, r"boundaries are \(0, 3\); .* must rise from 0 to T"),
        ({"boundaries": (0, 4, 3, 5)}, "must rise"),
        ({"boundaries": (0, 4, 4, 5)}, "must rise"),
        ({"eps": 0.0}, "eps=0.0 must be above 0"),
        (
            {"v": torch.ones(1, 5, 2, 16, dtype=torch.int64)},
            "v is torch.int64; it must be one of torch.bfloat16, torch.float16, torch.float32, torch.float64",
        ),
        ({"map_weight": torch.ones(4, 16, 8, dtype=torch.int8)}, "map_weight is torch.int8"),
        ({"backend": "tritn"}, "Did you mean 'triton'"),
    ],
    ids=str,
)
def test_what_does_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("lowest", "highest", "message"),
    [
        (-1.0, 0.01, "log_decay holds 0.01; .* it must be at most 0"),
        (-2.6, 0.0, "gate holds log-decays down to -2.6, below min_log_decay=-2.5; clamp them"),
    ],
)
def test_log_decays_out_of_range(backend: str, lowest: float, highest: float, message: str) -> None:
    gate = torch.linspace(lowest, highest, 5 * 2 * 16).view(1, 5, 2, 16)
    call(gate=gate)  # logits may be anything
    with pytest.raises(ValueError, match=message):
        call(gate=gate, gate_is_logit=False, backend=backend)


def test_a_bound_that_the_dtype_rounds_down_is_kept() -> None:
    gate = torch.full((1, 5, 2, 16), -2.305).bfloat16()
    assert gate.float().min() < -2.305
    call(gate=gate, gate_is_logit=False, min_log_decay=-2.305)


def test_without_a_gate_nothing_is_forgotten() -> None:
    tensors = MixerCase(33, heads=4, kv_heads=2, state_heads=4).tensors()
    found = linear_attention_mixer(**(tensors | {"gate": None}))
    zeros = torch.zeros(1, 33, 2, 1)
    expected = linear_attention_mixer(**(tensors | {"gate": zeros}), gate_is_logit=False)
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_the_operator_is_part_of_it() -> None:
    """Without convolution and with a map that gives known features, the mixer is the operator."""
    case = MixerCase(9, taps=None, has_state=False)
    tensors = {name: tensor.detach() for name, tensor in case.tensors().items()}
    tensors["map_weight"] = torch.zeros_like(tensors["map_weight"])  # all features 1/8
    output = linear_attention_mixer(**tensors)[0]
    even = torch.full((1, 9, 2, 16), 1 / 8, dtype=torch.float64)
    log_decay = (torch.nn.functional.logsigmoid(tensors["gate"]) / 16).expand(-1, -1, 2, -1)
    values = tensors["v"].expand(-1, -1, 2, -1)
    assert_near(output, gated_linear_attention(even, even, values, log_decay)[0], 1e-12)
