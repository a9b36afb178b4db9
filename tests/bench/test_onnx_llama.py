"""The teacher by ONNX Runtime gives what transformers gives, in prefill and token by token."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config, Qwen3Config

from comparison import assert_near
from lawcat.bench.onnx_llama import OnnxLlama, unavailable_because

CONFIG = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_who_can_run() -> None:
    pytest.importorskip("onnxruntime")
    for changed, reason in (
        ({"attention_bias": True}, "without biases only"),
        ({"hidden_act": "gelu"}, "silu only, not gelu"),
        ({"vocab_size": 128_256, "hidden_size": 4096}, "2 GB"),
    ):
        assert reason in (unavailable_because(LlamaConfig(**{**CONFIG, **changed})) or "")
    for other in (MistralConfig, Qwen2Config, Qwen3Config):
        assert unavailable_because(other(**CONFIG)) == "is written for Llama without biases only"


@pytest.mark.parametrize(("int8", "tolerance"), [(False, 1e-5), (True, 0.05)])
@pytest.mark.parametrize("is_tied", [False, True])
def test_against_transformers(int8: bool, tolerance: float, is_tied: bool) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(**CONFIG, tie_word_embeddings=is_tied)).eval()
    assert unavailable_because(teacher.config) is None
    model = OnnxLlama(teacher, 50, int8=int8, num_threads=1)
    tokens = torch.randint(3, 100, (1, 41))
    with torch.no_grad():
        expected = teacher(tokens).logits
    assert_near(model(tokens)[0, 0], expected[0, -1], tolerance)
    model(tokens[:, :30])
    for position in range(30, 41):
        assert_near(
            model(tokens[:, position : position + 1], position)[0, 0], expected[0, position], tolerance
        )
    with pytest.raises(ValueError, match="51 tokens do not fit into the room for 50"):
        model(tokens[:, :1], 50)
