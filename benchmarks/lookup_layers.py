"""Which of a teacher's layers does it answer bAbI's QA1 with? Each is limited to a window in turn.

    python benchmarks/babi_student.py smollm2-135m-instruct --softmax --persons 3 --steps 40 --save tuned.pt
    python benchmarks/lookup_layers.py smollm2-135m-instruct tuned.pt

The first tunes the softmax teacher on stories: 40 steps, and all answers are right. A layer whose attention
may not go further back than eight tokens (and to the first) cannot look a fact up; if the answers stay right,
others do.
"""

from __future__ import annotations

import argparse
import functools
import random
from typing import Any

import babi_student
import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

NAME = "limited_layers"
LIMITED: set[int] = set()


def attend(
    window: int, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, *, scaling: float, **unused: object
) -> tuple[Tensor, None]:
    """Attend as eager attention does, in limited layers to a window and the first token only."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    allowed = distance >= 0
    if module.layer_idx in LIMITED:
        allowed &= (distance < window) | (torch.arange(k.shape[2]) == 0)
    scores = (q @ k.mT * scaling).float().masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2), None


@torch.no_grad()
def main() -> None:
    """Print the accuracy with each layer limited, then with runs of five and ten."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher")
    parser.add_argument("tuned", help="what babi_student.py --softmax --save wrote")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--stories", type=int, default=60)
    options = parser.parse_args()

    model, tokenizer = babi_student.load(options.teacher, softmax=True)
    babi_student.add_lora(model, rank=12)
    model.load_state_dict(torch.load(options.tuned), strict=False)
    AttentionInterface.register(NAME, functools.partial(attend, options.window))
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model.set_attn_implementation(NAME)

    rng = random.Random("held out")
    stories = [pairs for _ in range(20000) if (pairs := babi_student.held_out_pairs(rng, 3))]
    encoded = [
        babi_student.encode(tokenizer, pairs, whole_prompt=False) for pairs in stories[: options.stories]
    ]
    batches = babi_student.make_batches(encoded, 1024, 128, tokenizer.eos_token_id)
    layers = model.config.num_hidden_layers
    runs = [range(first, min(first + n, layers)) for n in (1, 5, 10) for first in range(0, layers, n)]
    for run in [range(0), *runs]:
        LIMITED.clear()
        LIMITED.update(run)
        right, other = babi_student.accuracy(model, batches)
        which = f"layers {run.start} to {run.stop - 1}" if run else "no layer"
        print(f"{which} limited: {right:.2f} right, {other:.2f} of those not last named", flush=True)


if __name__ == "__main__":
    main()
