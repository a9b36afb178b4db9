"""Bytes that generation holds after a context: `python benchmarks/state_memory.py MODEL 1024 102400`."""

from __future__ import annotations

import sys

import torch

from lawcat.convert.load import load_model


@torch.inference_mode()
def main() -> None:
    """Print a line a length."""
    model = load_model(sys.argv[1], dtype=torch.bfloat16).model
    for length in map(int, sys.argv[2:]):
        tokens = torch.randint(3, 40000, (1, length), generator=torch.Generator().manual_seed(0))
        cache = None
        for piece in tokens.split(4096, dim=1):
            output = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
        for _ in range(8):  # generation goes on from there
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
        print(f"{length} tokens of context and 8 generated: {cache.state_bytes():,} bytes", flush=True)


main()
