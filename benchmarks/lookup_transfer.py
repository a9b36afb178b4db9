"""Does linear attention learn a look-up by its key, and from what: attention transfer, or next tokens?

    python benchmarks/lookup_transfer.py smollm2-135m-instruct                    # stage 1, answers weighed
    python benchmarks/lookup_transfer.py smollm2-135m-instruct --answer-weight 0  # stage 1 as it was
    python benchmarks/lookup_transfer.py smollm2-135m-instruct --set feature_dim=128
    python benchmarks/lookup_transfer.py smollm2-135m-longcontext --next-tokens   # a student, by next tokens

Six facts, "The code of Mary is apple.", come twice, the second time in another order. The first of the second
round is a look-up and nothing else (chance 17%); of all six, what is left over answers some (41% without any
look-up). A teacher is first tuned on them with LoRA, 20 steps, and then linearized in the layers it looks up
with (``lookup_layers.py``), which are fitted to it.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import babi_student
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from lawcat.convert.initialize import cast_teacher_weights, convert, is_new_parameter
from lawcat.convert.load import load_model
from lawcat.distill.attention_transfer import attention_transfer_losses

FACTS, SEQUENCES = 6, 12
NAMES = """
Mary John Sandra Daniel Peter Paul Anna James Robert Michael William David Richard Thomas Charles
Joseph Matthew Anthony Mark Steven Andrew George Kenneth Edward Brian Kevin Jason Jeffrey Ryan Eric
Jonathan Stephen Larry Justin Scott Brandon Benjamin Samuel Frank Gregory Patrick Jack Dennis Henry
Adam Nathan Alice Emma Laura Julia Helen Grace Rose Sarah Jane Emily Susan Karen Lisa Nancy
"""
WORDS = """
time year people way day man thing woman life child world school state family student group country
hand part place case week company system program question work number night point home water room
mother area money story fact month lot right study book eye job word business issue side kind head
house service friend father power hour game line end member law car city name team minute idea kid
body back parent face office level door health person art war history party result change morning
reason research girl guy moment air teacher force apple river stone bread horse paper glass music
winter summer garden window market forest island bridge castle engine silver copper cotton butter
coffee dinner doctor driver farmer
"""


@dataclass(frozen=True)
class Facts:
    """Sequences of facts and the words to find.

    Attributes:
        ids: [B, T].
        positions: Of the tokens before the words of the second round [FACTS], the same in all sequences.
        words: [B, FACTS].
    """

    ids: Tensor
    positions: list[int]
    words: Tensor

    def answers(self, model: Any) -> Tensor:
        """Return the logits at the words of the second round [B, FACTS, V]."""
        hidden = model.model(self.ids, use_cache=False).last_hidden_state[:, self.positions]
        return F.linear(hidden, model.lm_head.weight).float()

    def loss(self, model: Any) -> Tensor:
        """Return the cross-entropy of these words."""
        return F.cross_entropy(self.answers(model).flatten(0, 1), self.words.flatten())

    def weight(self) -> Tensor:
        """Return 1 at these words and 0 elsewhere [B, T]."""
        weight = torch.zeros(self.ids.shape)
        weight[:, [position + 1 for position in self.positions]] = 1.0
        return weight


def draw(tokenizer: Any, rng: random.Random, count: int) -> Facts:
    """Return random facts."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    names, words = ([w for w in ws.split() if len(tokens(f" {w}")) == 1] for ws in (NAMES, WORDS))
    ids, found = [], []
    positions: list[int] = []
    for _ in range(count):
        keys, values = rng.sample(names, FACTS), rng.sample(words, FACTS)
        again = rng.sample(range(FACTS), FACTS)
        row, positions = [], []
        for turn, fact in enumerate([*range(FACTS), *again]):
            row += tokens(f"{chr(10) if turn else ''}The code of {keys[fact]} is")
            if turn >= FACTS:
                positions.append(len(row) - 1)
            row += tokens(f" {values[fact]}.")
        ids.append(row)
        found.append([tokens(f" {values[fact]}")[0] for fact in again])
    return Facts(torch.tensor(ids), positions, torch.tensor(found))


def train(
    parameters: list[dict[str, Any]],
    steps: int,
    gradients: Callable[[], object],
    report: Callable[[int], object],
) -> None:
    """Take AdamW's steps at rates that grow over the first tenth, reporting every 20."""
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps + 1):
        if step % 20 == 0:
            report(step)
        if step == steps:
            return
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, 10 * (step + 1) / steps)
        gradients()
        torch.nn.utils.clip_grad_norm_([p for group in parameters for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Tune, transfer or train, and print the share of right answers as it goes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a teacher; with --next-tokens also a student or adapter")
    parser.add_argument("--next-tokens", action="store_true", help="train LoRA and the operator on the words")
    parser.add_argument("--answer-weight", type=float, default=1.0)
    parser.add_argument("--layers", type=int, nargs=2, default=(10, 24), help="first and last to linearize")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument(
        "--set", action="append", default=[], help="FIELD=VALUE of the operator", dest="fields"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    loaded = load_model(options.model, device="cpu")
    model, tokenizer = loaded.model, loaded.tokenizer
    fields = {name: yaml.safe_load(value) for name, value in (field.split("=") for field in options.fields)}
    if loaded.kind == "teacher":
        first, last = options.layers
        others = () if options.next_tokens else (i for i in range(model.config.num_hidden_layers))
        softmax = tuple(i for i in others if not first <= i <= last)
        model, _ = convert(model, softmax_layers=softmax, **fields)
    cast_teacher_weights(model, torch.bfloat16)
    model.requires_grad_(False)
    babi_student.add_lora(model, rank=12)
    held_out = [draw(tokenizer, random.Random(f"held out {i}"), 10) for i in range(4)]
    rng, start = random.Random(1), time.perf_counter()

    def report(what: str, step: int) -> None:
        with torch.no_grad():
            right = torch.cat([(one.answers(model).argmax(-1) == one.words).float() for one in held_out])
        print(
            f"{what}, {step} steps, {step * SEQUENCES * FACTS} answers, {time.perf_counter() - start:.0f} s: "
            f"{right[:, 0].mean():.2f} of the first asked, {right.mean():.2f} of all",
            flush=True,
        )

    new = [p for name, p in model.named_parameters() if is_new_parameter(name)]
    factors = [p for name, p in model.named_parameters() if p.requires_grad and not is_new_parameter(name)]

    def next_tokens() -> None:
        torch.autograd.backward(draw(tokenizer, rng, SEQUENCES).loss(model))

    if options.next_tokens:
        groups = [{"params": factors, "lr": 1e-3}, {"params": new, "lr": 2e-3}]
        train(groups, options.steps, next_tokens, lambda step: report("next tokens", step))
        return
    with model.teacher_mode():
        train([{"params": factors, "lr": 1e-3}], 20, next_tokens, lambda step: report("teacher", step))
    for factor in factors:
        factor.requires_grad_(False)

    def transfer() -> None:
        facts = draw(tokenizer, rng, SEQUENCES)
        weights = {"answer_weight": options.answer_weight, "loss_weight": facts.weight()}
        attention_transfer_losses(model, facts.ids, gradient_scale=1.0, **weights)

    train([{"params": new, "lr": 1e-2}], options.steps, transfer, lambda step: report("transfer", step))


if __name__ == "__main__":
    main()
