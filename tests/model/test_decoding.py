"""However a sequence is cut, padded and handed on, the logits are those of one forward pass over it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_variants import VARIANTS, fields, left_pad, model_of, random_tokens

from comparison import assert_near
from lawcat import LawcatForCausalLM

TOKENS = 40


@torch.no_grad()
def by_pieces(model: LawcatForCausalLM, tokens, mask, positions, cuts: list[int]) -> torch.Tensor:
    """The logits of a sequence that is given in pieces, the cache handed on."""
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < tokens.shape[1]}), tokens.shape[1]]
    cache, logits = None, []
    for start, stop in itertools.pairwise(edges):
        output = model(
            tokens[:, start:stop],
            attention_mask=None if mask is None else mask[:, :stop],
            position_ids=None if positions is None else positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logits.append(output.logits)
        assert cache.get_seq_length() == stop
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_token_by_token(name: str) -> None:
    model = model_of(VARIANTS[name])
    tokens = random_tokens(2, TOKENS)
    expected = model(tokens, use_cache=False).logits
    actual = by_pieces(model, tokens, None, None, list(range(TOKENS)))
    assert_near(actual, expected, 1e-11, "logits")


@settings(max_examples=100)
@given(
    fields=fields,
    cuts=st.lists(st.integers(0, TOKENS + 5), max_size=5),
    padding=st.lists(st.integers(0, 5), min_size=2, max_size=2),
)
def test_any_pieces_of_any_padding_of_any_variant(
    fields: dict[str, object], cuts: list[int], padding: list[int]
) -> None:
    model = model_of(fields)
    torch.manual_seed(0)
    tokens = random_tokens(2, TOKENS)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    padded, mask, positions = left_pad(tokens, padding)
    logits = by_pieces(model, padded, mask, positions, cuts)
    for row, amount in enumerate(padding):
        assert_near(logits[row, amount : amount + TOKENS], expected[row], 1e-11, f"logits of row {row}")


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["paper", "state a kv head", "hybrid", "rope", "lolcats", "window", "three kinds"]
)
def test_in_float32(name: str) -> None:
    model = model_of(VARIANTS[name], torch.float32)
    tokens = random_tokens(2, 70)
    expected = model_of(VARIANTS[name])(tokens).logits
    assert_near(model(tokens).logits, expected, 1e-5, "logits")
    assert_near(by_pieces(model, tokens, None, None, [33, 34, 40]), expected, 1e-5, "logits in pieces")


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["paper", "state a kv head, no convolution", "hybrid, softmax first", "three kinds"]
)
def test_no_token_sees_a_later_one(name: str) -> None:
    model = model_of(VARIANTS[name])
    tokens = random_tokens(1, TOKENS)
    changed = tokens.clone()
    changed[:, 25:] = random_tokens(1, TOKENS - 25)
    assert_near(model(changed).logits[:, :25], model(tokens).logits[:, :25], 1e-14)
    assert (model(changed).logits[:, 25:] - model(tokens).logits[:, 25:]).abs().max() > 1e-3


@torch.no_grad()
def test_rows_of_a_batch_do_not_mix() -> None:
    model = model_of(VARIANTS["paper"])
    tokens = random_tokens(3, TOKENS)
    together = model(tokens).logits
    for row in range(3):
        assert_near(together[row], model(tokens[row : row + 1]).logits[0], 1e-13)


@torch.no_grad()
def test_a_given_cache_is_used_without_use_cache() -> None:
    """As with transformers' models: the cache is read and written, and not returned."""
    model = model_of(VARIANTS["paper"])
    tokens = random_tokens(1, 20)
    cache = model.new_cache()
    model(tokens[:, :12], past_key_values=cache)
    output = model(tokens[:, 12:], past_key_values=cache, use_cache=False)
    assert output.past_key_values is None
    assert cache.get_seq_length() == 20
    assert_near(output.logits, model(tokens).logits[:, 12:], 1e-12)


@torch.no_grad()
def test_inputs_embeds() -> None:
    model = model_of(VARIANTS["hybrid"])
    tokens = random_tokens(2, 20)
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(tokens).logits)


@torch.no_grad()
def test_logits_to_keep() -> None:
    model = model_of(VARIANTS["paper"])
    tokens = random_tokens(2, 20)
    logits = model(tokens).logits
    assert torch.equal(model(tokens, logits_to_keep=3).logits, logits[:, -3:])
    assert torch.equal(model(tokens, logits_to_keep=torch.tensor([1, 5])).logits, logits[:, [1, 5]])


@torch.no_grad()
@pytest.mark.parametrize("name", ["hybrid", "paper"])
def test_hidden_states_and_attentions(name: str) -> None:
    """Attentions are those of the softmax layers; linear ones have none to show."""
    model = model_of(VARIANTS[name])
    model.set_attn_implementation("eager")
    output = model(random_tokens(2, 9), output_hidden_states=True, output_attentions=True)
    assert [tuple(t.shape) for t in output.hidden_states] == [(2, 9, 32)] * 3
    assert [tuple(t.shape) for t in output.attentions] == ([(2, 4, 9, 9)] if name == "hybrid" else [])
    model.set_attn_implementation("sdpa")


@torch.no_grad()
def test_tuples_instead_of_an_output_object() -> None:
    model = model_of(VARIANTS["paper"])
    tokens = random_tokens(2, 9)
    (logits,) = model(tokens, return_dict=False, use_cache=False)
    assert torch.equal(logits, model(tokens).logits)


def test_the_loss_is_of_the_next_token() -> None:
    model = model_of(VARIANTS["paper"])
    tokens = random_tokens(2, 9)
    labels = tokens.clone()
    labels[:, :3] = -100
    output = model(tokens, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, 2:-1].flatten(0, 1), tokens[:, 3:].flatten()
    )
    assert_near(output.loss, expected, 1e-6)


@pytest.mark.parametrize("given", [[], ["input_ids", "inputs_embeds"]])
def test_neither_or_both_inputs(given: list[str]) -> None:
    model = model_of(VARIANTS["paper"])
    inputs = {"input_ids": random_tokens(1, 3), "inputs_embeds": torch.zeros(1, 3, 32)}
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**{name: inputs[name] for name in given})
