"""Stage 2: the teacher inside the student stays the teacher, and the losses are what they are said to be."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from comparison import assert_near
from lawcat import LawcatCache, LawcatForCausalLM
from lawcat.convert.initialize import cast_teacher_weights, convert, is_new_parameter
from lawcat.distill.recipe import RecoverySettings
from lawcat.distill.recovery import RecoveryModel, plain_name
from lawcat.errors import ConfigurationError, MissingDependencyError
from tiny_teachers import random_ids, tiny_teacher

IDS = random_ids(2, 20)
WEIGHT = torch.rand(2, 20, generator=torch.Generator().manual_seed(4))
WEIGHT[1, 5] = 0.0

WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "all": {"train": "all"},
    "MLPs in full": {"full_targets": ("gate_proj", "up_proj", "down_proj")},
    "a projection in full": {"full_targets": ("k_proj",), "lora_targets": ("q_proj", "up_proj")},
}


def recovery_of(
    settings: dict[str, Any] | None = None, softmax_layers: tuple[int, ...] = (), **fields: Any
) -> RecoveryModel:
    """Return what stage 2 trains, all of it moved from where it starts."""
    student, _ = convert(tiny_teacher(**fields), softmax_layers=softmax_layers)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if is_new_parameter(name):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    recovery = RecoveryModel(student, RecoverySettings(**(settings or {})))
    if recovery.lora_scale:
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if ".lora_" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return recovery


def train(recovery: RecoveryModel, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([{**group, "lr": 0.01} for group in recovery.parameter_groups()])
    for step in range(steps):
        ids = random_ids(2, 20, seed=step)
        torch.autograd.backward(recovery.losses(ids, torch.ones(2, 20), total_weight=38.0)[0])
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("softmax_layers", [(), (0,)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_teacher_stays_the_teacher(way: str, softmax_layers: tuple[int, ...], dropout: float) -> None:
    expected = tiny_teacher(attention_dropout=dropout).model(IDS).last_hidden_state
    recovery = recovery_of(WAYS[way], softmax_layers, attention_dropout=dropout)
    assert torch.equal(recovery.teacher_hidden(IDS), expected)
    student_before = recovery.student.model(IDS).last_hidden_state
    train(recovery)
    assert torch.equal(recovery.teacher_hidden(IDS), expected)
    assert not torch.allclose(recovery.student.model(IDS).last_hidden_state, student_before)
    assert not recovery.teacher_hidden(IDS).requires_grad
    # Asking the teacher leaves the student as it was.
    assert [attention.is_linear for attention in recovery.student.attention_modules()] == [
        layer not in softmax_layers for layer in range(2)
    ]
    trained = {name for name, p in recovery.student.named_parameters() if p.requires_grad}
    assert trained == {
        name
        for name, _ in recovery.student.named_parameters()
        if way == "all" or is_new_parameter(name) or ".lora_" in name or ".modules_to_save." in name
    }


@pytest.mark.parametrize("way", WAYS)
def test_the_groups_hold_all_that_trains(way: str) -> None:
    settings = {"learning_rate": 0.5, "new_parameter_learning_rate": 0.25} | WAYS[way]
    in_full = settings.get("full_targets", ())
    if in_full:
        settings["full_learning_rate"] = 0.125
    recovery = recovery_of(settings, tie_word_embeddings=True)
    new, base, *rest = recovery.parameter_groups()
    assert (new["name"], new["peak"], base["name"], base["peak"]) == ("new", 0.25, "base", 0.5)
    assert [(group["name"], group["peak"], len(group["params"])) for group in rest] == (
        [("full", 0.125, 2 * len(in_full))] if in_full else []
    )
    names = {id(parameter): name for name, parameter in recovery.student.named_parameters()}
    assert all(is_new_parameter(names[id(p)]) for p in new["params"])
    assert not any(is_new_parameter(names[id(p)]) for p in base["params"])
    found = [id(p) for group in (new, base, *rest) for p in group["params"]]
    assert all(names[id(p)].split(".")[-4] in in_full for group in rest for p in group["params"])
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in recovery.student.parameters() if p.requires_grad}
    assert all(parameter.dtype == torch.float32 for parameter in new["params"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [False, True])
def test_losses_and_gradients(way: str, tied: bool) -> None:
    settings = {"cross_entropy_weight": 0.7, "kl_weight": 0.4, "kl_temperature": 2.0} | WAYS[way]
    recovery = recovery_of(settings, tie_word_embeddings=tied)
    loss, cross_entropy, kl, _ = recovery.losses(IDS, WEIGHT, total_weight=5.0)
    torch.autograd.backward(loss)
    found = {name: p.grad.clone() for name, p in recovery.student.named_parameters() if p.grad is not None}
    recovery.student.zero_grad()

    logits = recovery.student(IDS).logits[:, :-1]
    plain = F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="none").view(2, -1)
    teacher = tiny_teacher(tie_word_embeddings=tied)(IDS).logits[:, :-1].detach()
    divergence = F.kl_div(
        (logits / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    expected_ce = (WEIGHT[:, 1:] * plain).sum() / 5.0
    expected_kl = (WEIGHT[:, 1:] * divergence).sum() * 4 / 5.0
    expected = 0.7 * expected_ce + 0.4 * expected_kl
    torch.autograd.backward(expected)
    assert_near(loss, expected, 1e-5)
    assert_near(cross_entropy, expected_ce, 1e-5)
    assert_near(kl, expected_kl, 1e-5)
    gradients = {name: p.grad for name, p in recovery.student.named_parameters() if p.requires_grad}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient is not None
        assert_near(found[name], gradient, 5e-5, name, least_scale=1e-5)


@pytest.mark.parametrize("way", ["lora", "all"])
def test_the_teacher_counts_less_on_some_tokens(way: str) -> None:
    settings = {"cross_entropy_weight": 0.7, "kl_weight": 0.4} | WAYS[way]
    recovery = recovery_of(settings)
    factor = torch.rand(2, 20, generator=torch.Generator().manual_seed(9))
    factor[0, 3:9] = 0.0
    loss, cross_entropy, kl, _ = recovery.losses(IDS, WEIGHT, factor, total_weight=5.0)
    torch.autograd.backward(loss)
    found = {name: p.grad.clone() for name, p in recovery.student.named_parameters() if p.grad is not None}
    recovery.student.zero_grad()

    # Whether position t predicts token t + 1 or is token t, its factor is that of the token to come.
    student, teacher = recovery.student(IDS).logits[:, :-1], tiny_teacher()(IDS).logits[:, :-1].detach()
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    expected_ce = (WEIGHT[:, 1:] * -log_p.gather(-1, IDS[:, 1:, None])[..., 0]).sum() / 5.0
    expected_kl = (WEIGHT[:, 1:] * factor[:, 1:] * divergence).sum() / 5.0
    torch.autograd.backward(0.7 * expected_ce + 0.4 * expected_kl)
    assert_near(cross_entropy, expected_ce, 1e-5)
    assert_near(kl, expected_kl, 1e-5)
    assert_near(loss, 0.7 * expected_ce + 0.4 * expected_kl, 1e-5)
    for name, parameter in recovery.student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert_near(found[name], parameter.grad, 5e-5, name, least_scale=1e-5)


def cut(cache: LawcatCache) -> None:
    """Cut the graph behind a cache."""
    cache._map(Tensor.detach)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("softmax_layers", [(), (1,)])
@pytest.mark.parametrize("num_trained", [5, 16])
def test_carried_losses(way: str, softmax_layers: tuple[int, ...], num_trained: int) -> None:
    recovery = recovery_of(WAYS[way] | {"cross_entropy_weight": 0.6}, softmax_layers)
    student: LawcatForCausalLM = recovery.student
    loss = recovery.carried_losses(IDS, WEIGHT, num_trained, total_weight=3.0).loss
    torch.autograd.backward(loss)
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    # The definition: one pass over the first tokens, one over the rest, with the graph cut between.
    cache = student.new_cache()
    student.model(IDS[:, :-num_trained], past_key_values=cache, use_cache=True)
    cut(cache)
    logits = student(IDS[:, -num_trained:], past_key_values=cache).logits[:, :-1]
    targets, weight = IDS[:, -num_trained + 1 :], WEIGHT[:, -num_trained + 1 :]
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    expected = 0.6 * (plain * weight.flatten()).sum() / 3.0
    torch.autograd.backward(expected)
    assert_near(loss, expected, 1e-5)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert_near(found[name], parameter.grad, 5e-5, name, least_scale=1e-5)

    # Its value is that of one pass over everything: nothing but the gradient is cut.
    whole = student(IDS).logits[:, -num_trained:-1]
    uncut = F.cross_entropy(whole.flatten(0, 1), targets.flatten(), reduction="none")
    assert_near(loss, 0.6 * (uncut * weight.flatten()).sum() / 3.0, 1e-4)


def test_a_separate_teacher_only_where_it_is_needed() -> None:
    assert recovery_of({"train": "lora"})._teacher is None
    assert recovery_of({"train": "all", "kl_weight": 0.0})._teacher is None
    apart = recovery_of({"train": "all"}, tie_word_embeddings=True)
    assert apart._teacher is not None
    assert not any(parameter.requires_grad for parameter in apart._teacher.parameters())
    mine = {parameter.data_ptr() for parameter in apart.student.parameters()}
    assert mine.isdisjoint(parameter.data_ptr() for parameter in apart._teacher.parameters())


def test_without_kl_the_teacher_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    recovery = recovery_of({"kl_weight": 0.0})
    monkeypatch.setattr(recovery, "teacher_hidden", None)
    loss, cross_entropy, kl, _ = recovery.losses(IDS, WEIGHT, total_weight=1.0)
    assert (loss.item(), kl.item()) == (cross_entropy.item(), 0.0)


@pytest.mark.parametrize("target", ["q_prj", "lm_head", "embed_tokens", "q_conv", "self_attn"])
def test_targets_that_are_no_linear_layers(target: str) -> None:
    student, _ = convert(tiny_teacher(tie_word_embeddings=True))
    with pytest.raises(ConfigurationError, match=rf"recovery\.lora_targets: '{target}' .*down_proj.*q_proj"):
        RecoveryModel(student, RecoverySettings(lora_targets=("q_proj", target)))


def test_targets_in_full_that_are_no_linear_layers() -> None:
    student, _ = convert(tiny_teacher())
    with pytest.raises(ConfigurationError, match=r"recovery\.full_targets: 'upproj' .*mean 'up_proj'"):
        RecoveryModel(student, RecoverySettings(full_targets=("upproj",)))


def test_weights_that_train_in_full_are_float32_and_begin_at_the_teachers() -> None:
    student, _ = convert(tiny_teacher())
    cast_teacher_weights(student, torch.bfloat16)
    before = {name: p.clone() for name, p in student.named_parameters()}
    recovery = RecoveryModel(student, RecoverySettings(full_targets=("up_proj",)))
    found = {plain_name(n): p for n, p in student.named_parameters() if ".modules_to_save." in n}
    assert set(found) == {f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)}
    for name, parameter in found.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name].float())
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        kl = recovery.losses(IDS, WEIGHT, total_weight=1.0)[2]
        train(recovery)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(parameter).all(), name
        elif (plain := name.replace(".base_layer", "").replace(".original_module", "")) in before:
            assert torch.equal(parameter, before[plain]), name
    assert all((p - before[name].float()).abs().max() > 1e-3 for name, p in found.items())
    assert kl > 0


def test_factors_go_where_they_were_asked_for() -> None:
    recovery = recovery_of({"lora_targets": ("v_proj", "up_proj"), "lora_rank": 3, "lora_alpha": 6.0})
    assert recovery.lora_scale == 2.0
    factors = {plain_name(name): p for name, p in recovery.student.named_parameters() if ".lora_" in name}
    assert set(factors) == {
        f"model.layers.{layer}.{module}.lora_{which}.weight"
        for layer in range(2)
        for module in ("self_attn.v_proj", "mlp.up_proj")
        for which in "AB"
    }
    assert factors["model.layers.0.mlp.up_proj.lora_A.weight"].shape == (3, 32)


def test_factors_are_float32_on_frozen_bfloat16() -> None:
    student, _ = convert(tiny_teacher())
    cast_teacher_weights(student, torch.bfloat16)
    recovery = RecoveryModel(student, RecoverySettings())
    for name, parameter in student.named_parameters():
        trains = is_new_parameter(name) or ".lora_" in name
        assert parameter.dtype == (torch.float32 if trains else torch.bfloat16), name
    train(recovery)
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())


def test_peft_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    student, _ = convert(tiny_teacher())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"'peft'.*pip install 'lawcat\[distill\]'"):
        RecoveryModel(copy.deepcopy(student), RecoverySettings())
    assert RecoveryModel(student, RecoverySettings(train="all")).lora_scale == 0.0


def test_nothing_is_said_that_a_user_cannot_change() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(recovery_of(), steps=1)
