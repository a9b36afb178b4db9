"""Whole models and training stages: records, and checks that can fail."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import masking_utils

from comparison import assert_near
from lawcat.bench import generation, training
from lawcat.bench.generation import FilledLayer, decoding, prefill, random_tokens
from lawcat.bench.models import Pair, load_pair, random_pair
from lawcat.convert.initialize import convert
from lawcat.convert.save import save_student
from lawcat.convert.teacher import load_teacher
from lawcat.distill.training_step import TrainingStep
from lawcat.ops.triton import support
from small_models import make_model
from tiny_teachers import save_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair() -> Pair:
    return random_pair("tiny", dtype=torch.float32, device=CPU)


def test_weights_are_shared_and_the_teacher_still_computes(pair: Pair) -> None:
    teacher, student = pair.teacher.model.layers[0], pair.student.model.layers[0]
    assert teacher.self_attn.q_proj.weight.data_ptr() == student.self_attn.q_proj.weight.data_ptr()
    tokens = torch.randint(3, 200, (2, 9))
    with torch.no_grad(), pair.student.teacher_mode():
        expected = pair.student(tokens).logits
        assert_near(pair.teacher(tokens).logits, expected, 1e-5)


def test_a_teacher_gets_no_mask_even_while_a_graph_is_captured(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = []
    attend = functional.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    tokens = torch.randint(3, 200, (2, 9))
    with torch.no_grad():
        expected = pair.teacher(tokens, logits_to_keep=1).logits
        monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
        monkeypatch.setattr(masking_utils, "_ignore_causal_mask_sdpa", lambda *_, **__: False)
        teacher = next(subject for subject in pair.subjects(("torch",)) if not subject.is_ours)
        assert_near(prefill(teacher, tokens)(), expected, 1e-5)
    assert masks == [None, None]
    assert pair.teacher.config._attn_implementation == "sdpa"


def test_new_parameters_are_float32_in_a_half_precision_pair() -> None:
    pair = random_pair("tiny", dtype=torch.bfloat16, device=CPU)
    attention = pair.student.model.layers[0].self_attn
    assert attention.q_conv.weight.dtype == torch.float32
    assert attention.q_proj.weight.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_records(pair: Pair) -> None:
    seen: list[tuple[int, int]] = []
    records = generation.measure(
        pair,
        lengths=[40, 16],
        batch=2,
        decode_batch=3,
        seconds=0.005,
        progress=lambda title, done, total: seen.append((done, total)),
    )
    assert seen == [(i, 4) for i in range(5)]  # the first before the checks
    found = [(r.measurement, r.contender, r.tokens, r.batch) for r in records if r.median_s]
    contenders = ("lawcat (torch)", "teacher, torch SDPA")
    for contender in contenders:
        for tokens in (16, 40):
            assert ("model prefill", contender, tokens, 2) in found
            assert ("model decode", contender, tokens, 3) in found
    assert all(record.error < 1e-4 for record in records if record.median_s)


def test_what_is_kept_of_the_sequences(pair: Pair) -> None:
    """A state of one size, whose bytes are worked out by hand; keys and values of every token."""
    records = generation.measure(pair, lengths=[40, 16], batch=2, decode_batch=3, seconds=0.005)
    config = pair.student.config
    width, features, heads = config.head_dim, config.feature_dim, config.num_attention_heads
    state = config.num_state_heads * features * (width + 1)
    inputs = (config.conv_kernel_size - 1) * (heads + config.num_state_heads) * width
    token = 2 * config.num_key_value_heads * width
    for record in records:
        rows, new = (2, 0) if record.measurement == "model prefill" else (3, 1)  # the cache has room for it
        numbers = state + inputs if record.is_ours else token * (record.tokens + new)
        expected = rows * config.num_hidden_layers * numbers * 4
        assert record.state_bytes == (expected if record.median_s else None)


@pytest.mark.parametrize(
    ("fields", "prefill_by", "reasons"),
    [
        (
            {"sliding_window": 8},
            "torch",
            {"torch runs, not triton: there is no kernel for a sliding window beside linear attention"},
        ),
        (
            {"feature_map": "untied"},
            "triton",
            {None, "torch runs, not triton: there is no kernel for a step with untied feature maps"},
        ),
        ({}, "triton", {None}),
    ],
    ids=str,
)
def test_a_figure_is_of_what_ran(
    fields: dict[str, object], prefill_by: str, reasons: set[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's time is not called that of the kernels, whether that was warned of before or not."""
    if reason := support.missing():
        pytest.skip(reason)
    monkeypatch.setattr(generation, "_CHECK_TOKENS", 9)
    small = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16, "num_hidden_layers": 1}
    student = make_model(**(small | fields))
    for _ in range(2 if prefill_by == "torch" else 1):  # the interpreter is slow
        records = generation.measure(
            Pair("small", student, student), lengths=[9], seconds=0.001, backends=("triton",)
        )
        ours = [record for record in records if record.is_ours]
        assert {record.reason for record in ours} == reasons
        assert [record.backend for record in ours] == [prefill_by, "triton" if not fields else "torch"]
        assert all(record.reason is None for record in records if not record.is_ours)


