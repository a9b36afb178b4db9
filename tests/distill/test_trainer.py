"""The parts of the training loop: who reads what in a step, when it stops, and what gates are doing."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lawcat.convert.initialize import convert
from lawcat.distill.attention_transfer import attention_transfer_losses
from lawcat.distill.gate_statistics import GateStatistics
from lawcat.distill.precision import resolve_precision
from lawcat.distill.recipe import AttentionTransferSettings, RecoverySettings, TeacherTuningSettings
from lawcat.distill.recovery import RecoveryModel
from lawcat.distill.schedule import learning_rate_factor
from lawcat.distill.sequence import Batch
from lawcat.distill.trainer import (
    AttentionTransferStage,
    Interruption,
    RecoveryStage,
    TeacherTuningStage,
    _log_row,
    _request,
    peak_memory_bytes,
)
from lawcat.errors import ConfigurationError
from tiny_teachers import random_ids, tiny_teacher


def requests_of(
    settings: Any, *, index: int = 0, count: int = 1, seed: int = 0
) -> list[tuple[int, int, int]]:
    context: Any = SimpleNamespace(
        recipe=SimpleNamespace(seed=seed),
        workers=SimpleNamespace(index=index, count=count),
        first_sequence=100,
    )
    return [_request(context, settings, step) for step in range(settings.steps)]


@pytest.mark.parametrize(
    "settings",
    [
        AttentionTransferSettings(steps=50, batch_sequences=4),
        RecoverySettings(steps=50, batch_sequences=4),
        RecoverySettings(steps=50, batch_sequences=4, carried_segments=5),
        RecoverySettings(steps=50, batch_sequences=8, carried_segments=5, carried_sequences=4),
        RecoverySettings(steps=50, batch_sequences=4, carried_segments=5, carried_sequences=8),
    ],
    ids=lambda s: f"{s.batch_sequences} {getattr(s, 'carried_sequences', '')}",
)
def test_processes_share_a_batch_and_no_sequence_is_read_twice(settings: Any) -> None:
    whole = requests_of(settings)
    halves = zip(requests_of(settings, count=2), requests_of(settings, index=1, count=2), strict=True)
    read: set[int] = set()
    for (first, count, segments), (a, b) in zip(whole, halves, strict=True):
        assert a == (first, count // 2, segments)
        assert b == (first + count // 2, count // 2, segments)
        numbers = set(range(first, first + count))
        assert not numbers & read
        read |= numbers
    assert min(read) == 100


def test_how_often_and_how_far_a_state_is_carried() -> None:
    settings = RecoverySettings(steps=2000, batch_sequences=2, carried_segments=15, carried_share=0.25)
    segments = [request[2] for request in requests_of(settings)]
    carried = [number for number in segments if number > 1]
    assert len(carried) / len(segments) == pytest.approx(0.25, abs=0.04)
    assert set(carried) == {2, 4, 8, 16}
    assert all(carried.count(number) > len(carried) / 6 for number in (2, 4, 8, 16))
    assert segments == [request[2] for request in requests_of(settings, index=1, count=2)]
    assert segments != [request[2] for request in requests_of(settings, seed=1)]
    for longest, expected in ((1, {2}), (2, {2, 3}), (5, {2, 4, 6}), (7, {2, 4, 8})):
        settings = RecoverySettings(steps=100, carried_segments=longest, carried_share=1)
        assert {request[2] for request in requests_of(settings)} == expected
    assert {request[2] for request in requests_of(RecoverySettings(steps=9))} == {1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    interruption = Interruption()
    done = []

    def train() -> None:
        with interruption.handled():
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
            assert not interruption.requested
            with interruption.after_step():
                os.kill(os.getpid(), number)
                done.append("the step in hand")
                assert interruption.requested
            done.append("anything after it")

    with pytest.raises(KeyboardInterrupt):
        train()
    assert done == ["the step in hand"]
    assert signal.getsignal(number) is before
    assert "stopping after this step" in capfd.readouterr().err


def test_sigterm_twice_still_waits_and_ctrl_c_twice_does_not() -> None:
    interruption = Interruption()

    def train() -> None:
        with interruption.handled(), interruption.after_step():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.requested
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train()


def test_another_thread_leaves_the_signals_to_whoever_has_them() -> None:
    before = signal.getsignal(signal.SIGINT)
    found: list[Any] = []

    def work() -> None:
        with Interruption().handled():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_the_learning_rate_hangs_on_the_step_alone() -> None:
    settings = RecoverySettings(steps=10, warmup_steps=4, min_learning_rate_ratio=0.2)
    factors = [learning_rate_factor(step, settings) for step in range(10)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(a > b for a, b in itertools.pairwise(factors[4:]))
    assert factors[-1] > 0.2
    constant = RecoverySettings(steps=10, warmup_steps=2, schedule="constant")
    assert [learning_rate_factor(step, constant) for step in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]


def test_gate_statistics() -> None:
    student, _ = convert(tiny_teacher(), gate_bias_init="zeros")
    gates = GateStatistics()
    assert gates.summary() == {}
    with gates.watching(student):
        student(random_ids())
    student(random_ids())
    summary = gates.summary()
    # logsigmoid(0) / 16 halves a state in 16 tokens.
    assert summary["gate_median_half_life_tokens"] == pytest.approx(16.0, rel=1e-5)
    assert summary["gate_saturated_share"] == 0.0

    with torch.no_grad():
        student.model.layers[0].self_attn.decay_gate.bias.fill_(30.0)  # holds everything, moves no more
        student.model.layers[1].self_attn.decay_gate.bias[:4].fill_(-100.0)  # at the bound
    gates = GateStatistics()
    with gates.watching(student):
        student(random_ids())
    channels = 16
    assert gates.summary()["gate_saturated_share"] == pytest.approx((channels + 4) / (2 * channels))

    gates = GateStatistics()
    with gates.watching(student), student.teacher_mode():
        student(random_ids())
    assert gates.summary() == {}


def test_precision() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("float32", cpu) == torch.float32
    assert resolve_precision("bfloat16", cpu) == torch.bfloat16
    assert resolve_precision("auto", cpu) in (torch.float32, torch.bfloat16)
    assert resolve_precision("auto", torch.device("meta")) == torch.float32


def test_peak_memory_is_in_bytes() -> None:
    assert 50_000_000 < peak_memory_bytes(torch.device("cpu")) < 100_000_000_000


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [0.5, 1.0, 1.0, 0.90451, 0.65451, 0.34549, 0.09549]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("trapezoid", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    options: dict[str, Any] = {"schedule": schedule}
    options |= {} if schedule == "constant" else {"min_learning_rate_ratio": 0.0}
    options |= {"decay_share": 0.4} if schedule == "trapezoid" else {}
    settings = AttentionTransferSettings(steps=7, warmup_steps=2, **options)
    assert [learning_rate_factor(step, settings) for step in range(7)] == pytest.approx(expected, abs=1e-4)


def penalty_by_hand(student: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean of -log a * 16 over tokens, channels and layers, by the gate's equation."""
    means = []
    for layer in student.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs.get("hidden_states", args[0] if args else None)),
            with_kwargs=True,
        )
    seen: list[torch.Tensor] = []
    student.model(ids, use_cache=False)
    for layer, x in zip(student.model.layers, seen, strict=True):
        gate = layer.self_attn.decay_gate
        logits = x @ gate.reduce.T @ gate.expand.T + gate.bias
        means.append(torch.nn.functional.softplus(-logits).mean())
    return torch.stack(means).mean()


