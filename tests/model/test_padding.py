"""A padded step adds nothing to the state, does not decay it, and puts zeros into the convolutions."""

from __future__ import annotations

import pytest
import torch
from model_variants import VARIANTS, WINDOW_VARIANTS, left_pad, model_of, random_tokens
from torch import Tensor

from comparison import assert_near
from lawcat import LawcatForCausalLM
from lawcat.model.cache import LinearAttentionState

# Of linear layers without a window, in which padding between tokens takes up places.
LINEAR_VARIANTS = [
    name
    for name, fields in VARIANTS.items()
    if "full_attention" not in str(fields) and name not in WINDOW_VARIANTS
]
HYBRID_VARIANTS = [name for name in VARIANTS if "hybrid" in name]


def states(cache: object) -> list[Tensor]:
    return [layer.recurrent for layer in cache.layers if isinstance(layer, LinearAttentionState)]


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_left_padding_changes_nothing(name: str) -> None:
    """Whatever stands in the padding, with biases in the projections too."""
    model = model_of(VARIANTS[name])
    tokens = random_tokens(3, 20)
    expected = model(tokens, use_cache=True)
    padded, mask, positions = left_pad(tokens, [0, 3, 9])
    padded[mask == 0] = 7
    actual = model(padded, attention_mask=mask, position_ids=positions, use_cache=True)
    for row, amount in enumerate([0, 3, 9]):
        assert_near(actual.logits[row, amount : amount + 20], expected.logits[row], 1e-12)
    if name in LINEAR_VARIANTS:
        # The rows end with padding of unequal length; the state is that of their tokens.
        for padded_state, state in zip(
            states(actual.past_key_values), states(expected.past_key_values), strict=True
        ):
            assert_near(padded_state, state, 1e-13, "state")


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_right_padding_changes_nothing(name: str) -> None:
    model = model_of(VARIANTS[name])
    tokens = random_tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 12:] = 0
    actual = model(tokens, attention_mask=mask, use_cache=True)
    expected = model(tokens[:1, :12], use_cache=True)
    assert_near(actual.logits[0, :12], expected.logits[0], 1e-12)
    assert_near(actual.logits[1], model(tokens).logits[1], 1e-12)
    if name not in WINDOW_VARIANTS:
        for padded_state, state in zip(
            states(actual.past_key_values), states(expected.past_key_values), strict=True
        ):
            assert_near(padded_state[0], state[0], 1e-13, "state")


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("name", LINEAR_VARIANTS)
def test_padding_leaves_a_state_as_it_is(name: str, tokens: int) -> None:
    """Neither the numerator nor the normaliser changes, by one padded step or many."""
    model = model_of(VARIANTS[name])
    cache = model(random_tokens(2, 10), use_cache=True).past_key_values
    before = [state.clone() for state in states(cache)]
    mask = torch.cat([torch.ones(2, 10), torch.zeros(2, tokens)], dim=1)
    model(random_tokens(2, tokens), attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 10 + tokens
    for after, state in zip(states(cache), before, strict=True):
        assert torch.equal(after, state)
    for layer in cache.layers:
        if layer.q_inputs is not None and tokens >= 4:
            assert not layer.q_inputs.any()
            assert not layer.k_inputs.any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["biases", "hybrid, softmax first"])
def test_biases_do_not_leak_from_padding(name: str) -> None:
    model = model_of(VARIANTS[name])
    bias = model.attention_modules()[0].k_proj.bias
    kept = bias.clone()
    bias.fill_(100.0)
    tokens = random_tokens(1, 8)
    padded, mask, positions = left_pad(tokens, [5])
    actual = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    expected = model(tokens).logits
    bias.copy_(kept)
    assert_near(actual, expected, 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "hybrid"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.int32, torch.float32], ids=str)
