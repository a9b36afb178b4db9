"""Stage 1 against two whole forward passes: losses, gradients, and what they touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from comparison import assert_near
from lawcat import LawcatForCausalLM
from lawcat.convert.initialize import cast_teacher_weights, convert, is_new_parameter
from lawcat.distill.attention_transfer import attention_transfer_losses
from tiny_teachers import LLAMA3_ROPE, random_ids, tiny_teacher


def student_of(softmax_layers: tuple[int, ...] = (), **fields: Any) -> LawcatForCausalLM:
    operator = fields.pop("operator", {})
    student, _ = convert(
        tiny_teacher(**{"num_hidden_layers": 3} | fields), softmax_layers=softmax_layers, **operator
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if is_new_parameter(name):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return student


def slowly(
    student: LawcatForCausalLM, ids: Tensor, tokens: list[list[tuple[int, float]]] | None = None
) -> list[Tensor]:
    """The definition, from the teacher's own forward pass: what enters and leaves attention is caught.

    Given tokens and what each counts, a sequence, the error is that of what predicts these.
    """
    entering: list[Tensor] = []
    leaving: list[Tensor] = []
    hooks = []
    for attention in student.attention_modules():
        hooks.append(
            attention.register_forward_pre_hook(
                lambda module, args, kwargs: entering.append(kwargs["hidden_states"]), with_kwargs=True
            )
        )
        hooks.append(attention.o_proj.register_forward_pre_hook(lambda module, args: leaving.append(args[0])))
    with torch.no_grad(), student.teacher_mode():
        student(ids)
        targets, inputs = list(leaving), list(entering)
    losses = []
    positions = student.model.rotary_emb(inputs[0], torch.arange(ids.shape[1])[None])
    for layer, attention in enumerate(student.attention_modules()):
        if attention.is_linear:
            leaving.clear()
            attention(hidden_states=inputs[layer], position_embeddings=positions)
            rows = list(zip(leaving[0], targets[layer], strict=True))
            if tokens is None:
                losses.append(sum(((o - t) ** 2).mean() / (t**2).mean() for o, t in rows) / len(ids))
                continue
            loss = torch.zeros(())
            for (o, t), counted in zip(rows, tokens, strict=True):
                error = sum(w * ((o[i - 1] - t[i - 1]) ** 2).sum() for i, w in counted)
                size = sum(w * (t[i - 1] ** 2).sum() for i, w in counted)
                if counted:
                    loss = loss + error / size / len(ids)
            losses.append(loss)
    for hook in hooks:
        hook.remove()
    return losses  # type: ignore[return-value]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"softmax_layers": (1,)},
        {"rope_parameters": LLAMA3_ROPE, "attention_bias": True},
        {"operator": {"linear_rope": True, "gate": "head", "state_heads": "kv", "use_conv": False}},
        {"family": "mistral", "tie_word_embeddings": True},
        {"family": "qwen2"},
        {"family": "qwen3", "softmax_layers": (1,)},
        {"attention_dropout": 0.9},
    ],
    ids=str,
)
def test_losses_and_gradients(fields: dict[str, Any]) -> None:
    ids = random_ids(3, 20)
    student = student_of(**fields)
    expected = slowly(student, ids)
    torch.autograd.backward(0.25 * sum(expected))
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad(set_to_none=True)

    found = attention_transfer_losses(student, ids, gradient_scale=0.25)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert_near(found, torch.stack(expected), 1e-6, "losses")
    for name, parameter in student.named_parameters():
        if not is_new_parameter(name):
            assert parameter.grad is None, f"{name} is the teacher's and got a gradient"
            continue
        assert parameter.grad is not None, name
        wanted = gradients[name]
        assert wanted is not None
        assert_near(parameter.grad, wanted, 2e-5, name, least_scale=1e-6)
    assert any(p.grad is not None and p.grad.abs().max() > 1e-4 for p in student.parameters())


def test_what_predicts_answers_counts_beside_the_rest() -> None:
    ids, student = random_ids(3, 20), student_of()
    counted = [[(4, 1.0), (5, 8.0), (19, 1.0)], [], [(1, 2.0)]]  # the second has no answer
    weight = torch.zeros(ids.shape)
    for row, tokens in enumerate(counted):
        for token, value in tokens:
            weight[row, token] = value
    expected, of_answers = slowly(student, ids), slowly(student, ids, counted)
    torch.autograd.backward(0.25 * (sum(expected) + 3.0 * sum(of_answers)))
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad(set_to_none=True)
    found_of_answers: list[Tensor] = []
    found = attention_transfer_losses(
        student,
        ids,
        gradient_scale=0.25,
        answer_weight=3.0,
        loss_weight=weight,
        answer_losses=found_of_answers,
    )
    assert_near(found, torch.stack(expected), 1e-6, "losses")
    assert_near(torch.stack(found_of_answers), torch.stack(of_answers), 1e-6, "losses of answers")
    for name, parameter in student.named_parameters():
        if is_new_parameter(name):
            assert_near(parameter.grad, gradients[name], 2e-5, name, least_scale=1e-6)  # type: ignore[arg-type]


def test_losses_alone_leave_no_gradient() -> None:
    student, ids = student_of(), random_ids()
    alone = attention_transfer_losses(student, ids)
    assert all(parameter.grad is None for parameter in student.parameters())
    assert torch.equal(alone, attention_transfer_losses(student, ids, gradient_scale=1.0))


def test_gradients_of_parts_add_up_to_those_of_the_batch() -> None:
    student, ids = student_of(), random_ids(4)
    whole = attention_transfer_losses(student, ids, gradient_scale=1.0)
    expected = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    parts = [attention_transfer_losses(student, part, gradient_scale=0.5) for part in ids.split(2)]
    assert_near(sum(parts) / 2, whole, 1e-6)  # type: ignore[arg-type]
    for name, parameter in student.named_parameters():
        if name in expected:
            assert_near(parameter.grad, expected[name], 1e-5, name, least_scale=1e-6)  # type: ignore[arg-type]


def test_the_target_is_causal_whichever_attention_function() -> None:
    student, ids = student_of(), random_ids()
    expected = attention_transfer_losses(student, ids)
    student.set_attn_implementation("eager")
    assert_near(attention_transfer_losses(student, ids), expected, 1e-5)


def test_frozen_weights_in_bfloat16() -> None:
    student, ids = student_of(), random_ids()
    expected = attention_transfer_losses(student, ids)
    cast_teacher_weights(student, torch.bfloat16)
    assert_near(attention_transfer_losses(student, ids, gradient_scale=1.0), expected, 0.1)
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == is_new_parameter(name)
        assert parameter.grad is None or parameter.grad.dtype == torch.float32


def test_training_lowers_the_loss() -> None:
    student, _ = convert(tiny_teacher())
    before = {n: p.detach().clone() for n, p in student.named_parameters() if not is_new_parameter(n)}
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.01)
    held_out = random_ids(8, 32, seed=1000)
    first = attention_transfer_losses(student, held_out)
    for step in range(30):
        attention_transfer_losses(student, random_ids(4, 32, seed=step), gradient_scale=1.0)
        optimizer.step()
        optimizer.zero_grad()
    last = attention_transfer_losses(student, held_out)
    assert (last < 0.87 * first).all(), (first, last)
    for name, value in before.items():
        assert torch.equal(dict(student.named_parameters())[name], value)
