"""Whether the kernels run a call: what they refuse, what has none, and what `explain` says of it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from mixer_cases import MixerCase
from torch import Tensor

from comparison import assert_near
from kernel_device import DEVICE
from lawcat.errors import BackendError
from lawcat.model.configuration_lawcat import FULL, LINEAR
from lawcat.ops import backend, explain, gated_linear_attention, use_backend
from lawcat.ops.backend import watch_calls
from lawcat.ops.fused import linear_attention_mixer
from small_models import make_model

SMALL = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16, "num_hidden_layers": 1}
WINDOW = "there is no kernel for a sliding window beside linear attention"
UNTIED = "there is no kernel for a step with untied feature maps"


@pytest.fixture(autouse=True)
def nothing_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backend, "_calls", Counter())
    monkeypatch.setattr(backend, "_fallbacks", {})


def operands(log_decay: float, tokens: int = 20, width: int = 4) -> tuple[Tensor, ...]:
    q, k, v = torch.rand(3, 1, tokens, 1, width, device=DEVICE)
    return q, k, v, torch.full_like(q, log_decay)


def test_explain_names_the_kernels() -> None:
    gated_linear_attention(*operands(-0.1), backend="triton")
    tensors = {name: t.detach().float().to(DEVICE) for name, t in MixerCase(3).tensors().items()}
    linear_attention_mixer(**tensors, backend="triton")
    assert explain().splitlines()[-2:] == [
        "ran: mixer by triton, 1 call",
        "ran: recurrence by triton, 1 call",
    ]


@pytest.mark.parametrize("name", ["torch", "reference", "triton"])
@pytest.mark.parametrize(
    ("log_decay", "bound", "message"),
    [
        (-3.0, -0.01, "log_decay holds log-decays down to -3, below min_log_decay=-0.01"),
        (-1.0, -0.5, "log_decay holds log-decays down to -1, below min_log_decay=-0.5; clamp them"),
        (0.25, -1.0, r"log_decay holds 0\.25; .* it must be at most 0"),
    ],
)
def test_log_decays_beyond_a_bound(name: str, log_decay: float, bound: float, message: str) -> None:
    """The kernels gave finite, wrong numbers."""
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(*operands(log_decay), min_log_decay=bound, backend=name)


def test_log_decays_at_the_bound() -> None:
    """Also in a dtype that rounds the bound down."""
    q, k, v, log_decay = operands(-2.305)
    rounded = log_decay.bfloat16()
    assert rounded.float().min() < -2.305
    # The kernels take the bound for what it was rounded to: half a step of bfloat16.
    for decay, tolerance in ((log_decay, 1e-5), (rounded, 3e-3)):
        found = gated_linear_attention(q, k, v, decay, min_log_decay=-2.305, backend="triton")
        expected = gated_linear_attention(q, k, v, decay, backend="reference")
        for actual, wanted in zip(found, expected, strict=True):
            assert_near(actual, wanted, tolerance)
    empty = operands(-3.0, tokens=0)
    gated_linear_attention(*empty, min_log_decay=-0.1)


HALVES = [(torch.bfloat16, torch.float16), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)]


@pytest.mark.parametrize("dtypes", HALVES, ids=str)
def test_the_width_of_mixed_dtypes_is_that_of_float32(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """They are computed in float32, of which less fits into a multiprocessor."""
    q, k, v, log_decay = operands(-0.1, tokens=2, width=130)
    message = r"a width is 130; for torch\.float32 the kernels take up to 128"
    for first, second in (dtypes, dtypes[::-1]):
        with pytest.raises(BackendError, match=message):
            gated_linear_attention(q.to(first), k.to(second), v.to(first), log_decay, backend="triton")
    tensors = {name: t.detach().to(DEVICE).float() for name, t in MixerCase(2, width=130).tensors().items()}
    tensors["q"] = tensors["q"].to(dtypes[0])
    tensors["k"], tensors["v"] = tensors["k"].to(dtypes[1]), tensors["v"].to(dtypes[1])
    with pytest.raises(BackendError, match=message):
        linear_attention_mixer(**tensors, backend="triton")


def test_mixed_dtypes_on_the_kernels() -> None:
    q, k, v, log_decay = operands(-0.1)
    mixed = q.bfloat16(), k.half(), v.bfloat16(), log_decay
    output, state = gated_linear_attention(*mixed, backend="triton")
    expected, expected_state = gated_linear_attention(*mixed, backend="reference")
    assert output.dtype == expected.dtype == torch.bfloat16
    assert_near(output.float(), expected.float(), 1e-2)
    assert_near(state, expected_state, 1e-4)
    with pytest.raises(BackendError, match=r"k is torch\.float64"):
        gated_linear_attention(q.bfloat16(), k.double(), v, log_decay, backend="triton")


def test_odd_features_are_refused() -> None:
    with pytest.raises(BackendError, match="feature_dim=5 is odd; the kernels take even ones"):
        gated_linear_attention(*operands(-0.1, width=5), backend="triton")


@torch.no_grad()
def decode(fields: dict[str, object]) -> None:
    model = make_model(**(SMALL | fields)).to(DEVICE)
    cache = model(torch.tensor([[1, 2, 3]], device=DEVICE), use_cache=True).past_key_values
    for token in (4, 5):
        model(torch.tensor([[token]], device=DEVICE), past_key_values=cache)


@pytest.mark.parametrize(
    ("fields", "reason", "ran"),
    [
        ({"sliding_window": 2}, WINDOW, ["recurrence by torch, 1 call", "step by torch, 2 calls"]),
        ({"feature_map": "untied"}, UNTIED, ["recurrence by triton, 1 call", "step by torch, 2 calls"]),
        (
            {"feature_map": "untied", "layer_types": [LINEAR, FULL], "num_hidden_layers": 2},
            UNTIED,
            ["recurrence by triton, 1 call", "step by torch, 2 calls"],
        ),
    ],
    ids=str,
)
def test_what_has_no_kernel_is_said_once(
    fields: dict[str, object], reason: str, ran: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    with use_backend("torch"):
        decode(fields)
    assert not recwarn.list, "who asked for PyTorch is told nothing"
    backend._calls.clear()
    with use_backend("triton"):
        decode(fields)
        decode(fields)
    assert [str(w.message) for w in recwarn.list] == [f"lawcat's kernels are not used: {reason}."]
    doubled = [line.replace("2 calls", "4 calls").replace("1 call", "2 calls") for line in ran]
    expected = [f"fell back to torch: {reason}", *(f"ran: {line}" for line in doubled)]
    assert explain().splitlines()[3:] == expected


@torch.no_grad()
def test_a_step_with_padding_has_no_kernel(recwarn: pytest.WarningsRecorder) -> None:
    model = make_model(**SMALL).to(DEVICE)
    tokens = torch.tensor([[1, 2], [3, 4]], device=DEVICE)
    with use_backend("triton"):
        cache = model(tokens, use_cache=True).past_key_values
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]], device=DEVICE)
        model(tokens[:, :1], attention_mask=mask, past_key_values=cache)
    reason = "there is no kernel for a step with padding"
    assert [str(w.message) for w in recwarn.list] == [f"lawcat's kernels are not used: {reason}."]
    assert f"fell back to torch: {reason}" in explain()


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels are what 'auto' takes there")
def test_without_a_gpu_auto_is_told_nothing(recwarn: pytest.WarningsRecorder) -> None:
    decode({"sliding_window": 2})
    assert not recwarn.list
    assert "fell back" not in explain()


def test_a_warning_is_of_who_called(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(1, 3, 1, 4, device=DEVICE).double()
    monkeypatch.setattr(backend, "_choose", lambda *_, **__: ("triton", None))  # as "auto" on a GPU
    with pytest.warns(UserWarning, match="kernels are not used") as caught:
        gated_linear_attention(x, x, x, -x)
    assert caught[0].filename == __file__


def test_watching_what_runs() -> None:
    """Each watcher sees a reason, though its warning came before."""
    for _ in range(2):
        with use_backend("triton"), watch_calls() as ran:
            decode({"feature_map": "untied"})
        assert (ran.backends, ran.reasons) == ({"triton", "torch"}, [UNTIED])
        assert ran.not_by("triton") is None
    with watch_calls() as outer, watch_calls() as inner:
        pass
    with watch_calls() as later:
        gated_linear_attention(*operands(-0.1), backend="torch")
    assert later.not_by("triton") == "torch runs, not triton"
    assert not outer.backends
    assert inner.not_by("triton") is None, "nothing was counted"
    assert backend._watchers == []
