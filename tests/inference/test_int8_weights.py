"""Weights of eight bits: their error, one token and many, tied embeddings, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from comparison import assert_near
from lawcat import LawcatConfig, LawcatForCausalLM
from lawcat.errors import ConfigurationError
from lawcat.inference.int8_weights import Int8Embedding, Int8Linear, use_int8_weights


def model(**options: object) -> LawcatForCausalLM:
    torch.manual_seed(0)
    config = LawcatConfig(
        vocab_size=60,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    return LawcatForCausalLM(config).eval()


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("width", [33, 40, 48, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    weight, bias, x = torch.randn(70, width), torch.randn(70), torch.randn(2, rows, width)
    weight[5] = 0.0
    weight[6] *= 1e-6
    linear = Int8Linear(weight, bias)
    output = linear(x.to(dtype))
    assert (output.dtype, output.shape) == (dtype, (2, rows, 70))
    assert_near(output.float(), F.linear(x, weight, bias), 0.02)
    # All of the error but that of bfloat16 is the weights': half a step of a row's largest weight by 127.
    steps = weight.abs().amax(dim=1, keepdim=True) / 127
    errors = (linear.wide(torch.float64) - weight).abs()
    assert bool((errors <= 0.5 * 1.01 * steps + 1e-12).all())
    assert linear.weight.dtype == torch.int8


def test_a_token_depends_on_no_other() -> None:
    torch.manual_seed(0)
    linear = Int8Linear(torch.randn(64, 64))
    x = torch.randn(40, 64)
    together = linear(x)
    x[7:] *= 1e4
    assert torch.equal(linear(x)[:7], together[:7])


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(
    "projections",
    [{}, {"attention_bias": True, "attention_output_bias": False}, {"use_qk_norm": True}],
    ids=str,
)
def test_a_model(is_tied: bool, projections: dict[str, bool]) -> None:
    plain, small = (model(tie_word_embeddings=is_tied, **projections) for _ in range(2))
    for one in (plain, small):  # biases start at zero
        for attention in one.model.layers:
            for layer in (attention.self_attn.q_proj, attention.self_attn.k_proj):
                if layer.bias is not None:
                    torch.nn.init.constant_(layer.bias, 0.3)
    use_int8_weights(small)
    assert isinstance(small.get_input_embeddings(), Int8Embedding) == is_tied
    assert small.lm_head.weight.dtype == torch.int8
    assert small.model.layers[1].self_attn.decay_gate.reduce.dtype == torch.float32
    tokens = torch.randint(3, 60, (1, 40))
    with torch.no_grad():
        expected = plain(tokens).logits
        assert_near(small(tokens).logits, expected, 0.03)
        cache = small(tokens[:, :30], use_cache=True).past_key_values
        steps = [small(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)]
    assert_near(torch.cat(steps, dim=1), expected[:, 30:], 0.03)
    assert small.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 43)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot be trained; call model.eval\(\)"):
        use_int8_weights(model().train())
    with pytest.raises(ConfigurationError, match="for the CPU, and the model is on meta"):
        use_int8_weights(model().to("meta"))


def test_nothing_is_saved(tmp_path: Path) -> None:
    small = model()
    use_int8_weights(small)
    with pytest.raises(ConfigurationError, match="cannot be saved"):
        small.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_no_rows() -> None:
    assert Int8Linear(torch.rand(5, 32))(torch.empty(2, 0, 32)).shape == (2, 0, 5)