def test_masks_of_any_dtype(name: str, dtype: torch.dtype) -> None:
    model = model_of(VARIANTS[name])
    padded, mask, positions = left_pad(random_tokens(2, 9), [0, 4])
    expected = model(padded, attention_mask=mask, position_ids=positions).logits
    actual = model(padded, attention_mask=mask.to(dtype), position_ids=positions).logits
    assert torch.equal(actual[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_a_row_of_nothing_but_padding_is_finite() -> None:
    model = model_of(VARIANTS["paper"])
    tokens = random_tokens(2, 9)
    mask = torch.ones(2, 9)
    mask[0] = 0
    logits = model(tokens, attention_mask=mask).logits
    assert logits.isfinite().all()
    assert_near(logits[1], model(tokens).logits[1], 1e-12)


@pytest.mark.parametrize("name", ["paper", "biases", "hybrid"])
def test_gradients_do_not_see_the_padding(name: str) -> None:
    model = model_of(VARIANTS[name])
    tokens = random_tokens(1, 20)
    padded, mask, positions = left_pad(tokens, [7])
    parameters = dict(model.named_parameters())
    plain = model(tokens).logits.square().mean()
    masked = model(padded, attention_mask=mask, position_ids=positions).logits[:, 7:].square().mean()
    expected = torch.autograd.grad(plain, list(parameters.values()), allow_unused=True)
    actual = torch.autograd.grad(masked, list(parameters.values()), allow_unused=True)
    for parameter, gradient, wanted in zip(parameters, actual, expected, strict=True):
        if wanted is not None:
            assert_near(gradient, wanted, 1e-10, parameter)


@torch.no_grad()
@pytest.mark.parametrize("name", HYBRID_VARIANTS)
def test_a_mask_for_each_type_of_layer(name: str) -> None:
    """As ``generate`` prepares them for some caches: a dict by layer type."""
    from transformers.masking_utils import create_masks_for_generate

    model = model_of(VARIANTS[name])
    padded, mask, positions = left_pad(random_tokens(2, 9), [0, 4])
    masks = create_masks_for_generate(
        config=model.config,
        inputs_embeds=model.get_input_embeddings()(padded),
        attention_mask=mask,
        past_key_values=None,
        position_ids=positions,
    )
    assert set(masks) == {"linear_attention", "full_attention"}
    expected = model(padded, attention_mask=mask, position_ids=positions).logits
    actual = model(padded, attention_mask=masks, position_ids=positions).logits
    assert torch.equal(actual, expected)


@torch.no_grad()
def test_a_dict_of_masks_without_a_type_that_is_there() -> None:
    model = model_of(VARIANTS["hybrid"])
    mask = torch.ones(1, 4)
    with pytest.raises(ValueError, match="no entry for 'full_attention'"):
        model(random_tokens(1, 4), attention_mask={"linear_attention": mask})
    with pytest.raises(ValueError, match="no entry for 'linear_attention'"):
        model(random_tokens(1, 4), attention_mask={"full_attention": None})
    tokens = random_tokens(1, 4)
    linear = model_of(VARIANTS["paper"])
    expected = linear(tokens).logits
    assert torch.equal(linear(tokens, attention_mask={"linear_attention": None}).logits, expected)


@pytest.mark.parametrize("name", ["paper", "hybrid"])
def test_a_four_dimensional_mask_is_refused(name: str) -> None:
    model = model_of(VARIANTS[name])
    with pytest.raises(ValueError, match=r"attention_mask has 4 dimensions; .* takes a padding mask"):
        model(random_tokens(1, 4), attention_mask=torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("name", ["paper", "hybrid"])
def test_a_mask_that_is_too_narrow_is_refused(name: str) -> None:
    model = model_of(VARIANTS[name])
    with pytest.raises(ValueError, match="covers 3 tokens; it must cover all 4"):
        model(random_tokens(1, 4), attention_mask=torch.ones(1, 3))


@torch.no_grad()
def test_a_mask_of_the_new_tokens_alone() -> None:
    """Enough for linear layers, whose state knows; softmax layers need the cached tokens' too."""
    tokens = random_tokens(2, 10)
    mask = torch.ones(2, 4)
    for name in ("paper", "hybrid"):
        model: LawcatForCausalLM = model_of(VARIANTS[name])
        cache = model(tokens[:, :6], use_cache=True).past_key_values
        if name == "hybrid":
            with pytest.raises(ValueError, match="covers 4 tokens; it must cover all 10"):
                model(tokens[:, 6:], attention_mask=mask, past_key_values=cache)
        else:
            logits = model(tokens[:, 6:], attention_mask=mask, past_key_values=cache).logits
            assert_near(logits, model(tokens).logits[:, 6:], 1e-12)
