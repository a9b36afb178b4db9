"""Needles in a haystack: the three single-needle tasks of RULER (S-NIAH-1, 2 and 3).

Source: NVIDIA/RULER (arXiv 2404.06654), `scripts/data/synthetic/niah.py` and
    `scripts/eval/synthetic/constants.py`;
the linear fit as lm-evaluation-harness has it, `lm_eval/tasks/ruler/prepare_niah.py`.
"""

from __future__ import annotations

import math
import random
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import WeakKeyDictionary

from lawcat.errors import DataError
from lawcat.tasks.haystack import NOISE_SENTENCE, TextSource, resolve_source
from lawcat.tasks.sample import (
    Sample,
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
    from transformers import PreTrainedTokenizerBase

ValueKind = Literal["numbers", "words", "uuids"]
Fit = Literal["binary", "linear"]
Overflow = Literal["trim", "step"]

TOKENS_TO_GENERATE = 128
DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""RULER's forty depths in percent, `round(linspace(0, 100, 40))`."""

NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
TEMPLATE = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type_needle_v} afterwards.\n{context}\n"
    "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?"
)
ANSWER_PREFIX = " The special magic {type_needle_v} for {query} mentioned in the provided text are"


@dataclass(frozen=True)
class Needle:
    """A key with its value.

    Args:
        kind: Of the value, in the plural, as the needle's sentence has it.
        key: What is asked for.
        value: The answer.

    Example:
        >>> needle = Needle("numbers", "mute-cat", "1234567")
        >>> needle.sentence
        'One of the special magic numbers for mute-cat is: 1234567.'
        >>> needle.answer_prefix
        ' The special magic number for mute-cat mentioned in the provided text is'
    """

    kind: ValueKind
    key: str
    value: str

    @property
    def sentence(self) -> str:
        """The sentence that is hidden."""
        return NEEDLE.format(type_needle_v=self.kind, key=self.key, value=self.value)

    @property
    def answer_prefix(self) -> str:
        """The beginning of the answer, which the model is given."""
        return _singular(ANSWER_PREFIX).format(type_needle_v=self.kind[:-1], query=self.key)

    def question(self, context: str) -> str:
        """Return RULER's `input`: the context and the question about it, without `answer_prefix`."""
        return _singular(TEMPLATE).format(type_needle_v=self.kind[:-1], query=self.key, context=context)

    def prompt(self, context: str) -> str:
        """Return what the model continues: `question` and `answer_prefix`."""
        return self.question(context) + self.answer_prefix