def gradients(student: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return found


def test_the_gate_penalty_of_recovery() -> None:
    ids = random_ids(2, 12)
    batch = Batch(ids, torch.ones(2, 12), ids > 0, ("text",) * 2)
    workers: Any = SimpleNamespace(count=2)
    student, _ = convert(tiny_teacher())
    with torch.no_grad():
        for layer in student.model.layers:
            layer.self_attn.decay_gate.expand.normal_()
    found = {}
    for penalty in (0.0, 0.3):
        settings = RecoverySettings(train="all", kl_weight=0.0, gate_penalty=penalty)
        stage = RecoveryStage(RecoveryModel(student, settings), settings, sequence_length=12)
        measured = stage.backward(batch, workers)
        found[penalty] = gradients(student)
        assert measured["loss"] == measured["cross_entropy"]
    # Each of the two processes adds half, as their gradients are summed.
    torch.autograd.backward(0.3 / 2 * penalty_by_hand(student, ids))
    by_hand = gradients(student)
    for name, gradient in found[0.3].items():
        expected = found[0.0][name] + by_hand.get(name, 0.0)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=name)
    name = "model.layers.1.self_attn.decay_gate.bias"
    assert by_hand[name].abs().max() > 1e-4


def test_the_gate_penalty_of_recovery_where_a_state_is_carried() -> None:
    """What is read without gradient counts for nothing."""
    ids = random_ids(2, 24)
    batch = Batch(ids, torch.ones(2, 24), ids > 0, ("text",) * 2)
    workers: Any = SimpleNamespace(count=1)
    student, _ = convert(tiny_teacher(), gate="head")
    found = []
    for penalty in (0.0, 0.3):
        settings = RecoverySettings(train="all", kl_weight=0.0, carried_segments=1, gate_penalty=penalty)
        stage = RecoveryStage(RecoveryModel(student, settings), settings, sequence_length=8)
        stage.backward(batch, workers)
        found.append(gradients(student))
    name = "model.layers.0.self_attn.decay_gate.bias"
    bias = student.model.layers[0].self_attn.decay_gate.bias
    # The second matrix is zero at first, so the logit is the bias, of any token and channel.
    expected = -0.3 * torch.sigmoid(-bias) / len(bias) / 2
    torch.testing.assert_close(found[1][name] - found[0][name], expected.detach(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("stage_class", [TeacherTuningStage, RecoveryStage])
@pytest.mark.parametrize("length", [24, 8])
def test_the_share_of_answers_that_are_right(stage_class: Any, length: int) -> None:
    """Of the tokens that are trained, weighted; and no share where nothing is asked."""
    if stage_class is TeacherTuningStage and length == 8:
        pytest.skip("stage 0 carries no state")
    student, _ = convert(tiny_teacher())
    settings = RecoverySettings(carried_segments=2)
    stage_settings: Any = settings if stage_class is RecoveryStage else TeacherTuningSettings()
    further = (length,) if stage_class is RecoveryStage else ()
    stage = stage_class(RecoveryModel(student, settings), stage_settings, *further)
    workers: Any = SimpleNamespace(count=1)
    ids, weight = random_ids(2, 24), torch.rand(2, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), student.teacher_mode() if stage.uses_softmax else contextlib.nullcontext():
        likeliest = student(ids).logits.argmax(-1)
    # What a model says of random tokens is hardly ever right: the last but one token is, in one sequence.
    is_answer = torch.zeros(2, 24, dtype=torch.bool)
    is_answer[0, 2] = is_answer[:, 20:] = True
    ids[0, 23] = likeliest[0, 22]
    batch = Batch(ids, weight, is_answer, ("needle",) * 2)
    counted = is_answer & (torch.arange(24) > 24 - length)
    right = counted[:, 1:] & (likeliest[:, :-1] == ids[:, 1:])
    assert right[0, 22]
    row = _log_row(stage.backward(batch, workers))
    expected = weight[:, 1:][right].sum() / weight[counted].sum()
    assert row["answer_accuracy"] == pytest.approx(expected.item(), rel=1e-5)
    assert row.keys() - {"cross_entropy", "kl"} == {"loss", "answer_accuracy"}
    nothing = replace(batch, is_answer=torch.zeros_like(is_answer))
    assert "answer_accuracy" not in _log_row(stage.backward(nothing, workers))


def test_answers_count_in_attention_transfer() -> None:
    ids = random_ids(2, 12)
    weight, is_answer = torch.full(ids.shape, 3.0), torch.zeros(ids.shape, dtype=torch.bool)
    is_answer[0, 4:6] = True
    batch = SimpleNamespace(input_ids=ids, loss_weight=weight, is_answer=is_answer)
    student, _ = convert(tiny_teacher())
    workers: Any = SimpleNamespace(count=1)
    plain = AttentionTransferStage(student, AttentionTransferSettings()).backward(batch, workers)
    assert "answer_loss" not in plain
    student.zero_grad(set_to_none=True)
    settings = AttentionTransferSettings(answer_weight=2.0)
    found = AttentionTransferStage(student, settings).backward(batch, workers)
    assert torch.equal(found["layer_losses"], plain["layer_losses"])
    expected: list[Tensor] = []
    attention_transfer_losses(
        student, ids, answer_weight=1.0, loss_weight=is_answer.float(), answer_losses=expected
    )
    torch.testing.assert_close(found["answer_loss"], torch.stack(expected).mean())
    with pytest.raises(ConfigurationError, match=r"answer_weight: got -1\.0; it must be 0 or above"):
        AttentionTransferSettings(answer_weight=-1)


def test_the_gate_penalty_of_attention_transfer() -> None:
    ids = random_ids(2, 12)
    student, _ = convert(tiny_teacher())
    workers: Any = SimpleNamespace(count=1)
    found, losses = [], []
    for penalty in (0.0, 0.5):
        stage = AttentionTransferStage(student, AttentionTransferSettings(gate_penalty=penalty))
        losses.append(stage.backward(SimpleNamespace(input_ids=ids), workers)["loss"])
        found.append(gradients(student))
    assert losses[0] == losses[1]
    for i, layer in enumerate(student.model.layers):
        name = f"model.layers.{i}.self_attn.decay_gate.bias"
        bias = layer.self_attn.decay_gate.bias
        expected = -0.5 * torch.sigmoid(-bias) / len(bias)
        torch.testing.assert_close(found[1][name] - found[0][name], expected.detach(), rtol=1e-3, atol=1e-6)
    assert all(not module._forward_hooks for module in student.modules())
