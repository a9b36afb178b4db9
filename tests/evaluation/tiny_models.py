"""Models with random weights, small enough for a test and of several kinds of memory."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from lawcat import LawcatConfig, LawcatForCausalLM

SIZES = {
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    # Large, so that the best next token is not a matter of rounding.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny_llama(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


def tiny_lawcat(**changes):
    torch.manual_seed(0)
    return LawcatForCausalLM(LawcatConfig(**{**SIZES, **changes})).eval()


def tiny_mistral():
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=24)).eval()


def tiny_mamba():
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=500,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        initializer_range=0.3,
        eos_token_id=None,
    )
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.out_proj.weight.mul_(10)
    return model
