"""Does an operator learn bAbI's QA1, "Where is Mary?", from scratch, and after how many answers?

Two layers of width 64 on simulated stories, one token a word, a minute on one core. `--form` says how far a
place is from its actor, `--set` sets any field of `LawcatConfig`. Prints the accuracy on the simulator's
question, and on all questions whose answer is not the last place named: a model that ignores
the person never gets those.

    python benchmarks/babi_small_models.py --form "{actor} went to the {place}" --set conv_kernel_size=6
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lawcat.model.configuration_lawcat import LawcatConfig
from lawcat.model.modeling_lawcat import LawcatForCausalLM
from lawcat.tasks.babi import ACTORS, PLACES
from lawcat.tasks.babi_simulator import simulate_story
from lawcat.tasks.babi_solver import solve_all

FULL_FORM = "{actor} went to the {place} ."
FULL_QUESTION = "Where is {actor} ?"
_FILLERS = tuple(f"filler{i}" for i in range(64))
_WORDS = (*ACTORS, *PLACES, "went", "to", "the", ".", "Where", "is", "?", *_FILLERS)
_NUMBER = {word: number for number, word in enumerate(_WORDS, start=1)}

Answer = tuple[int, int, int, int]
"""Row, position before the answer, answer, whether it differs from the last place named."""


def make_batch(
    rng: random.Random, stories: int, form: str, question: str, noise: float
) -> tuple[Tensor, list[Answer], list[int]]:
    """Return ids [B, T], the answers in them, and which of these answer the simulator's own questions."""
    rows: list[list[int]] = []
    answers: list[Answer] = []
    firsts: list[int] = []
    for row in range(stories):
        story = simulate_story("qa1", rng)
        asked = rng.choice(story.questions)
        facts = story.facts[: asked.num_facts]
        words: list[str] = []
        places: list[str] = []
        for fact in facts:
            names = re.findall(r"\w+", fact)
            places.append(names[-1])
            if noise:
                words += rng.choices(_FILLERS, k=min(int(rng.expovariate(1 / noise)), int(4 * noise)))
            words += form.format(actor=names[0], place=names[-1]).split()
        others = [(text, one.answer) for text, one in solve_all("qa1", facts).items() if text != asked.text]
        rng.shuffle(others)
        firsts.append(len(answers))
        for text, answer in [(asked.text, asked.answer), *others]:
            words += question.format(actor=re.findall(r"\w+", text)[-1]).split()
            answers.append((row, len(words) - 1, _NUMBER[answer], int(answer != places[-1])))
            words.append(answer)
        rows.append([_NUMBER[word] for word in words])
    ids = torch.zeros(stories, max(map(len, rows)), dtype=torch.long)
    for row, numbers in enumerate(rows):
        ids[row, : len(numbers)] = torch.tensor(numbers)
    return ids, answers, firsts


def answer_logits(model: LawcatForCausalLM, ids: Tensor, answers: Sequence[Answer]) -> tuple[Tensor, Tensor]:
    """Return logits [answers, V] and the right tokens [answers]."""
    rows, positions, targets, _ = torch.tensor(answers).unbind(1)
    return model(input_ids=ids).logits[rows, positions], targets


def main() -> None:
    """Train, and print a line every so many steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--form", default=FULL_FORM, help="a fact, one token a word")
    parser.add_argument("--question", default=FULL_QUESTION, help="what stands before an answer")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of LawcatConfig")
    parser.add_argument("--tap-std", type=float, default=0.0, help="noise on the convolutions' past taps")
    parser.add_argument("--noise", type=float, default=0.0, help="mean filler tokens before a fact")
    parser.add_argument("--softmax", action="store_true", help="the teacher's attention instead")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    fields = {name: json.loads(value) for name, _, value in (one.partition("=") for one in options.set)}
    sizes = {"vocab_size": len(_WORDS) + 1, "hidden_size": 64, "intermediate_size": 128}
    kinds = ["full_attention" if options.softmax else "linear_attention"] * 2
    layout = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "layer_types": kinds,
        "initializer_range": 0.1,
    }
    model = LawcatForCausalLM(
        LawcatConfig(**(sizes | layout | {"tie_word_embeddings": True} | fields))
    ).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_conv." in name:
                parameter[:, :-1].add_(torch.randn_like(parameter[:, :-1]), alpha=options.tap_std)

    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, (0.9, 0.95), weight_decay=0.0)
    rng, held_out = random.Random(options.seed), random.Random("held out")
    shape = (options.form, options.question, options.noise)
    test_ids, test_answers, test_firsts = make_batch(held_out, 200, *shape)
    other = torch.tensor([one[3] for one in test_answers], dtype=torch.bool)
    seen, start = 0, time.perf_counter()
    for step in range(1, options.steps + 1):
        ids, answers, _ = make_batch(rng, options.batch, *shape)
        logits, targets = answer_logits(model, ids, answers)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, step / 50)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(logits, targets))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += len(answers)
        if step % 50 and step != options.steps:
            continue
        with torch.no_grad():
            logits, targets = answer_logits(model, test_ids, test_answers)
        right = (logits.argmax(-1) == targets).float()
        print(
            f"{step} steps, {seen} answers, {time.perf_counter() - start:.0f} s: "
            f"{right[test_firsts].mean():.2f} right, {right[other].mean():.2f} of those not last named",
            flush=True,
        )


if __name__ == "__main__":
    main()
