"""The teacher's own text, with a tiny random teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lawcat.distill import sampling
from lawcat.distill.sampling import model_fingerprint, sample_teacher_text
from lawcat.errors import TeacherError

VOCAB = 50
ROW = 12


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos_token="<bos>")


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", **special)


def sample(teacher: Any, tokenizer: Any, cache_dir: Path, **options: Any) -> list[int]:
    chosen: dict[str, Any] = {
        "num_tokens": 5 * ROW,
        "seed": 0,
        "sequence_tokens": ROW,
        "batch": 2,
        "precision": "float32",
        "fingerprint": "teacher",
        **options,
    }
    tokens = sample_teacher_text(teacher, tokenizer, cache_dir=cache_dir, **chosen)
    assert tokens.dtype == np.uint16
    return [int(token) for token in tokens]


def forbidden() -> Any:
    raise AssertionError("the teacher was loaded")


def test_rows_begin_with_bos_and_fill_up(tmp_path: Path, teacher: Any, tokenizer: Any) -> None:
    tokens = sample(teacher, tokenizer, tmp_path)
    assert len(tokens) == 5 * ROW
    assert tokens[::ROW] == [1] * 5
    assert max(tokens) < VOCAB
    assert len(sample(teacher, tokenizer, tmp_path, num_tokens=5 * ROW - 3)) == 5 * ROW
    assert sample(teacher, make_tokenizer(), tmp_path)[::ROW] == [2] * 5


def test_the_seed_decides(tmp_path: Path, teacher: Any, tokenizer: Any) -> None:
    first = sample(teacher, tokenizer, tmp_path / "a")
    torch.manual_seed(99)
    assert sample(teacher, tokenizer, tmp_path / "b") == first
    assert sample(teacher, tokenizer, tmp_path / "b", seed=1) != first
    assert first[: 2 * ROW] != first[2 * ROW : 4 * ROW]  # batches do not repeat each other


def test_the_cache_spares_the_teacher(tmp_path: Path, teacher: Any, tokenizer: Any) -> None:
    first = sample(lambda: teacher, tokenizer, tmp_path)
    assert sample(forbidden, tokenizer, tmp_path) == first
    with pytest.raises(AssertionError, match="was loaded"):
        sample(forbidden, tokenizer, tmp_path, temperature=2.0)
    with pytest.raises(AssertionError, match="was loaded"):
        sample(forbidden, tokenizer, tmp_path, fingerprint="another")


def test_more_tokens_take_what_is_there(tmp_path: Path, teacher: Any, tokenizer: Any) -> None:
    first = sample(teacher, tokenizer, tmp_path, num_tokens=4 * ROW)
    calls: list[int] = []
    longer = sample(
        teacher, tokenizer, tmp_path, num_tokens=8 * ROW, progress=lambda w, done, t, m: calls.append(done)
    )
    assert longer[: 4 * ROW] == first
    assert min(calls) > 4 * ROW
    assert calls[-1] == 8 * ROW


def test_an_interrupted_sampling_goes_on(
    tmp_path: Path, teacher: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sample(teacher, tokenizer, tmp_path / "whole")
    real, calls = sampling._sample_batch, 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sampling, "_sample_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample(teacher, tokenizer, tmp_path / "cut")
    assert sample(teacher, tokenizer, tmp_path / "cut") == expected
    assert calls == 4  # three batches, one of them twice


def test_a_batch_too_large_for_memory_is_sampled_in_parts(
    tmp_path: Path, teacher: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = sampling._sample_batch, []

    def short_of_memory(model: Any, start: int, batch: int, *others: Any) -> Any:
        sizes.append(batch)
        if batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, start, batch, *others)

    monkeypatch.setattr(sampling, "_sample_batch", short_of_memory)
    tokens = sample(teacher, tokenizer, tmp_path, batch=5)
    assert sizes == [5, 2, 3, 1, 2]
    rows = [tokens[i : i + ROW] for i in range(0, len(tokens), ROW)]
    assert len(rows) == 5
    assert all(row[0] == 1 for row in rows)
    assert len({tuple(row) for row in rows}) == 5  # each part has a seed of its own
    assert sample(forbidden, tokenizer, tmp_path, batch=5) == tokens


def test_a_sequence_too_large_for_memory(
    tmp_path: Path, teacher: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampling, "_sample_batch", short_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        sample(teacher, tokenizer, tmp_path)


def test_a_damaged_batch_is_sampled_again(tmp_path: Path, teacher: Any, tokenizer: Any) -> None:
    expected = sample(teacher, tokenizer, tmp_path)
    second = sorted(tmp_path.rglob("*.npy"))[1]
    second.write_bytes(second.read_bytes()[:-5])
    assert sample(teacher, tokenizer, tmp_path) == expected


def test_the_fast_cache_gives_what_a_forward_without_cache_gives(
    tmp_path: Path, teacher: Any, tokenizer: Any
) -> None:
    # With a nucleus of nothing but the likeliest token, sampling is greedy decoding.
    tokens = sample(teacher, tokenizer, tmp_path, top_p=1e-9, num_tokens=ROW)
    with torch.no_grad():
        logits = teacher(torch.tensor([tokens])).logits[0]
    assert tokens[1:] == logits[:-1].argmax(-1).tolist()


def test_the_nucleus_holds_top_p() -> None:
    probabilities = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = sampling._sample_nucleus(probabilities.log(), 0.8, generator)
    shares = torch.bincount(drawn, minlength=5) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.2, 0.15, 0.0, 0.0]) / 0.85, atol=0.03, rtol=0)


def test_bfloat16_is_a_copy_and_what_was_chosen_is_kept(
    tmp_path: Path, teacher: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = sampling._bfloat16_copy(teacher)
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    assert copied.lm_head.weight is copied.model.embed_tokens.weight  # type: ignore[union-attr]
    assert {b.dtype for b in copied.buffers()} == {torch.float32}
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}

    chosen = iter([torch.bfloat16, torch.float32])
    monkeypatch.setattr(sampling, "resolve_precision", lambda precision, device: next(chosen))
    sample(teacher, tokenizer, tmp_path, precision="auto", num_tokens=2 * ROW)
    longer = sample(teacher, tokenizer, tmp_path, precision="auto")
    monkeypatch.setattr(sampling, "resolve_precision", lambda precision, device: torch.bfloat16)
    assert sample(teacher, tokenizer, tmp_path / "other", precision="auto") == longer


def test_the_model_is_left_as_it_was(tmp_path: Path, teacher: Any, tokenizer: Any) -> None:
    teacher.train()
    before = model_fingerprint(teacher)
    try:
        sample(teacher, tokenizer, tmp_path)
        assert teacher.training
    finally:
        teacher.eval()
    assert model_fingerprint(teacher) == before


def test_without_a_fingerprint_the_weights_decide(tmp_path: Path, teacher: Any, tokenizer: Any) -> None:
    first = sample(teacher, tokenizer, tmp_path, fingerprint=None)
    assert sample(forbidden, tokenizer, tmp_path, fingerprint=model_fingerprint(teacher)) == first


def test_logits_that_are_not_finite(tmp_path: Path, teacher: Any, tokenizer: Any) -> None:
    broken = sampling._bfloat16_copy(teacher)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(TeacherError, match="not finite"):
        sample(broken, tokenizer, tmp_path)
    assert not list(tmp_path.rglob("*.npy"))
