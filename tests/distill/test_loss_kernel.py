"""The kernel of the losses against the definition in float64, on logits that are not tame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from comparison import assert_near
from lawcat.distill.losses import _fused_losses, language_loss
from lawcat.ops import use_backend
from lawcat.ops.triton import support

pytestmark = pytest.mark.skipif(not support.is_interpreted(), reason="needs Triton's interpreter")

N = 5
BLOCK = 8
FACTORS = torch.tensor([0.0, 1.0, 0.3, 4.0, 0.0])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from lawcat.distill import loss_kernel

    monkeypatch.setattr(loss_kernel, "_BLOCK", BLOCK)


def definition(rows: dict[str, Any], settings: dict[str, float]) -> tuple[Tensor, Tensor]:
    """Return both losses a row, whether its target is the likeliest, and the gradient."""
    logits: Tensor = rows["logits"].double().requires_grad_()
    teacher, weights, temperature = rows["teacher"], rows["weights"], settings["temperature"]
    cross_entropy = weights * F.cross_entropy(logits, rows["targets"], reduction="none")
    kl = torch.zeros_like(cross_entropy)
    if teacher is not None:
        mine, theirs = (F.log_softmax(t.double() / temperature, -1) for t in (logits, teacher))
        kl = weights * temperature**2 * (theirs.exp() * (theirs - mine)).sum(-1)
        kl = kl * rows.get("kl_factors", 1.0)
    total = settings["cross_entropy_weight"] * cross_entropy + settings["kl_weight"] * kl
    torch.autograd.backward(total.sum())
    assert logits.grad is not None
    is_right = (logits.detach().argmax(-1) == rows["targets"]) & (weights != 0)
    return torch.stack([cross_entropy, kl, is_right], 1).detach(), logits.grad


def random_rows(vocabulary: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    return {
        "logits": (4 * torch.randn(N, vocabulary, generator=generator)).to(dtype),
        "teacher": (4 * torch.randn(N, vocabulary, generator=generator)).to(dtype),
        # The last column among them.
        "targets": torch.tensor([vocabulary - 1, 0, vocabulary // 2, 0, vocabulary - 1]),
        "weights": torch.tensor([1.0, 0.25, 3.0, 0.5, 0.7]),
    }


def check(
    rows: dict[str, Any], tolerance: float, loss_tolerance: float | None = None, **given: float
) -> None:
    from lawcat.distill.loss_kernel import loss_and_gradient

    settings = {"cross_entropy_weight": 0.3, "kl_weight": 2.0, "temperature": 1.5, **given}
    losses, gradient = definition(rows, settings)
    logits = rows["logits"].clone()
    found = loss_and_gradient(
        logits, rows["teacher"], rows["targets"], rows["weights"], rows.get("kl_factors"), **settings
    )
    assert found.dtype == torch.float32
    assert_near(found, losses, loss_tolerance or 1e-6, "losses")
    assert_near(logits, gradient, tolerance, "gradient")


@pytest.mark.parametrize("vocabulary", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 3])
@pytest.mark.parametrize("temperature", [0.5, 2.5])
def test_sizes(vocabulary: int, temperature: float) -> None:
    check(random_rows(vocabulary), 1e-6, temperature=temperature)
    check({**random_rows(vocabulary), "teacher": None}, 1e-6, kl_weight=0.0)
    check({**random_rows(vocabulary), "kl_factors": FACTORS}, 1e-6, temperature=temperature)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float16, 6e-4)])
def test_half_precision_is_rounded_once(dtype: torch.dtype, tolerance: float) -> None:
    check(random_rows(19, dtype), tolerance)
    check({**random_rows(19, dtype), "kl_factors": FACTORS}, tolerance)


def test_logits_far_from_zero_lose_no_digits() -> None:
    rows = random_rows(19)
    far = {**rows, "logits": rows["logits"] + 1000, "teacher": rows["teacher"] - 1000}
    check(far, 1e-6, 1e-4)
    check({**far, "teacher": None}, 1e-6, kl_weight=0.0)


def test_logits_as_large_as_float16_holds() -> None:
    rows = random_rows(19)
    for name in ("logits", "teacher"):
        rows[name] = (rows[name] / rows[name].abs().max() * 65000).half()
    check(rows, 6e-4)


@pytest.mark.parametrize("columns", [slice(BLOCK), slice(12, 13), slice(16, 18)])
def test_tokens_that_cannot_come(columns: slice) -> None:
    rows: dict[str, Any] = random_rows(19)
    rows["logits"][:, columns] = -torch.inf
    rows["teacher"] = None
    rows["targets"] = torch.tensor([18, 9, 10, 11, 18])
    check(rows, 1e-6, kl_weight=0.0)


def test_a_row_of_weight_zero_is_not_looked_at() -> None:
    from lawcat.distill.loss_kernel import loss_and_gradient

    rows = random_rows(19)
    settings = {"cross_entropy_weight": 0.3, "kl_weight": 2.0, "temperature": 1.5}
    rows["weights"][2] = 0.0
    losses, gradient = definition(rows, settings)
    rows["logits"][2], rows["teacher"][2], rows["targets"][2] = torch.nan, torch.inf, -100
    found = loss_and_gradient(rows["logits"], rows["teacher"], rows["targets"], rows["weights"], **settings)
    assert_near(found, losses, 1e-6)
    assert_near(rows["logits"], gradient, 1e-6)
    assert not rows["logits"][2].any()


def test_no_rows() -> None:
    from lawcat.distill.loss_kernel import loss_and_gradient

    empty = loss_and_gradient(
        torch.zeros(0, 19),
        None,
        torch.zeros(0, dtype=torch.long),
        torch.zeros(0),
        cross_entropy_weight=1.0,
        kl_weight=0.0,
        temperature=1.0,
    )
    assert empty.shape == (0, 3)


def test_mixed_precision() -> None:
    """Under autocast logits come in half precision, gradients of what trains in float32."""
    found: dict[str, list[Tensor]] = {}
    for backend in ("torch", "triton"):
        generator = torch.Generator().manual_seed(1)
        hidden, other = (torch.randn(2, 9, 16, generator=generator) for _ in range(2))
        head = torch.randn(19, 16, generator=generator).requires_grad_()
        hidden.requires_grad_()
        ids = torch.randint(0, 19, (2, 9), generator=generator)
        with torch.autocast("cpu", torch.bfloat16), use_backend(backend):
            loss, *sums = language_loss(
                hidden, head, ids, torch.rand(2, 9, generator=generator), teacher_hidden=other, kl_weight=1.0
            )
        torch.autograd.backward(loss)
        assert hidden.grad is not None
        assert head.grad is not None
        assert hidden.grad.dtype == head.grad.dtype == torch.float32
        found[backend] = [loss.detach(), *sums, hidden.grad, head.grad]
    for mine, theirs in zip(found["triton"], found["torch"], strict=True):
        assert_near(mine, theirs, 0.02)


def test_where_the_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.zeros(2, 3)
    with use_backend("triton"):
        assert _fused_losses(hidden) is not None
        assert _fused_losses(hidden.double()) is None
        monkeypatch.setattr(support, "is_interpreted", lambda: False)
        assert _fused_losses(hidden) is None
    with use_backend("torch"):
        assert _fused_losses(hidden) is None


@pytest.mark.parametrize("reason", [None, "the GPU's compute capability is 7.5; 8.0 or newer is needed"])
def test_a_gpu_too_old_for_kernels(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from lawcat.distill.loss_kernel import is_usable

    class OnGpu:
        dtype, device = torch.float32, torch.device("cuda", 0)

    monkeypatch.setattr(support, "is_interpreted", lambda: False)
    monkeypatch.setattr(support, "too_old", lambda device: reason)
    assert is_usable(OnGpu()) == (reason is None)  # type: ignore[arg-type]
