"""The losses against plain computations: values and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from comparison import assert_near
from lawcat.distill import losses
from lawcat.distill.losses import language_loss, relative_squared_error
from lawcat.ops import use_backend
from lawcat.ops.triton import support

B, T, WIDTH, VOCABULARY = 2, 7, 12, 19


@pytest.fixture(params=["operations", "operations on all tokens", "kernel", "kernel on all tokens"])
def small_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pieces of three tokens; and as on a GPU, where no tokens are selected, and by the kernel."""
    monkeypatch.setattr(losses, "_TOKENS_AT_A_TIME_ON_CPU", 3)
    if "all" in request.param:
        monkeypatch.setattr(losses, "_only_used", losses._zeros_for_unused)
    is_kernel = request.param.startswith("kernel")
    if is_kernel:
        if not support.is_interpreted():
            pytest.skip("the kernel runs on a GPU or in Triton's interpreter")
        from lawcat.distill import loss_kernel

        monkeypatch.setattr(loss_kernel, "_BLOCK", 8)
        monkeypatch.setattr(loss_kernel, "loss_and_gradient", counted(loss_kernel.loss_and_gradient))
    calls.clear()
    with use_backend("triton" if is_kernel else "torch"):
        yield
    assert bool(calls) == is_kernel


calls: list[int] = []


