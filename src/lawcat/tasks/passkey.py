"""Passkey retrieval: a number hidden in a text that says nothing.

Source: Mohtashami and Jaggi, "Landmark Attention" (arXiv 2305.16300), `llama/run_test.py`; length rules of
    LongLoRA (`passkey_retrivial.py`) and LongRoPE (`evaluation/passkey.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lawcat.errors import ConfigurationError, DataError
from lawcat.tasks.haystack import NOISE_SENTENCE
from lawcat.tasks.round_trip import require_round_trip
from lawcat.tasks.sample import (
    Sample,
    SampleRequest,
    Split,
    Task,
    check_length,
    choose,
    count_tokens,
    draw,
    fit_units,
    register_task,
    sample_rng,
)

if TYPE_CHECKING:
    import random

    from transformers import PreTrainedTokenizerBase

LengthRule = Literal["tokens", "longlora", "longrope"]

DEPTHS = tuple(step / 10 for step in range(11))
MAX_KEY = 50_000

_INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
_QUESTION = "What is the pass key? The pass key is"


def passkey_text(key: str, prefix_chars: int, suffix_chars: int) -> str:
    """Return the prompt with so many characters of garbage before and after the key.

    Both pieces start at the beginning of the garbage, as in the original.

    Args:
        key: The number to be found.
        prefix_chars: Characters of garbage before it.
        suffix_chars: Characters of garbage after it.

    Returns:
        Five lines that end in "The pass key is".

    Example:
        >>> print(passkey_text("7", 19, 0).splitlines()[1])
        The grass is green.
    """
    garbage = _garbage(max(prefix_chars, suffix_chars))
    return "\n".join(
        [
            _INTRODUCTION,
            garbage[:prefix_chars],
            f"The pass key is {key}. Remember it. {key} is the pass key.",
            garbage[:suffix_chars],
            _QUESTION,
        ]
    )


class Passkey(Task):
    """Passkey retrieval.

    Options:
        length_rule: How much garbage a nominal length of L tokens gets. `"tokens"`: as much as keeps the
            whole prompt within L of the model's own tokens (the true length is L or a few tokens less).
            `"longlora"`: `int(3.75 * L // 1024 * 1024)` characters, `"longrope"`: `int(3.65 * L)` characters,
            whatever the tokenizer; the true length is then some percent off and stands in the results.
        depth: `"grid"`: sample i at depth (i mod 11) / 10. `"random"`: uniform, as in the original. Or a
            number from 0 to 1 for all samples.

    Metrics:
        accuracy: The first digits of the answer are the key.
        exact: The answer begins with the key, nothing before it: LongLoRA's, which generates as many tokens
            as the key has and compares them. Stricter in that the model may not lead up to the key; but as
            there, digits that follow the key are not seen.
        digit_accuracy: Share of the key's digits that are right, by position, in the first digits of the
            answer: tells models apart that are only half trained.

    Example:
        >>> sample = Sample("passkey", 64, 0, 0, "...", ("12345",), 10, 64)
        >>> PASSKEY.score(sample, " 12245. Remember")
        {'accuracy': 0.0, 'exact': 0.0, 'digit_accuracy': 0.8}
    """

    name = "passkey"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "exact", "digit_accuracy")
    default_options: ClassVar[Mapping[str, Any]] = {"length_rule": "tokens", "depth": "grid"}

    def make(self, request: SampleRequest) -> Sample:
        """Return one prompt; see the class for options."""
        require_round_trip(request.tokenizer, ("numbers",))
        options, length = request.options, request.length
        rng = request.rng()
        key = _draw_key(rng, request.split)
        depth = _draw_depth(options["depth"], request.index, rng)
        rule = choose(options["length_rule"], ("tokens", "longlora", "longrope"), "length_rule")
        if rule == "tokens":
            num_chars = _fit_garbage(request.tokenizer, length, key, depth)
        elif rule == "longlora":
            num_chars = int(3.75 * length // 1024 * 1024)
        else:
            num_chars = int(3.65 * length)
        prefix_chars = round(depth * num_chars)
        prompt = passkey_text(key, prefix_chars, num_chars - prefix_chars)
        return request.sample(prompt, (key,), 10, depth=depth, metadata={"garbage_chars": num_chars})

    def score(self, sample: Sample, answer_text: str) -> dict[str, float]:
        """Return accuracy, exact and digit_accuracy; see the class."""
        key = sample.answers[0]
        match = re.search(r"\d+", answer_text)
        digits = match.group() if match else ""
        right = sum(ours == wanted for ours, wanted in zip(digits, key, strict=False))
        return {
            # As a number, like the original: "007" is 7.
            "accuracy": float(bool(digits) and int(digits) == int(key)),
            "exact": float(answer_text.lstrip().startswith(key)),
            "digit_accuracy": right / len(key),
        }

    def is_answered(self, sample: Sample, answer_text: str) -> bool:
        """Return whether the first number is complete: something that is not a digit follows it."""
        return re.search(r"\d\D", answer_text) is not None


PASSKEY = register_task(Passkey())


def passkey_training_pair(
    tokenizer: PreTrainedTokenizerBase, max_tokens: int, index: int, seed: int
) -> tuple[str, str]:
    """Return a prompt and its answer for training, with a key that no evaluation draws.

    Args:
        tokenizer: Measures the text.
        max_tokens: Most tokens of `prompt + answer`, special tokens included. The prompt is filled up to
            that.
        index: Which example, from 0.
        seed: The run's seed.

    Returns:
        The prompt and the answer `" {key}."`: tokenize them as one text (`encode_pair`).

    Raises:
        DataError: if `max_tokens` cannot hold the question, or the tokenizer cannot hold digits.
    """
    check_length(max_tokens)
    require_round_trip(tokenizer, ("numbers",))
    rng = sample_rng("passkey", max_tokens, index, seed, "train")
    key = _draw_key(rng, "train")
    depth = rng.random()
    answer = f" {key}."
    num_chars = _fit_garbage(tokenizer, max_tokens, key, depth, answer)
    prefix_chars = round(depth * num_chars)
    return passkey_text(key, prefix_chars, num_chars - prefix_chars), answer


def _draw_key(rng: random.Random, split: Split) -> str:
    return draw(lambda: str(rng.randint(1, MAX_KEY)), split)


def _draw_depth(depth: object, index: int, rng: random.Random) -> float:
    if depth == "grid":
        return DEPTHS[index % len(DEPTHS)]
    if depth == "random":
        return rng.random()
    if isinstance(depth, (int, float)) and not isinstance(depth, bool) and 0 <= depth <= 1:
        return float(depth)
    raise ConfigurationError(f"depth is {depth!r}; it must be 'grid', 'random' or a number from 0 to 1.")


def _fit_garbage(
    tokenizer: PreTrainedTokenizerBase, max_tokens: int, key: str, depth: float, answer: str = ""
) -> int:
    def count(num_chars: int) -> int:
        prefix_chars = round(depth * num_chars)
        return count_tokens(tokenizer, passkey_text(key, prefix_chars, num_chars - prefix_chars) + answer)

    # 4.5 characters a token is what most tokenizers give for this text; the search corrects it.
    num_chars = fit_units(count, max_tokens, estimate=round(4.5 * max_tokens))
    if num_chars < 0:
        raise DataError(
            f"A passkey question takes {count(0)} tokens without any text around it, which does not fit in "
            f"{max_tokens}. Ask for a length of at least {count(0)} tokens."
        )
    return num_chars


@lru_cache(maxsize=4)
def _long_garbage(repeats: int) -> str:
    return " ".join([NOISE_SENTENCE] * repeats)


def _garbage(num_chars: int) -> str:
    # In powers of two, so that a search over lengths builds the long string once.
    repeats = 1
    while repeats * (len(NOISE_SENTENCE) + 1) - 1 < num_chars:
        repeats *= 2
    return _long_garbage(repeats)
