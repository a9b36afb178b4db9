"""torch.compile takes the whole model as one graph, prompt and decoding."""

from __future__ import annotations

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