def counted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that makes a note of each call."""

    def call(*arguments: Any, **named: Any) -> Tensor:
        calls.append(1)
        return function(*arguments, **named)

    return call


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(B, T, generator=generator)
    weights[0, 2] = weights[1, 4] = weights[1, 5] = 0.0
    return {
        "hidden": torch.randn(B, T, WIDTH, generator=generator, requires_grad=True),
        "head": torch.randn(VOCABULARY, WIDTH, generator=generator, requires_grad=True),
        "targets": torch.randint(0, VOCABULARY, (B, T), generator=generator),
        "weights": weights,
        "teacher_hidden": torch.randn(B, T, WIDTH, generator=generator),
        "teacher_head": torch.randn(VOCABULARY, WIDTH, generator=generator),
    }


def plainly(given: dict[str, Tensor], ce_weight: float, kl_weight: float, temperature: float) -> list[Tensor]:
    """The definition: all logits at once, one token after another, in float64."""
    given = {name: t.double() if t.is_floating_point() else t for name, t in given.items()}
    cross_entropy = kl = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            logits = given["head"] @ given["hidden"][b, t]
            probability = logits.softmax(-1)[given["targets"][b, t]]
            cross_entropy = cross_entropy - given["weights"][b, t] * probability.log()
            teacher = (given["teacher_head"] @ given["teacher_hidden"][b, t] / temperature).softmax(-1)
            student = (logits / temperature).softmax(-1)
            divergence = (teacher * (teacher / student).log()).sum()
            factor = given["kl_factors"][b, t] if "kl_factors" in given else 1.0
            kl = kl + given["weights"][b, t] * factor * divergence * temperature**2
    return [ce_weight * cross_entropy + kl_weight * kl, cross_entropy, kl]


@pytest.mark.parametrize(
    ("ce_weight", "kl_weight", "temperature"),
    [(1.0, 0.0, 1.0), (1.0, 1.0, 1.0), (0.3, 2.0, 2.5), (0.0, 1.0, 0.5)],
)
@pytest.mark.parametrize("trains_head", [True, False])
def test_values_and_gradients(
    small_pieces: None, ce_weight: float, kl_weight: float, temperature: float, trains_head: bool
) -> None:
    mine, theirs = inputs(), inputs()
    mine["head"].requires_grad_(trains_head)
    found = language_loss(
        **mine, cross_entropy_weight=ce_weight, kl_weight=kl_weight, temperature=temperature
    )
    expected = plainly(theirs, ce_weight, kl_weight, temperature)
    if not kl_weight:
        expected[2] = torch.zeros(())
    for value, wanted, name in zip(found[:3], expected, ("loss", "cross-entropy", "KL"), strict=True):
        assert value.dtype == torch.float32
        assert_near(value, wanted, 1e-5, name, least_scale=1e-3)
    assert not found[1].requires_grad
    assert not found[2].requires_grad
    torch.autograd.backward(0.7 * found[0])
    torch.autograd.backward(0.7 * expected[0])
    for name in ("hidden", "head"):
        if name == "head" and not trains_head:
            assert mine[name].grad is None
            continue
        assert mine[name].grad is not None
        assert theirs[name].grad is not None
        assert_near(mine[name].grad, theirs[name].grad, 1e-5, f"gradient of {name}")
    assert mine["hidden"].grad is not None
    assert not mine["hidden"].grad[mine["weights"] == 0].any()


def gradients_of(loss: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    leaves = [given["hidden"], given["head"]]
    found = torch.autograd.grad(loss, leaves)
    return [gradient.detach() for gradient in found]


@pytest.mark.parametrize(("ce_weight", "kl_weight", "temperature"), [(0.3, 2.0, 2.5), (0.0, 1.0, 0.5)])
def test_the_kl_of_a_token_has_a_factor(
    small_pieces: None, ce_weight: float, kl_weight: float, temperature: float
) -> None:
    factors = 3 * torch.rand(B, T, generator=torch.Generator().manual_seed(7))
    factors[0, 0] = factors[1, 1] = 0.0
    mine, theirs = inputs() | {"kl_factors": factors}, inputs() | {"kl_factors": factors}
    found = language_loss(
        **mine, cross_entropy_weight=ce_weight, kl_weight=kl_weight, temperature=temperature
    )
    expected = plainly(theirs, ce_weight, kl_weight, temperature)
    for value, wanted, name in zip(found[:3], expected, ("loss", "cross-entropy", "KL"), strict=True):
        assert_near(value, wanted, 1e-5, name, least_scale=1e-3)
    pairs = zip(gradients_of(found[0], mine), gradients_of(expected[0], theirs), strict=True)
    for name, (gradient, wanted) in zip(("hidden", "head"), pairs, strict=True):
        assert_near(gradient, wanted, 1e-5, f"gradient of {name}")
    without = plainly(inputs(), ce_weight, kl_weight, temperature)
    assert (expected[2] - without[2]).abs() > 0.1 * without[2]


def test_factors_of_one_change_no_bit_and_of_zero_leave_the_cross_entropy(small_pieces: None) -> None:
    settings = {"cross_entropy_weight": 0.3, "kl_weight": 2.0, "temperature": 2.5}
    given = inputs()
    plain = language_loss(**given, **settings)
    ones = language_loss(**given, kl_factors=torch.ones(B, T), **settings)
    assert [value.item() for value in ones] == [value.item() for value in plain]
    for one, other in zip(gradients_of(ones[0], given), gradients_of(plain[0], given), strict=True):
        assert torch.equal(one, other)
    none = language_loss(**given, kl_factors=torch.zeros(B, T), **settings)
    alone = language_loss(**given, **(settings | {"kl_weight": 0.0}))
    assert none[2].item() == 0.0
    assert_near(none[0], alone[0], 1e-6)
    for one, other in zip(gradients_of(none[0], given), gradients_of(alone[0], given), strict=True):
        assert_near(one, other, 1e-6)


def test_answers_are_right_where_their_token_is_the_likeliest(small_pieces: None) -> None:
    given = inputs()
    likeliest = F.linear(given["hidden"], given["head"]).argmax(-1)
    given["targets"] = torch.where(torch.arange(T) % 2 == 0, likeliest, (likeliest + 1) % VOCABULARY)
    is_answer = torch.zeros(B, T, dtype=torch.bool)
    is_answer[0, :4] = is_answer[1, 3:] = True
    found = language_loss(**given, is_answer=is_answer, kl_weight=1.0)
    expected = given["weights"][is_answer & (given["targets"] == likeliest)].sum()
    assert 0 < expected < given["weights"][is_answer].sum()
    assert_near(found.right, expected, 1e-6)
    assert not found.right.requires_grad
    # Counting them changes nothing else, and without answers there is nothing to count.
    without = language_loss(**given, kl_weight=1.0)
    assert [value.item() for value in without] == [*(value.item() for value in found[:3]), 0.0]


def test_tokens_of_weight_zero_are_not_looked_at(small_pieces: None) -> None:
    given = inputs() | {"kl_factors": torch.rand(B, T)}
    expected = [value.detach() for value in language_loss(**given, kl_weight=1.0)]
    ignored = given["weights"] == 0
    given["kl_factors"][ignored] = torch.nan
    with torch.no_grad():
        given["hidden"][ignored] = torch.nan
        given["teacher_hidden"][ignored] = torch.inf
    given["targets"][ignored] = -1
    for value, wanted in zip(language_loss(**given, kl_weight=1.0), expected, strict=True):
        assert torch.equal(value, wanted)
    loss, *sums = language_loss(**(given | {"weights": torch.zeros(B, T)}), kl_weight=1.0)
    assert [loss.item(), *(value.item() for value in sums)] == [0.0, 0.0, 0.0, 0.0]
    torch.autograd.backward(loss)
    assert given["hidden"].grad is not None
    assert not given["hidden"].grad.any()


def test_the_size_of_pieces_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = language_loss(**inputs(), kl_weight=1.0)
    for size in (1, 10, 11, 12):  # eleven tokens have weight
        monkeypatch.setattr(losses, "_TOKENS_AT_A_TIME_ON_CPU", size)
        for value, wanted in zip(language_loss(**inputs(), kl_weight=1.0), whole, strict=True):
            assert_near(value, wanted, 1e-6)


def test_a_head_shared_with_the_embedding() -> None:
    """Tied weights get the gradient of both their uses."""
    given = inputs()
    head, ids = given["head"], given["targets"]
    loss, *_ = language_loss(F.embedding(ids, head), head, ids, given["weights"])
    torch.autograd.backward(loss)
    found, head.grad = head.grad, None
    logits = F.linear(F.embedding(ids, head), head)
    plain = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    torch.autograd.backward((plain * given["weights"].flatten()).sum())
    assert found is not None
    assert head.grad is not None
    assert_near(found, head.grad, 1e-5)


def test_the_teachers_head_is_the_students_where_none_is_given() -> None:
    given = inputs()
    own = given | {"teacher_head": given["head"].detach()}
    del given["teacher_head"]
    for value, wanted in zip(
        language_loss(**given, kl_weight=1.0), language_loss(**own, kl_weight=1.0), strict=True
    ):
        assert torch.equal(value, wanted)


def test_bfloat16_is_summed_in_float32() -> None:
    given = {n: t.detach().bfloat16() if t.is_floating_point() else t for n, t in inputs().items()}
    given["hidden"].requires_grad_()
    loss, *_ = language_loss(**given, kl_weight=1.0)
    assert loss.dtype == torch.float32
    assert_near(loss, plainly(inputs(), 1.0, 1.0, 1.0)[0], 0.03)
    torch.autograd.backward(loss)
    assert given["hidden"].grad is not None
    assert given["hidden"].grad.dtype == torch.bfloat16


def test_relative_squared_error() -> None:
    output, target = torch.randn(2, 3, 5, 2, 4)
    found = relative_squared_error(output, target)
    for b in range(3):
        expected = ((output[b] - target[b]) ** 2).sum() / (target[b] ** 2).sum()
        assert_near(found[b], expected, 1e-6)
    assert_near(relative_squared_error(torch.zeros_like(target), target), torch.ones(3), 1e-6)
    assert not relative_squared_error(target, target).any()
    assert relative_squared_error(output.bfloat16(), target.bfloat16()).dtype == torch.float32


@given(st.integers(1, 7), st.integers(0, 3))
def test_the_mean_over_a_batch_does_not_depend_on_its_split(cut: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(8, 5, 2, 4, generator=generator)
    target = torch.randn(8, 5, 2, 4, generator=generator) * torch.arange(1.0, 9)[:, None, None, None]
    whole = relative_squared_error(output, target)
    parts = [relative_squared_error(output[s], target[s]) for s in (slice(cut), slice(cut, None))]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kl_weight", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("has_factors", [False, True])
def test_the_kernel_on_a_gpu(
    dtype: torch.dtype, kl_weight: float, temperature: float, has_factors: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens, width, vocabulary = 1500, 64, 49152
    weights = torch.rand(1, tokens, generator=generator)
    weights[:, ::7] = 0.0
    head = torch.randn(vocabulary, width, generator=generator) / 2
    states = [torch.randn(1, tokens, width, generator=generator) for _ in range(2)]
    targets = torch.randint(0, vocabulary, (1, tokens), generator=generator)
    factors = 3 * torch.rand(1, tokens, generator=generator)
    factors[:, ::5] = 0.0
    found = {}
    for backend in ("torch", "triton"):
        hidden, matrix = (t.cuda().to(dtype).requires_grad_() for t in (states[0], head))
        with use_backend(backend):
            values = language_loss(
                hidden,
                matrix,
                targets.cuda(),
                weights.cuda(),
                teacher_hidden=states[1].cuda().to(dtype),
                kl_factors=factors.cuda() if has_factors else None,
                kl_weight=kl_weight,
                temperature=temperature,
            )
        torch.autograd.backward(values[0])
        found[backend] = [*values, hidden.grad, matrix.grad]
    limit = 1e-4 if dtype == torch.float32 else 0.02
    for mine, theirs in zip(found["triton"], found["torch"], strict=True):
        assert mine is not None
        assert theirs is not None
        assert_near(mine, theirs, limit)
