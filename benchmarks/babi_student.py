"""Does a distilled student learn bAbI's QA1, "Where is Mary?", if trained on, and after how many answers?

As stage 2 of a recipe, but on stories alone, without noise and BABILong's instructions, and with a loss on
the answers' places alone: what a recipe could teach in so many answers at best. A step takes some 3 s of a
core. Prints the accuracy on held-out questions, and on those whose answer is not the last place named: a
model that ignores the person never gets these.

    python benchmarks/babi_student.py smollm2-135m-longcontext --persons 3 --taps 8 --tap-std 0.1
    python benchmarks/babi_student.py smollm2-135m-instruct --softmax --persons 3
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from lawcat.convert.initialize import cast_teacher_weights, convert, is_new_parameter
from lawcat.convert.load import load_model
from lawcat.distill.lora import use_half_precision
from lawcat.distill.recipe import RecoverySettings
from lawcat.distill.recovery import RecoveryModel
from lawcat.model import attention
from lawcat.model.convolution import CausalConvolution
from lawcat.ops.fused import linear_attention_mixer
from lawcat.tasks import babilong_training_label, babilong_training_pairs, held_out
from lawcat.tasks.babi import PLACES
from lawcat.tasks.babi_simulator import simulate_story
from lawcat.tasks.babi_solver import solve_all
from lawcat.tasks.babilong import babilong_prompt

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROUND = 128
"""Batches are a multiple of so many tokens long."""
GROUP = 256
"""Of so many stories those of similar length come together."""

Pairs = list[tuple[str, str]]


def held_out_pairs(rng: random.Random, persons: int) -> Pairs:
    """Return the questions of one story that no training draws, and their answers; there may be none."""
    story = simulate_story("qa1", rng)
    facts = story.facts[: rng.choice(story.questions).num_facts]
    solutions = solve_all("qa1", facts)
    pairs: Pairs = []
    for question, solution in solutions.items():
        if len(solutions) >= persons and held_out("\n".join([*facts, question])):
            person = re.findall(r"\w+", question)[-1]
            prompt = (
                f"\n\nQuestion: {question}" if pairs else babilong_prompt("qa1", " ".join(facts), question)
            )
            pairs.append((prompt, f"\nAnswer: The most recent location of {person} is {solution.answer}."))
    return pairs


@dataclass(frozen=True)
class Batch:
    """Stories padded on the right to one length.

    Attributes:
        ids: [B, T].
        rows: In which row an answer is [answers].
        positions: The token before its place [answers].
        targets: The place [answers].
        others: Whether it is not the one that the facts name last [answers].
    """

    ids: Tensor
    rows: Tensor
    positions: Tensor
    targets: Tensor
    others: Tensor

    def logits(self, model: Any) -> Tensor:
        """Return what a model says at the answers' places [answers, V], float32."""
        hidden = model.model(self.ids, use_cache=False).last_hidden_state
        return F.linear(hidden[self.rows, self.positions], model.lm_head.weight).float()


Encoded = tuple[list[int], list[tuple[int, int, bool]]]


def encode(tokenizer: Any, pairs: Pairs, *, whole_prompt: bool) -> Encoded:
    """Return a story's tokens, and of each answer the position before its place, the place, and whether it
    is another than the last named."""
    text = ""
    ends: list[tuple[int, bool]] = []
    last = re.findall("|".join(PLACES), pairs[0][0].rpartition("<context>")[2])[-1]
    for prompt, answer in pairs:
        first, end = babilong_training_label(answer)
        text += prompt if whole_prompt or text else prompt[prompt.index("<context>") :]
        ends.append((len(text) + first - 1, answer[first:end] != last))  # the space is the place's token's
        text += answer
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = {span[0]: place for place, span in enumerate(tokens.offset_mapping)}
    ids: list[int] = tokens.input_ids
    return ids, [(starts[start] - 1, ids[starts[start]], other) for start, other in ends]


