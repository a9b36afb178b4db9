"""What has to be float32 is float32, whatever the model, autocast or the checkpoint are in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_variants import VARIANTS, model_of, random_tokens
from transformers import AutoModelForCausalLM

from comparison import assert_near
from lawcat import LawcatForCausalLM
from lawcat.model.modeling_lawcat import NEW_MODULES
from small_models import make_config, make_model

SHORT = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def dtypes(model: LawcatForCausalLM) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """The dtypes of what lawcat adds to a teacher, and of the rest."""
    new, other = set(), set()
    for name, parameter in model.named_parameters():
        is_new = any(f".{module}." in name for module in NEW_MODULES)
        (new if is_new else other).add(parameter.dtype)
    return new, other


@SHORT
@pytest.mark.parametrize("name", ["paper", "gate a head", "hybrid", "lolcats", "norms of q and k"])
def test_new_parameters_are_float32_in_a_short_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(**VARIANTS[name])
    model.save_pretrained(tmp_path)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype),
        LawcatForCausalLM.from_pretrained(tmp_path, dtype=dtype),
        AutoModelForCausalLM.from_config(model.config, dtype=dtype),
    ):
        assert dtypes(loaded) == ({torch.float32}, {dtype})
    exact = dict(model.named_parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, exact[name].to(parameter.dtype)), name


@SHORT
def test_a_short_model_saves_and_loads_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "float32")
    model = LawcatForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype)
    model.save_pretrained(tmp_path / "short")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "short")
    assert dtypes(again) == ({torch.float32}, {dtype})
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@SHORT
def test_parameters_missing_from_a_checkpoint_are_float32_too(dtype: torch.dtype, tmp_path: Path) -> None:
    make_model(layer_types=["full_attention"] * 2).save_pretrained(tmp_path)
    config = make_config()
    loaded = LawcatForCausalLM.from_pretrained(tmp_path, config=config, dtype=dtype)
    assert dtypes(loaded) == ({torch.float32}, {dtype})


@torch.no_grad()
@SHORT
@pytest.mark.parametrize("name", ["paper", "state a kv head", "rope", "hybrid", "norms of q and k"])
def test_a_short_model_is_near_the_exact_one(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    exact = make_model(noise=0.05, **VARIANTS[name])
    exact.save_pretrained(tmp_path)
    model = LawcatForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    tokens = random_tokens(2, 40)
    output = model(tokens, use_cache=True)
    assert output.logits.dtype == dtype
    assert_near(output.logits, exact(tokens).logits, 20 * torch.finfo(dtype).eps, "logits")
    state = output.past_key_values.tensors()["layer.0.recurrent"]
    assert state.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "no convolution", "rope"])
def test_the_linear_part_of_a_short_model_is_computed_in_float32(name: str) -> None:
    """From the same rounded projections, bfloat16 tensors give what float32 tensors give."""
    attention = model_of(VARIANTS[name], torch.float32).attention_modules()[0]
    x = torch.randn(1, 40, 32).bfloat16()
    q, k, v = (torch.randn(1, 40, heads, 8).bfloat16() for heads in (4, 2, 2))
    cos = torch.ones(1, 40, 8)
    positions = (cos, torch.zeros_like(cos))
    output = attention.linear_attention(x, q, k, v, positions)
    assert output.dtype == torch.bfloat16
    expected = attention.linear_attention(x.float(), q.float(), k.float(), v.float(), positions)
    assert torch.equal(output, expected.bfloat16())


@torch.no_grad()
@SHORT
@pytest.mark.parametrize("name", ["paper", "gate a head", "rope"])
def test_autocast_keeps_the_linear_part_float32(name: str, dtype: torch.dtype) -> None:
    attention = model_of(VARIANTS[name], torch.float32).attention_modules()[0]
    x, (q, k, v) = torch.randn(1, 40, 32), (torch.randn(1, 40, heads, 8) for heads in (4, 2, 2))
    cos = torch.ones(1, 40, 8)
    positions = (cos, torch.zeros_like(cos))
    expected = attention.linear_attention(x, q, k, v, positions)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(attention.linear_attention(x, q, k, v, positions), expected)


@SHORT
@pytest.mark.parametrize("name", ["paper", "hybrid", "norms of q and k"])
def test_a_training_step_under_autocast(name: str, dtype: torch.dtype) -> None:
    model = make_model(noise=0.05, **VARIANTS[name]).train()
    tokens = random_tokens(2, 20)
    with torch.autocast("cpu", dtype=dtype):
        output = model(tokens, labels=tokens, use_cache=True)
    assert output.past_key_values.tensors()["layer.0.recurrent"].dtype == torch.float32
    output.loss.backward()
    exact = make_model(noise=0.05, **VARIANTS[name]).train()
    exact(tokens, labels=tokens).loss.backward()
    for (parameter_name, parameter), (_, wanted) in zip(
        model.named_parameters(), exact.named_parameters(), strict=True
    ):
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad - wanted.grad).norm() / wanted.grad.norm().clamp(min=1e-6)
        assert error < 40 * torch.finfo(dtype).eps, parameter_name


@torch.no_grad()
def test_a_float64_model_computes_in_float64() -> None:
    """Nothing on the way is float32: two orders of summation agree to 1e-13."""
    model = model_of(VARIANTS["paper"])
    tokens = random_tokens(1, 40)
    output = model(tokens, use_cache=True)
    assert output.logits.dtype == torch.float64
    assert output.past_key_values.layers[0].recurrent.dtype == torch.float64
