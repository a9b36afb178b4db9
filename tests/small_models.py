"""Small models of any variant."""

from __future__ import annotations

import copy

import torch

from lawcat import LawcatConfig, LawcatForCausalLM


def make_config(**fields: object) -> LawcatConfig:
    """A small configuration; what is not given keeps sizes small and ends no generation early."""
    defaults: dict[str, object] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return LawcatConfig(**(defaults | fields))


def make_model(
    *, noise: float = 0.3, dtype: torch.dtype = torch.float32, **fields: object
) -> LawcatForCausalLM:
    """A small model in eval mode, every parameter moved from where it starts."""
    torch.manual_seed(0)
    model = LawcatForCausalLM(make_config(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return model.to(dtype)


def in_bfloat16(model: LawcatForCausalLM) -> LawcatForCausalLM:
    """A copy as it is loaded: the new parameters stay float32."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    for module in model.attention_modules():
        for name in module.new_modules():
            getattr(module, name).float()
    return model
