"""torch.compile takes the whole model as one graph, prompt and decoding."""

from __future__ import annotations

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
