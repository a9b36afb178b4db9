"""Tiny random teachers with a tokenizer and text, for the tests of conversion and distillation."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lawcat.convert.initialize import is_new_parameter

NUM_WORDS = 64

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def tiny_teacher(family: str = "llama", *, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Return a random model of two layers in evaluation mode, its weights large, so that mistakes show."""
    sizes: dict[str, Any] = {
        "vocab_size": NUM_WORDS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    if family == "mistral":
        sizes["sliding_window"] = None
    if family == "qwen3":  # whose heads are not hidden_size / num_attention_heads wide
        sizes["head_dim"] = 16
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**(sizes | fields))).eval()
    with torch.no_grad():  # norms start at one and biases at zero, where much goes unnoticed
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, ``w3`` to ``w63``."""
    words = {"<unk>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, NUM_WORDS)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )


def spelling_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes, which holds whatever a task hides."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {"<unk>": 0, "<bos>": 1, "<eos>": 2, **{byte: 3 + i for i, byte in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(pieces, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )


def save_teacher(folder: Path, *, seed: int = 0, spells: bool = False, **fields: Any) -> Path:
    """Write a teacher with its tokenizer, of words or of bytes, into a folder and return it."""
    tokenizer = spelling_tokenizer() if spells else tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer)} | fields
    tiny_teacher(seed=seed, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_text(path: Path, num_words: int = 2000) -> Path:
    """Write words of which each is often followed by the next, so that there is something to learn."""
    rng = random.Random(0)
    word, words = 3, []
    for _ in range(num_words):
        word = word % (NUM_WORDS - 1) + 1 if rng.random() < 0.7 else rng.randrange(3, NUM_WORDS)
        words.append(f"w{max(word, 3)}")
    path.write_text(" ".join(words), encoding="utf-8")
    return path


def random_ids(batch: int = 2, tokens: int = 24, *, seed: int = 0) -> torch.Tensor:
    """Return token ids [B, T]."""
    return torch.randint(0, NUM_WORDS, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def moved_new_parameters(student: PreTrainedModel, scale: float) -> dict[str, Tensor]:
    """Return a student's new parameters by name, each moved at random, as training would."""
    torch.manual_seed(1)
    return {
        name: parameter.detach() + scale * torch.randn_like(parameter)
        for name, parameter in student.named_parameters()
        if is_new_parameter(name)
    }
