"""torch.compile takes the whole model as one graph, prompt and decoding."""

from __future__ import annotations

import copy

import pytest
import torch
from model_variants import VARIANTS, model_of, random_tokens

from comparison import assert_near


@torch.no_grad()
def test_one_graph() -> None:
    model = model_of(VARIANTS["hybrid"] | {"sliding_window": 5, "num_sinks": 2}, torch.float32).model
    prompt, token = random_tokens(2, 40), random_tokens(2, 1)

    def read(tokens, cache):
        return model(tokens, past_key_values=cache).last_hidden_state

    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    ours, theirs = model.new_cache(), model.new_cache()
    for tokens in (prompt, token, token):
        assert_near(compiled(tokens, ours), read(tokens, theirs), 1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_a_trace_keeps_the_mask_where_it_saw_ones() -> None:
    model = copy.deepcopy(model_of(VARIANTS["paper"] | {"num_hidden_layers": 1}, torch.float32))
    model.requires_grad_(False)

    def read(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return model(tokens, attention_mask=mask, use_cache=False).logits

    tokens = random_tokens(2, 20)
    padded = torch.ones_like(tokens)
    traced = torch.jit.trace(read, (tokens, padded.clone()), check_trace=False)
    padded[0, :7] = 0
    assert_near(traced(tokens, padded)[0, 7:], read(tokens, padded)[0, 7:], 1e-5)


@pytest.mark.parametrize("name", ["paper", "very strong bound"])
def test_one_graph_with_gradients(name: str) -> None:
    """Also where a decay may be too strong for factors, which eager code finds out by looking."""
    model = model_of(VARIANTS[name] | {"num_hidden_layers": 1}, torch.float32)
    tokens = random_tokens(2, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for form in (compiled, model):
        loss = form(tokens, labels=tokens, use_cache=False).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for actual, expected in zip(*found, strict=True):
        assert_near(actual, expected, 2e-5)