def test_a_training_step_by_another_backend_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := support.missing():
        pytest.skip(reason)
    monkeypatch.setattr(training, "_CHECKED_TOKENS", 9)
    pair = random_pair("tiny", dtype=torch.float32, device=CPU)
    student, _ = convert(pair.teacher, sliding_window=4)
    given = Pair("tiny", student, pair.teacher)
    records = training.measure(given, tokens=9, batch=1, seconds=0.001, backends=("triton",))
    why = "torch runs, not triton: there is no kernel for a sliding window beside linear attention"
    assert [(record.reason, record.backend) for record in records] == [(why, "torch")] * 2


class Repetition:
    """A graph that runs the function again."""

    def capture(self, function: Callable[[], Any]) -> None:
        self.function = function

    def replay(self) -> Any:
        return self.function()


def test_replays_of_a_training_step_are_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step captures itself, which the record did not say."""
    made = functools.partial(TrainingStep, is_queued=True, make_graph=Repetition)
    for make, is_replayed in ((TrainingStep, False), (made, True)):
        monkeypatch.setattr(training, "TrainingStep", make)
        pair = random_pair("tiny", dtype=torch.float32, device=CPU)
        records = training.measure(pair, tokens=8, batch=1, seconds=0.001)
        assert [record.reason for record in records] == [None, None]
        assert [record.uses_cuda_graph for record in records] == [is_replayed] * 2
        assert all(record.peak_memory_bytes is None or record.peak_memory_bytes > 0 for record in records)


def test_the_filled_cache_is_a_cache(pair: Pair) -> None:
    """A token after a context whose keys were computed, the row for it holding NaN before."""
    subject = next(s for s in pair.subjects() if not s.is_ours)
    found = generation._check(subject, CPU, 0)
    assert found.reason is None
    assert found.error < 1e-5


def test_a_model_that_decodes_wrongly_gets_no_figure(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(
        self: FilledLayer, keys: torch.Tensor, values: torch.Tensor, *args: object, **options: object
    ):
        return self.keys[:, :, :-1], self.values[:, :, :-1]

    monkeypatch.setattr(FilledLayer, "update", forgets)
    records = generation.measure(pair, lengths=[16], seconds=0.005)
    reasons = {record.contender: record.reason for record in records}
    assert reasons["teacher, torch SDPA"].startswith("wrong: relative error of the logits")
    assert reasons["lawcat (torch)"] is None


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_repeated_steps_of_a_chained_state_go_on(pair: Pair, backend: str) -> None:
    """As replays of a CUDA graph do: tensors stay at their addresses and hold what the step left."""
    if backend == "triton" and (reason := support.missing()):
        pytest.skip(reason)
    subject, by_torch, *_ = pair.subjects((backend, "torch"))
    chained = decoding(subject, 3, 1, CPU, is_chained=True)
    plain = decoding(by_torch, 3, 1, CPU)
    for _ in range(2):
        assert_near(chained(), plain(), 1e-5)


def test_prefill_gives_the_last_logits(pair: Pair) -> None:
    for subject in pair.subjects():
        tokens = random_tokens(subject, 2, 12, CPU, 0)
        with torch.no_grad():
            expected = subject.model(tokens).logits[:, -1:]
        assert_near(prefill(subject, tokens)(), expected, 1e-5)


def test_saved_models(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "teacher", tie_word_embeddings=True)
    teacher = load_pair(str(folder), dtype=None, device=CPU)
    assert teacher.name == "teacher"
    assert type(teacher.teacher).__name__ == "LlamaForCausalLM"
    loaded = load_teacher(folder)
    student, _ = convert(loaded.model, softmax_layers=(1,))
    save_student(student, loaded.tokenizer, tmp_path / "student")
    pair = load_pair(str(tmp_path / "student"), dtype=None, device=CPU)
    assert pair.teacher is pair.student
    records = generation.measure(pair, lengths=[24], seconds=0.005)
    assert {record.reason for record in records} == {None}
    assert pair.student.present_layer_types() == ["linear_attention", "full_attention"]


def test_a_stage_is_gone_before_memory_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[TrainingStep]] = []

    def make(*arguments: Any) -> TrainingStep:
        step = TrainingStep(*arguments)
        made.append(weakref.ref(step))
        return step

    def free() -> None:
        gc.collect()
        alive.append(sum(step() is not None for step in made))

    alive: list[int] = []
    monkeypatch.setattr(training, "TrainingStep", make)
    monkeypatch.setattr(training, "free_memory", free)
    training.measure(random_pair("tiny", dtype=torch.float32, device=CPU), tokens=8, batch=1, seconds=0.001)
    assert alive == [0, 0]
    assert len(made) == 2


def test_training_stages() -> None:
    pair = random_pair("tiny", dtype=torch.float32, device=CPU)
    before = pair.student.model.layers[0].self_attn.q_conv.weight.clone()
    seen: list[tuple[int, int]] = []
    records = training.measure(
        pair,
        tokens=32,
        batch=2,
        seconds=0.01,
        progress=lambda title, done, total: seen.append((done, total)),
    )
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert [record.measurement for record in records] == ["training stage 1", "training stage 2"]
    for record in records:
        assert record.reason is None
        assert 0 < record.error < 1e-4
        assert record.tokens_per_s == pytest.approx(64 / record.median_s)
    assert any(".lora_A" in name for name, _ in pair.student.named_parameters())
    after = pair.student.model.layers[0].self_attn.q_conv.weight
    assert_near(after, before, 1e-5)


def test_wrong_gradients_get_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    right = training._gradients

    def wrong(stage: Any, batch: Any, device: torch.device, backend: str) -> torch.Tensor:
        found = right(stage, batch, device, backend)
        return found if backend == "reference" else 1.01 * found

    monkeypatch.setattr(training, "_gradients", wrong)
    pair = random_pair("tiny", dtype=torch.float32, device=CPU)
    for record in training.measure(pair, tokens=16, batch=1, seconds=0.01):
        assert record.median_s is None
        assert record.reason.startswith("wrong: relative error of the gradients 0.01")
        assert record.error == pytest.approx(0.01, rel=0.05)


def test_stage_2_without_peft_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    pair = random_pair("tiny", dtype=torch.float32, device=CPU)
    records = training.measure(pair, tokens=16, batch=1, seconds=0.01)
    assert records[0].median_s is not None
    assert "needs the package 'peft'" in records[1].reason
