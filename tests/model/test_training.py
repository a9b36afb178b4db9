"""Gradients: all there; the same with checkpointing, in pieces that hand the state on, by the reference."""

from __future__ import annotations

import pytest
import torch
from model_variants import VARIANTS, model_of, random_tokens
from torch import Tensor

from comparison import assert_near
from lawcat import LawcatForCausalLM
from lawcat.ops import use_backend
from small_models import make_model

NAMES = ["paper", "state a kv head", "gate a head", "no convolution", "hybrid", "lolcats", "three kinds"]


def gradients(model: LawcatForCausalLM, tokens: Tensor, **options: object) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens, **options).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def enable_checkpointing(model: LawcatForCausalLM, use_reentrant: bool = False) -> None:
    name = "activation_checkpointing_enable"  # since transformers 5.2x
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    assert model.model.gradient_checkpointing


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_one(name: str) -> None:
    model = make_model(noise=0.3, **VARIANTS[name]).train()
    for parameter_name, gradient in gradients(model, random_tokens(2, 40)).items():
        assert gradient is not None, parameter_name
        assert gradient.isfinite().all(), parameter_name
        assert gradient.any(), parameter_name


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name: str, use_reentrant: bool) -> None:
    model = make_model(**VARIANTS[name]).train()
    tokens = random_tokens(2, 40)
    expected = gradients(model, tokens)
    enable_checkpointing(model, use_reentrant)
    if use_reentrant:
        model.enable_input_require_grads()
    for parameter, gradient in gradients(model, tokens).items():
        assert torch.equal(gradient, expected[parameter]), parameter


def test_gradient_checkpointing_recomputes_with_the_mask() -> None:
    model = make_model().train()
    tokens = random_tokens(2, 20)
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    expected = gradients(model, tokens, attention_mask=mask)
    enable_checkpointing(model)
    for parameter, gradient in gradients(model, tokens, attention_mask=mask).items():
        assert torch.equal(gradient, expected[parameter]), parameter


@pytest.mark.parametrize("name", NAMES)
def test_in_pieces_that_hand_the_state_on(name: str) -> None:
    """Back through time: a cache carries gradients unless it is forked without them."""
    model = model_of(VARIANTS[name])
    tokens = random_tokens(2, 40)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(tokens).logits.square().mean(), parameters)
    first = model(tokens[:, :17], use_cache=True)
    second = model(tokens[:, 17:], past_key_values=first.past_key_values)
    logits = torch.cat([first.logits, second.logits], dim=1)
    for gradient, wanted in zip(
        torch.autograd.grad(logits.square().mean(), parameters), expected, strict=True
    ):
        assert_near(gradient, wanted, 1e-9)


@pytest.mark.parametrize("name", ["paper", "state a kv head", "very strong bound"])
def test_the_reference_backend_gives_the_same(name: str) -> None:
    model = model_of(VARIANTS[name])
    tokens = random_tokens(1, 40)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(tokens).logits.square().mean(), parameters)
    with use_backend("reference"):
        actual = torch.autograd.grad(model(tokens).logits.square().mean(), parameters)
    for gradient, wanted in zip(actual, expected, strict=True):
        assert_near(gradient, wanted, 1e-9)


@pytest.mark.parametrize("bias", [0.0, -100.0, -1000.0])
def test_gradients_are_finite_at_the_bound(bias: float) -> None:
    """Gates that have closed altogether, features far out: nothing overflows."""
    model = make_model().train()
    with torch.no_grad():
        for attention in model.attention_modules():
            attention.decay_gate.bias.fill_(bias)
            attention.q_proj.weight.mul_(100)
            attention.k_proj.weight.mul_(100)
    for parameter, gradient in gradients(model, random_tokens(2, 70)).items():
        assert gradient.isfinite().all(), parameter


def test_dropout_of_softmax_layers_is_for_training_only() -> None:
    model = make_model(layer_types=["full_attention"] * 2, attention_dropout=0.5)
    tokens = random_tokens(1, 20)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, model(tokens).logits)
        model.train()
        assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_a_few_steps_lower_the_loss() -> None:
    model = make_model(noise=0.0).train()
    tokens = random_tokens(4, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
