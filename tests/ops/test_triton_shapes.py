"""The kernels at the widths and ratios of heads that they are promised for, in Triton's interpreter too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import configure, kernels, poison  # noqa: F401
from mixer_cases import MixerCase, answer, run
from torch import Tensor

from comparison import assert_near
from kernel_device import DEVICE, on_gpu
from lawcat.ops.triton import mixer
from lawcat.ops.triton.configurations import choose_configuration


def check_forward(case: MixerCase, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        results = kernels(**case.tensors(dtype, DEVICE), **case.options())
    for what, actual in zip(("output", "state"), results, strict=False):
        assert_near(actual.cpu(), answer(case, dtype)[what], tolerance, what)


def narrow(ratio: int, tokens: int, *, a_state_each: bool = True, kv_heads: int = 1) -> MixerCase:
    heads = ratio * kv_heads
    return MixerCase(
        tokens, heads=heads, kv_heads=kv_heads, state_heads=heads if a_state_each else kv_heads,
        width=8, feature_dim=8, taps=2,
    )  # fmt: skip


@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize(
    ("ratio", "a_state_each", "kv_heads"),
    [
        (3, True, 2),
        (5, True, 1),
        (6, True, 1),
        (7, True, 1),
        (8, True, 1),
        (3, False, 2),
        (5, False, 1),
        (7, False, 1),
        (8, False, 1),
    ],
)
def test_ratios_of_heads(
    ratio: int, a_state_each: bool, kv_heads: int, is_prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that make several heads' features share what those heads share, and no more."""
    configure(monkeypatch, is_prepared=is_prepared, query_heads=4, key_heads=4)
    case = narrow(ratio, 18, a_state_each=a_state_each, kv_heads=kv_heads)
    check_forward(case, tolerance=2e-5)


@pytest.mark.parametrize("ratio", [3, 5, 6, 7, 8])
def test_gradients_by_ratio_of_heads(ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch)
    case = narrow(ratio, 5)
    for what, actual in run(kernels, case, torch.float32, DEVICE).items():
        assert_near(actual.cpu(), answer(case)[what], 5e-5 if "gradient" in what else 1e-5, what)


@pytest.mark.parametrize("width", [32, 96, 128])
def test_widths(width: int) -> None:
    check_forward(MixerCase(5, width=width, feature_dim=width, taps=2))


@pytest.mark.parametrize("fields", [{}, {"boundaries": (0, 2, 70)}, {"gate_scale": 100.0}], ids=str)
@pytest.mark.parametrize(("width", "feature_dim"), [(128, 128), (48, 96)])
def test_wide_as_the_table_has_it(
    width: int, feature_dim: int, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the tokens of a chunk: three of them in a segment, which the scan completes."""
    table = choose_configuration(feature_dim, width, torch.bfloat16, 37, 2, -2.5, 132)
    assert table.is_prepared
    assert table.scan_with_queries
    changed = {"chunk": 16, "sub_block": 16, "gradient_chunk": 16, "segment": 48}
    monkeypatch.setattr(mixer, "choose_configuration", lambda *_: replace(table, **changed))
    check_forward(MixerCase(70, width=width, feature_dim=feature_dim, taps=2, **fields), tolerance=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [96, 256])
def test_wide_in_half_precision(width: int, dtype: torch.dtype) -> None:
    check_forward(MixerCase(5, width=width, feature_dim=width, taps=2), dtype, 3e-2)


# Of q alone 2^32 numbers: half of them lie where 32 bits do not reach.
_HUGE = pytest.param(2**20, 2**17, 32, 128, marks=[pytest.mark.gpu, on_gpu], id="huge")


@pytest.mark.parametrize(("tokens", "piece", "heads", "width"), [(40, 20, 2, 8), _HUGE])
@torch.no_grad()
def test_addresses_beyond_32_bits(
    tokens: int, piece: int, heads: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call gives what its pieces give, in which every address is small."""
    monkeypatch.setattr(mixer, "allocate", torch.empty)
    dtype = torch.bfloat16 if tokens > 2**16 else torch.float32
    if tokens > 2**16 and torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB")

    def random(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, device=DEVICE, dtype=dtype).mul_(scale)

    by_token = {
        "q": random(1, tokens, heads, width, dtype=dtype),
        "k": random(1, tokens, 1, width, dtype=dtype),
        "v": random(1, tokens, 1, width, dtype=dtype),
        "gate": random(1, tokens, 1, width).add_(4.0),
    }
    parameters = {
        "map_weight": random(heads, width, width // 2, scale=0.1),
        "q_taps": random(heads * width, 2),
        "k_taps": random(heads * width, 2),
    }
    whole, state, *_ = kernels(**by_token, **parameters)
    carried: dict[str, Tensor] = {}
    for start in range(0, tokens, piece):
        part = {name: t[:, start : start + piece] for name, t in by_token.items()}
        output, *after = kernels(**part, **parameters, **carried)
        carried = dict(zip(("initial_state", "q_inputs", "k_inputs"), after, strict=True))
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        assert_near(whole[:, start : start + piece], output, tolerance, f"output from token {start}")
    assert_near(state, carried["initial_state"], 1e-2 if dtype == torch.bfloat16 else 1e-5, "state")