def make_batches(
    encoded: list[Encoded], tokens: int, longest: int, padding: int, device: str = "cpu"
) -> list[Batch]:
    """Return stories of similar length together, none longer than a bound, in few different shapes."""
    shapes: dict[int, list[Encoded]] = {}
    for one in (one for one in encoded if len(one[0]) <= longest):
        shapes.setdefault(-(-len(one[0]) // ROUND) * ROUND, []).append(one)
    batches = []
    for length, stories in shapes.items():
        count = max(1, tokens // length)
        for begin in range(0, len(stories), count):
            part = stories[begin : begin + count]
            ids = torch.full((count, length), padding)
            for row, (numbers, _) in enumerate(part):
                ids[row, : len(numbers)] = torch.tensor(numbers)
            found = [(row, *answer) for row, (_, answers) in enumerate(part) for answer in answers]
            rows, positions, targets, others = torch.tensor(found).unbind(1)
            columns = (ids, rows, positions, targets, others.bool())
            batches.append(Batch(*(column.to(device) for column in columns)))
    return batches


def accuracy(model: Any, batches: list[Batch]) -> tuple[float, float]:
    """Return the share of right answers: of all, and of those that are not the place named last."""
    # Not without gradients: that would be compiled anew.
    right = torch.cat([batch.logits(model).argmax(-1) == batch.targets for batch in batches]).float()
    return right.mean().item(), right[torch.cat([batch.others for batch in batches])].mean().item()


def lengthen_filters(model: nn.Module, taps: int, std: float) -> None:
    """Put older taps, normal with a standard deviation, before those of all convolutions."""
    for module in model.modules():
        if isinstance(module, CausalConvolution) and module.kernel_size < taps:
            older = std * torch.randn(module.weight.shape[0], taps - module.kernel_size)
            module.weight = nn.Parameter(torch.cat([older, module.weight.detach()], 1))
            module.kernel_size = taps


def load(name: str, *, softmax: bool, device: str = "cpu") -> tuple[Any, Any]:
    """Return a model of lawcat's, its own weights in bfloat16, and its tokenizer."""
    loaded = load_model(name, device=device)
    model = loaded.model
    if loaded.kind == "teacher":
        layers = range(model.config.num_hidden_layers) if softmax else ()
        model, _ = convert(model, softmax_layers=tuple(layers))
        if softmax:  # its gradient is the faster one
            model.set_attn_implementation("eager")
    cast_teacher_weights(model, torch.bfloat16)
    return model.to(device).requires_grad_(False), loaded.tokenizer


def add_lora(model: Any, rank: int) -> None:
    """Let LoRA's factors and the operator's own parameters train, and nothing else."""
    settings = RecoverySettings(lora_rank=rank, lora_alpha=2 * rank, lora_targets=TARGETS, kl_weight=0)
    RecoveryModel(model, settings)
    use_half_precision(model)


def training_batches(
    tokenizer: Any, seed: int, tokens: int, longest: int, persons: int, *, whole_prompt: bool, device: str
) -> Iterator[Batch]:
    """Yield batches of a provider's stories without end."""
    rng = random.Random(seed)
    for first in itertools.count(0, GROUP):
        encoded = []
        for index in range(first, first + GROUP):
            pairs = babilong_training_pairs(
                tokenizer, 1000, index, seed, qa="qa1", questions=12, noise_shares=(0, 0, 1)
            )
            if len(pairs) >= persons:
                encoded.append(encode(tokenizer, pairs, whole_prompt=whole_prompt))
        batches = make_batches(encoded, tokens, longest, tokenizer.eos_token_id, device)
        rng.shuffle(batches)
        yield from batches


def main() -> None:
    """Train, and print a line every so many steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="an adapter, a student, or a teacher, which is converted untrained")
    parser.add_argument("--softmax", action="store_true", help="a teacher keeps its attention")
    parser.add_argument("--taps", type=int, default=4)
    parser.add_argument("--tap-std", type=float, default=0.0, help="of taps that the model did not have")
    parser.add_argument("--rank", type=int, default=12)
    parser.add_argument("--rate", type=float, default=1e-3, help="of LoRA's factors")
    parser.add_argument("--new-rate", type=float, default=2e-3, help="of the operator's own parameters")
    parser.add_argument("--batch", type=int, default=1024, help="tokens a step, with padding")
    parser.add_argument("--persons", type=int, default=1, help="at least, in a story")
    parser.add_argument("--longest", type=int, default=128, help="longest story, tokens with its questions")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--held-out", type=int, default=160, help="stories")
    parser.add_argument("--compile", action="store_true", help="a minute at first, then faster")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--whole-prompt", action="store_true", help="with BABILong's instructions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", help="file for the trained parameters")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    if options.compile:
        torch._dynamo.config.recompile_limit = 64
        compiled = torch.compile(linear_attention_mixer, dynamic=False)
        attention.linear_attention_mixer = compiled  # type: ignore[attr-defined]
        for kind in (LlamaMLP, LlamaRMSNorm):
            kind.forward = torch.compile(kind.forward, dynamic=False)
    model, tokenizer = load(options.model, softmax=options.softmax, device=options.device)
    lengthen_filters(model, options.taps, options.tap_std)
    add_lora(model, options.rank)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    groups = [
        {"params": [one for name, one in trained.items() if is_new_parameter(name) == new], "peak": rate}
        for new, rate in ((False, options.rate), (True, options.new_rate))
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), weight_decay=0.0)

    rng = random.Random("held out")
    found = (held_out_pairs(rng, options.persons) for _ in itertools.count())
    stories = list(itertools.islice(filter(None, found), options.held_out))
    sizes = options.batch, options.longest
    whole = {"whole_prompt": options.whole_prompt}
    encoded = [encode(tokenizer, pairs, **whole) for pairs in stories]
    held = make_batches(encoded, *sizes, tokenizer.eos_token_id, options.device)
    training = training_batches(
        tokenizer, options.seed, *sizes, options.persons, device=options.device, **whole
    )
    seen, start = 0, time.perf_counter()
    losses: list[float] = []
    for step in range(options.steps + 1):
        is_last = step == options.steps or time.perf_counter() - start > options.seconds
        if step % options.every == 0 or is_last:
            loss_mean = sum(losses) / max(1, len(losses))
            losses = []
            if step == 0:
                print(
                    f"held out: {sum(len(b.targets) for b in held)} answers, "
                    f"{sum(int(b.others.sum()) for b in held)} not last named",
                    flush=True,
                )
            right, other = accuracy(model, held)
            print(
                f"{step} steps, {seen} answers, {time.perf_counter() - start:.0f} s: "
                f"{right:.2f} right, {other:.2f} of those not last named, loss {loss_mean:.3f}",
                flush=True,
            )
        if is_last:
            break
        batch = next(training)
        loss = F.cross_entropy(batch.logits(model), batch.targets)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (step + 1) / 20)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        seen += len(batch.targets)
    if options.save:
        torch.save({name: one.detach() for name, one in trained.items()}, options.save)


if __name__ == "__main__":
    main()