class SingleNeedle(Task):
    """One needle, one question: RULER's `niah_single_1`, `niah_single_2` and `niah_single_3`.

    Options:
        haystack: What the needle is hidden in: a `TextSource`, `"noise"`, `"emerson-excerpt"`, a path or a
            glob. None means the task's own: the noise sentence for `niah_single_1`, the built-in prose for
            the other two (RULER takes Paul Graham's essays there, which cannot be shipped).
        fit: How a nominal length of L tokens is filled; 128 of them are always kept free for the answer.
            `"binary"`, RULER since June 2025: the most words of prose (or lines of noise) with which the
            whole prompt fits, special tokens not counted. `"linear"`, RULER before and lm-evaluation-harness:
            in steps of 500 words or 25 lines (5 below 4,096 tokens), counted without the answer's beginning;
            so at 1,024 tokens prose has 500 words. Published numbers of 2024 and early 2025 mean `"linear"`.
        overflow: What becomes of a sample in the binary fit whose own key and value make it too long.
            `"trim"`: it loses as many words as it must. `"step"`, as in RULER: it loses a whole step, which
            at 1,024 tokens leaves a tenth of the text. In the linear fit it always loses a step.

    Metric:
        string_match_all: Share of the answers that occur in the continuation, upper and lower case alike.

    Where a step less is nothing at all, RULER's code loops for ever; ours trims.

    Args:
        name: Of the task.
        kind: Of the needle's value.
        haystack: The task's own.
    """

    metrics: ClassVar[tuple[str, ...]] = ("string_match_all",)
    default_options: ClassVar[Mapping[str, Any]] = {"haystack": None, "fit": "binary", "overflow": "trim"}

    def __init__(self, name: str, kind: ValueKind, haystack: str) -> None:
        self.name = name
        self.kind = kind
        self.haystack = haystack
        self.uses_prose = haystack != "noise"

    def resolve_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options with defaults filled in, the haystack as a `TextSource`."""
        chosen = super().resolve_options(options)
        source = chosen["haystack"]
        chosen["haystack"] = resolve_source(self.haystack if source is None else source)
        choose(chosen["fit"], ("binary", "linear"), "fit")
        choose(chosen["overflow"], ("trim", "step"), "overflow")
        return chosen

    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        index: int,
        seed: int,
        *,
        split: Split = "evaluation",
        **options: Any,
    ) -> Sample:
        """Return one prompt; see the class for the options and `Task.generate` for the rest."""
        check_length(length)
        chosen = self.resolve_options(options)
        source: TextSource = chosen["haystack"]
        linear = chosen["fit"] == "linear"
        rng = sample_rng(self.name, length, index, seed, split)
        needle = draw_needle(rng, self.kind, split)
        place = rng.random() if _is_noise(source) else rng.choice(DEPTHS) / 100

        units = self._units_of_length(tokenizer, source, length, seed, split, linear)
        limit = length - TOKENS_TO_GENERATE
        step = _step(source, length)
        while True:
            context = _context(source, units, needle, place)
            tokens = _measure(tokenizer, needle, context, linear)
            if tokens <= limit:
                break
            if units == 0:
                raise _too_short(length, tokens + TOKENS_TO_GENERATE)
            if (linear or chosen["overflow"] == "step") and units > step:
                units -= step
            else:
                units = max(0, units - math.ceil((tokens - limit) * units / tokens))

        prompt = needle.prompt(context)
        repeats = 0 if _is_noise(source) else _sentences(source, units)[1]
        return Sample(
            task=self.name,
            length=length,
            index=index,
            seed=seed,
            prompt=prompt,
            answers=(needle.value,),
            max_new_tokens=TOKENS_TO_GENERATE,
            num_tokens=count_tokens(tokenizer, prompt) if linear else tokens + _num_special_tokens(tokenizer),
            depth=place,
            metadata={"key": needle.key, "haystack_units": units, "haystack_repeats": repeats},
        )

    def score(self, sample: Sample, answer_text: str) -> dict[str, float]:
        """Return `string_match_all`; see the class.

        Example:
            >>> sample = Sample("niah_single_1", 64, 0, 0, "...", ("1234567",), 128, 64)
            >>> NIAH_SINGLE_1.score(sample, " it is 1234567.")
            {'string_match_all': 1.0}
        """
        text = re.sub(r"[\x00-\x1f]", "\n", answer_text.strip()).strip().lower()
        found = sum(answer.lower() in text for answer in sample.answers)
        return {"string_match_all": found / len(sample.answers)}

    def is_answered(self, sample: Sample, answer_text: str) -> bool:
        """Return whether every answer has been said: nothing said later can take that back."""
        return self.score(sample, answer_text)["string_match_all"] == 1.0

    def _units_of_length(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: TextSource,
        length: int,
        seed: int,
        split: Split,
        linear: bool,
    ) -> int:
        """Return how many words or lines all samples of a length start from: found once, by a probe."""
        known = _fitted.setdefault(tokenizer, {})
        key = (self.name, source.sha256, length, seed, split, linear)
        if key not in known:
            rng = sample_rng(self.name, length, -1, seed, split)
            needle = draw_needle(rng, self.kind, split)
            step = _step(source, length) if linear else 1
            # lm-evaluation-harness counts the answer in here, though not when it checks a sample.
            extra = f" {needle.value}" if linear else ""

            def count(steps: int) -> int:
                context = _context(source, steps * step, needle, 0.5)
                return _measure(tokenizer, needle, context, linear, extra)

            tokens_a_unit = 24.0 if _is_noise(source) else 1.35
            limit = length - TOKENS_TO_GENERATE
            steps = fit_units(count, limit, estimate=round(limit / (tokens_a_unit * step)))
            if steps < 0:
                raise _too_short(length, count(0) + TOKENS_TO_GENERATE)
            if linear and steps == 0:
                raise DataError(
                    f"A length of {length} tokens cannot hold one step of the linear fit ({step} words or "
                    f"lines, {count(1) + TOKENS_TO_GENERATE} tokens in all). Use fit='binary', or a greater "
                    "length."
                )
            known[key] = steps * step
        return known[key]


NIAH_SINGLE_1 = register_task(SingleNeedle("niah_single_1", "numbers", "noise"))
NIAH_SINGLE_2 = register_task(SingleNeedle("niah_single_2", "numbers", "emerson-excerpt"))
NIAH_SINGLE_3 = register_task(SingleNeedle("niah_single_3", "uuids", "emerson-excerpt"))


def niah_training_pair(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    max_tokens: int,
    index: int,
    seed: int,
    *,
    kind: ValueKind = "numbers",
) -> tuple[str, str]:
    """Return a prompt and its answer for training: a needle in a random window of `text`.

    Key and value are of those that no evaluation draws. The text is the caller's, and must not be an
    evaluation's.

    Args:
        tokenizer: Measures the text.
        text: Prose. A window of it is used, from a random place on.
        max_tokens: Most tokens of `prompt + answer`, special tokens included. The window is filled up to
            that, if the text is long enough.
        index: Which example, from 0.
        seed: The run's seed.
        kind: Of the needle's value: `"numbers"`, `"words"` or `"uuids"`.

    Returns:
        The prompt and the answer `" {value}."`: tokenize them as one text (`encode_pair`).

    Raises:
        ConfigurationError: for another kind.
        DataError: if `max_tokens` cannot hold the question, or the text holds no words.
    """
    check_length(max_tokens)
    choose(kind, ("numbers", "words", "uuids"), "kind")
    rng = sample_rng(f"niah-{kind}", max_tokens, index, seed, "train")
    needle = draw_needle(rng, kind, "train")
    answer = f" {needle.value}."
    # Ten characters a token is more than any tokenizer packs into one of prose.
    window_chars = 10 * max_tokens
    start = rng.randrange(max(1, len(text) - window_chars + 1))
    sentences = _split_sentences(text[start : start + window_chars])
    if start > 0 and len(sentences) > 1:
        sentences = sentences[1:]  # its beginning is cut off
    if not sentences:
        raise DataError(
            "The text holds no words, so nothing can be hidden in it. Give prose to train needles on."
        )
    place = rng.random()
    words_of = [sentence.split() for sentence in sentences]
    total = sum(map(len, words_of))

    def prompt(num_words: int) -> str:
        kept: list[str] = []
        for words in words_of:
            if num_words <= 0:
                break
            kept.append(" ".join(words[:num_words]))
            num_words -= len(words)
        return needle.prompt(_insert(kept, needle.sentence, place))

    def count(num_words: int) -> int:
        # Beyond the window there is nothing to add: as if it did not fit.
        return max_tokens + 1 if num_words > total else count_tokens(tokenizer, prompt(num_words) + answer)

    num_words = fit_units(count, max_tokens, estimate=min(round(max_tokens / 1.35), total))
    if num_words < 0:
        raise _too_short(max_tokens, count(0))
    return prompt(num_words), answer


def draw_needle(rng: random.Random, kind: ValueKind, split: Split) -> Needle:
    """Return a needle whose key (a word) and value belong to the split."""
    return Needle(kind, draw(lambda: _word(rng), split), draw(lambda: _VALUES[kind](rng), split))


def _word(rng: random.Random) -> str:
    # RULER sorts all 6.2 million pairs into a list and draws from that: 15 seconds and 1.5 GB for the same.
    adjectives, nouns = _word_lists()
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


def _number(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


_VALUES: dict[ValueKind, Callable[[random.Random], str]] = {
    "words": _word,
    "numbers": _number,
    "uuids": _uuid,
}

# By tokenizer and what else decides: how many words or lines a length holds.
_fitted: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[object, ...], int]] = WeakKeyDictionary()


@lru_cache(maxsize=1)
def _word_lists() -> tuple[list[str], list[str]]:
    folder = files("wonderwords").joinpath("assets")
    adjectives, nouns = (
        sorted(set(folder.joinpath(name).read_text(encoding="utf-8").split()))
        for name in ("adjectivelist.txt", "nounlist.txt")
    )
    return adjectives, nouns


def _singular(template: str) -> str:
    # RULER's own replacements, in its order, for one value and one query.
    template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
    return template.replace("answers", "answer")


def _is_noise(source: TextSource) -> bool:
    return source.text == NOISE_SENTENCE


def _step(source: TextSource, length: int) -> int:
    if not _is_noise(source):
        return 500
    return 25 if length >= 4096 else 5


def _context(source: TextSource, units: int, needle: Needle, place: float) -> str:
    if _is_noise(source):
        lines = [NOISE_SENTENCE] * units
        lines.insert(int(units * place), needle.sentence)
        return "\n".join(lines)
    return _insert(_sentences(source, units)[0], needle.sentence, place)


def _insert(sentences: list[str], needle: str, place: float) -> str:
    # A needle at either end leaves an empty piece and so a space too many: RULER's prompts have it, ours too.
    position = int(len(sentences) * place)
    return " ".join([" ".join(sentences[:position]), needle, " ".join(sentences[position:])])


@lru_cache(maxsize=32)
def _sentences(source: TextSource, num_words: int) -> tuple[list[str], int]:
    words, repeats = source.words(num_words)
    return _split_sentences(" ".join(words)), repeats


def _split_sentences(text: str) -> list[str]:
    import punkt  # here, since it takes a tenth of a second

    sentences: list[str] = punkt.sent_tokenize(text.strip())
    return sentences


def _measure(
    tokenizer: PreTrainedTokenizerBase, needle: Needle, context: str, linear: bool, extra: str = ""
) -> int:
    """Return the tokens of a prompt as its fit counts them."""
    if linear:
        return count_tokens(tokenizer, needle.question(context) + extra)
    return count_tokens(tokenizer, needle.prompt(context)) - _num_special_tokens(tokenizer)


def _num_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.num_special_tokens_to_add(pair=False))


def _too_short(length: int, needed: int) -> DataError:
    return DataError(
        f"The needle, the question and the room for its answer take {needed} tokens without any text around "
        f"them, which does not fit in {length}. Ask for a length of at least {needed} tokens."
    )
