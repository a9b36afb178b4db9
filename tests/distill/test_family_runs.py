"""Whole runs of Qwen teachers, with biases or norms of q and k: interrupted, resumed, loaded, asked."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TinyRun, assert_same_student, on_one_processor, tensors_of
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lawcat import load_model
from lawcat.convert.initialize import is_new_parameter
from lawcat.convert.teacher import load_teacher
from lawcat.inference.generation import stream_text
from tiny_teachers import random_ids, spelling_tokenizer, tiny_teacher

# transformers makes Qwen's tokenizer of whatever comes with a Qwen2: of single bytes, not of words.
QWEN2: dict[str, Any] = {"family": "qwen2", "spells": True}
_Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
# Three stages of two steps.
STEPS = {"teacher_tuning__steps": 2, "attention_transfer__steps": 2, "recovery__steps": 2}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2": (QWEN2, STEPS),
    "qwen3": ({"family": "qwen3", "attention_bias": True}, {**STEPS, "model__softmax_layers": (1,)}),
    "qwen2, all weights": (QWEN2, {"recovery__train": "all"}),
    "qwen3, all weights, bfloat16": (
        {"family": "qwen3"},
        {"recovery__train": "all", "precision": "bfloat16"},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, overrides = RUNS[name]
    on_one_processor(monkeypatch, tmp_path / "cache")
    run = TinyRun(tmp_path, **fields)
    run("whole", **overrides)
    for stage in range(0 if "teacher_tuning__steps" in overrides else 1, 3):

        def interrupt(title: str, done: int, total: int, shown: Any = None, stage: int = stage) -> None:
            if title.startswith(f"stage {stage}:") and done == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(KeyboardInterrupt):
            run("resumed", progress=interrupt, **overrides)
    run("resumed", **overrides)
    whole = tmp_path / "whole"
    assert_same_student(whole, tmp_path / "resumed")

    ids, loaded = random_ids(), load_model(whole)
    trains_all = overrides.get("recovery__train") == "all"
    assert (whole / "adapter").is_dir() != trains_all
    if not trains_all:
        assert torch.equal(load_model(whole / "adapter").model(ids).logits, loaded.model(ids).logits)
    # LoRA leaves biases and norms as they are; else they train with the rest.
    before, after = load_teacher(run.teacher).model.state_dict(), loaded.model.state_dict()
    small = [n for n in before if n.endswith("_proj.bias") or n.endswith(("q_norm.weight", "k_norm.weight"))]
    assert len(small) == 2 * (3 if fields["family"] == "qwen2" else 6 if "attention_bias" in fields else 2)
    for tensor in small:
        assert torch.equal(before[tensor], after[tensor]) == (not trains_all), tensor
    assert not torch.equal(before[_Q_PROJ], after[_Q_PROJ])
    new = {n: t for n, t in tensors_of(whole).items() if n.startswith("student ") and is_new_parameter(n)}
    assert all(t.isfinite().all() and t.dtype == torch.float32 for t in new.values())


class SaysOneToken(LogitsProcessor):  # type: ignore[misc]
    """Makes a model say one token, and takes note of what was before."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.read: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.read.append(input_ids)
        return scores.fill_(-1e9).index_fill(1, torch.tensor([self.token]), 0.0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_student_ends_and_chats_as_its_teacher(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two end tokens, padding by one of them, no token that begins a text, a template of turns."""
    on_one_processor(monkeypatch, tmp_path / "cache")
    run = TinyRun(tmp_path, family=family, spells=True)
    tokenizer = spelling_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]}
    )
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = None, "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = (
        "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n"
        "{{ turn['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(run.teacher)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    special = {"eos_token_id": ends[0], "bos_token_id": ends[1], "pad_token_id": None}
    teacher = tiny_teacher(family, vocab_size=len(tokenizer), tie_word_embeddings=True, **special)
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    teacher.generation_config = GenerationConfig(**sampling, eos_token_id=ends, pad_token_id=ends[1])
    teacher.save_pretrained(run.teacher)
    run("student", attention_transfer__steps=1, recovery__steps=0)
    for place in ("student", "student/adapter", "teacher"):
        loaded = load_model(tmp_path / place)
        assert loaded.model.generation_config.eos_token_id == ends, place
        assert loaded.model.config.eos_token_id == ends[0]
        found = loaded.tokenizer
        assert (found.bos_token, found.eos_token_id, found.pad_token_id) == (None, *ends)
        assert found("").input_ids == []
        prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        says = SaysOneToken(ends[1])
        generate = partial(loaded.model.generate, logits_processor=LogitsProcessorList([says]))
        with monkeypatch.context() as patch:
            patch.setattr(loaded.model, "generate", generate)
            said = "".join(stream_text(loaded.model, found, "hi", max_new_tokens=5, chat=True))
        assert said == ""
        assert len(says.read) == 1, "the second end token did not end it"
        assert found.decode(says.read[0][0]) == prompt
