"""Where the new parameters start: nearly the identity in front of a known spread of memory."""

from __future__ import annotations

import math

import pytest
import torch
from model_variants import random_tokens
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from comparison import assert_near
from lawcat import LawcatForCausalLM
from lawcat.convert.initialize import convert
from small_models import make_model


def first_attention(**fields: object):
    return make_model(noise=0.0, **fields).attention_modules()[0]


@pytest.mark.parametrize("taps", [2, 4, 5])
def test_convolutions(taps: int) -> None:
    attention = first_attention(conv_kernel_size=taps)
    assert attention.q_conv.weight.shape == (32, taps)
    assert attention.k_conv.weight.shape == (32, taps)
    for module in (attention.q_conv, attention.k_conv):
        assert (module.weight[:, -1] == 1.0).all()
        assert (module.weight[:, :-1] == 0.001).all()


def test_convolutions_that_start_across_tokens() -> None:
    weight = first_attention(conv_init_std=0.3, hidden_size=512, head_dim=128).q_conv.weight
    assert (weight[:, -1] == 1.0).all()
    assert 0.27 < weight[:, :-1].std().item() < 0.33
    assert weight[:, :-1].mean().abs().item() < 0.03
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    teachers = [LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)) for _ in range(3)]
    students = [
        convert(teacher, conv_init_std=0.3, seed=seed)[0]
        for teacher, seed in zip(teachers, (0, 0, 1), strict=True)
    ]
    first, again, other = (s.attention_modules()[0].k_conv.weight for s in students)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_filter_a_kv_head() -> None:
    attention = first_attention(state_heads="kv")
    assert attention.q_conv.weight.shape == (32, 4)
    assert attention.k_conv.weight.shape == (16, 4)
    assert attention.feature_map.weight.shape == (2, 8, 4)


@pytest.mark.parametrize("feature_dim", [4, 8, 16])
def test_feature_maps_are_columns_of_the_identity(feature_dim: int) -> None:
    weight = first_attention(feature_dim=feature_dim).feature_map.weight
    assert weight.shape == (4, 8, feature_dim // 2)
    for matrix in weight:
        assert torch.equal(matrix, torch.eye(8)[:, : feature_dim // 2])


def test_features_are_two_softmaxes() -> None:
    feature_map = first_attention().feature_map
    u = torch.randn(2, 5, 4, 8)
    features = feature_map(u)
    assert features.shape == (2, 5, 4, 8)
    assert (features > 0).all()
    assert_near(features[..., :4], u[..., :4].softmax(-1), 1e-6)
    assert_near(features[..., 4:], (-u[..., :4]).softmax(-1), 1e-6)


def test_the_gate_starts_as_its_bias_says() -> None:
    gate = first_attention().decay_gate
    assert not gate.expand.any()
    assert gate.reduce.any()
    log_decay = gate.log_decay(gate(torch.randn(1, 3, 32)))
    assert log_decay.shape == (1, 3, 2, 8)
    expected = (F.logsigmoid(gate.bias) / 16).view(2, 8).expand(1, 3, 2, 8)
    assert_near(log_decay, expected, 1e-6)


def test_spread_biases_cover_both_halves_of_the_features() -> None:
    bias = first_attention(head_dim=16).decay_gate.bias.view(2, 2, 8)
    for head in bias:
        for half in head:
            assert torch.equal(half, torch.linspace(0.0, 8.0, 8))
    half_lives = math.log(0.5) / (F.logsigmoid(bias[0, 0]) / 16).detach()
    assert half_lives[0] == pytest.approx(16, rel=0.01)
    assert half_lives[-1] > 30_000


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_one_bias_a_head_spreads_over_the_heads(kv_heads: int) -> None:
    bias = first_attention(gate="head", num_key_value_heads=kv_heads).decay_gate.bias
    assert torch.equal(bias, torch.linspace(0.0, 8.0, kv_heads))


@pytest.mark.parametrize("gate", ["channel", "head"])
def test_biases_of_zero(gate: str) -> None:
    assert not first_attention(gate=gate, gate_bias_init="zeros").decay_gate.bias.any()


def test_no_gate_has_no_parameters() -> None:
    assert not hasattr(first_attention(gate="none"), "decay_gate")


def test_the_gate_stays_within_its_bounds() -> None:
    gate = first_attention(min_log_decay=-2.0).decay_gate
    with torch.no_grad():
        gate.bias[:3] = torch.tensor([-1e4, 1e4, 0.0])
    log_decay = gate.log_decay(gate(torch.zeros(1, 1, 32))).flatten()
    assert log_decay[0] == -2.0
    assert log_decay[1] == 0.0
    assert (log_decay <= 0).all()
    assert (log_decay >= -2.0).all()


def test_no_convolution_has_no_parameters() -> None:
    assert not any("conv" in name for name, _ in first_attention(use_conv=False).named_parameters())


def test_new_models_are_alike_for_a_seed() -> None:
    first, second = make_model(noise=0.0), make_model(noise=0.0)
    for (name, parameter), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_modules_built_on_the_meta_device_are_initialised() -> None:
    with torch.device("meta"):
        model = LawcatForCausalLM(make_model().config)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    attention = model.attention_modules()[0]
    assert (attention.q_conv.weight[:, -1] == 1.0).all()
    assert torch.equal(attention.decay_gate.bias, first_attention().decay_gate.bias)


def test_the_number_of_new_parameters() -> None:
    """Those that the method needs and no more."""
    model = make_model(noise=0.0)
    hidden, heads, kv_heads, width, rank, taps = 32, 4, 2, 8, 16, 4
    a_layer = 2 * heads * width * taps + heads * width * width // 2
    a_layer += rank * hidden + kv_heads * width * rank + kv_heads * width
    teacher = make_model(noise=0.0, layer_types=["full_attention"] * 2)
    assert model.num_parameters() - teacher.num_parameters() == 2 * a_layer


@torch.no_grad()
def test_an_untrained_model_is_finite() -> None:
    assert make_model(noise=0.0)(random_tokens(2, 50)).logits.isfinite().all()
