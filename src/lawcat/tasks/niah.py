"""Needles in a haystack: the eight needle tasks of RULER, and pairs to train them on.

Source: NVIDIA/RULER (arXiv 2404.06654), `scripts/synthetic.yaml` and `scripts/data/synthetic/niah.py`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lawcat.errors import ConfigurationError, DataError
from lawcat.tasks.context import (
    Context,
    Places,
    draw_places,
    is_noise,
    noise_context,
    prose_context,
    split_sentences,
)
from lawcat.tasks.haystack import BUILTIN_NAME, TextSource
from lawcat.tasks.needle import (
    NEEDLE,
    NeedleForm,
    NeedleQuestion,
    ValueKind,
    draw_needles,
    needle_context,
)
from lawcat.tasks.round_trip import require_round_trip
from lawcat.tasks.ruler import RulerTask, too_short
from lawcat.tasks.sample import (
    SampleRequest,
    check_length,
    choose,
    count_tokens,
    fit_units,
    register_task,
    sample_rng,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainingHaystack = Literal["prose", "noise", "needle"]

_NEEDLES = TextSource("needle", NEEDLE)


class NeedleTask(RulerTask):
    """One of RULER's needle tasks; its options and metric are those of `RulerTask`.

    The option `haystack` may also be `"needle"`: lines that are needles with other keys.

    Args:
        name: Of the task.
        haystack: The task's own: `"noise"`, `"needle"` or prose.
        form: Which needles are hidden, and how many are asked for.
    """

    max_new_tokens: ClassVar[int] = 128
    version: ClassVar[int] = 2

    def __init__(self, name: str, haystack: str, form: NeedleForm) -> None:
        self.name = name
        self.form = form
        self.haystack = haystack
        self.value_kinds = (form.key_kind, form.value_kind)
        self.uses_prose = haystack == BUILTIN_NAME

    def resolve_haystack(self, spec: Any) -> TextSource:
        """Return the source that the option `haystack` stands for, `"needle"` included."""
        return _NEEDLES if spec == "needle" else super().resolve_haystack(spec)

    def step(self, options: Mapping[str, Any], length: int) -> int:
        """Return 500 words, or 25 lines (5 below 4,096 tokens)."""
        if _is_prose(options["haystack"]):
            return 500
        return 25 if length >= 4096 else 5

    def ask(self, request: SampleRequest) -> NeedleQuestion:
        """Return the question of this request."""
        rng, split = request.rng(), request.split
        source = request.options["haystack"]
        needles = draw_needles(rng, self.form, split)
        places = draw_places(rng, _is_prose(source), self.form.num_needles)
        asked = _draw_asked(rng, self.form)
        if _is_prose(source):
            context = prose_context(source)
        elif is_noise(source):
            context = noise_context()
        else:
            taken = {text for group in needles for one in group for text in (one.key, one.value)}
            context = needle_context(rng, self.form, split, taken)
        return NeedleQuestion(needles, asked, context, places)


NIAH_SINGLE_1 = register_task(NeedleTask("niah_single_1", "noise", NeedleForm()))
NIAH_SINGLE_2 = register_task(NeedleTask("niah_single_2", BUILTIN_NAME, NeedleForm()))
NIAH_SINGLE_3 = register_task(NeedleTask("niah_single_3", BUILTIN_NAME, NeedleForm("uuids")))
NIAH_MULTIKEY_1 = register_task(NeedleTask("niah_multikey_1", BUILTIN_NAME, NeedleForm(num_keys=4)))
NIAH_MULTIKEY_2 = register_task(NeedleTask("niah_multikey_2", "needle", NeedleForm()))
NIAH_MULTIKEY_3 = register_task(NeedleTask("niah_multikey_3", "needle", NeedleForm("uuids", "uuids")))
NIAH_MULTIVALUE = register_task(NeedleTask("niah_multivalue", BUILTIN_NAME, NeedleForm(num_values=4)))
NIAH_MULTIQUERY = register_task(
    NeedleTask("niah_multiquery", BUILTIN_NAME, NeedleForm(num_keys=4, num_queries=4))
)


def niah_training_pair(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    max_tokens: int,
    index: int,
    seed: int,
    *,
    kind: ValueKind = "numbers",
    haystack: TrainingHaystack = "prose",
    key_kind: ValueKind = "words",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
) -> tuple[str, str]:
    """Return a prompt and its answer for training: needles in a window of `text`, in noise, or among needles.

    Keys and values are of those that no evaluation draws. The text is the caller's, and must not be an
    evaluation's. `haystack="noise"` with numbers is the form of `niah_single_1`, `"prose"` that of
    `niah_single_2` and, with uuids, `niah_single_3`; the other arguments give the forms of the other five.

    Args:
        tokenizer: Measures the text.
        text: Prose, for `haystack="prose"`: a window of it is used, from a random place on. Else unused.
        max_tokens: Most tokens of `prompt + answer`, special tokens included. The context is filled up to
            that, if the text is long enough.
        index: Which example, from 0.
        seed: The run's seed.
        kind: Of the values: `"numbers"`, `"words"` or `"uuids"`.
        haystack: `"prose"`, `"noise"` (lines of the noise sentence) or `"needle"` (lines that are further
            needles).
        key_kind: Of the keys, as `kind`.
        num_keys: Keys hidden; those not asked for distract.
        num_values: Values of each key.
        num_queries: Keys asked for.

    Returns:
        The prompt and the answer `" {value}."`, several joined by commas: tokenize them as one text
        (`encode_pair`).

    Raises:
        ConfigurationError: for another kind or haystack, or impossible numbers.
        DataError: if `max_tokens` cannot hold the question, the text holds no words, or the tokenizer cannot
            hold the values.
    """
    form = {"num_keys": num_keys, "num_values": num_values, "num_queries": num_queries}
    pairs = niah_training_pairs(
        tokenizer, text, max_tokens, index, seed, kind=kind, haystack=haystack, key_kind=key_kind, **form
    )
    return pairs[0]


def niah_training_pairs(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    max_tokens: int,
    index: int,
    seed: int,
    *,
    kind: ValueKind = "numbers",
    haystack: TrainingHaystack = "prose",
    key_kind: ValueKind = "words",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
    questions: int = 1,
) -> list[tuple[str, str]]:
    """Return `niah_training_pair`, and further questions for other keys of the same text, with their answers.

    Args:
        tokenizer: Measures the text.
        text: As for `niah_training_pair`, and so are the next ones.
        max_tokens: Most tokens of all prompts and answers, special tokens included.
        index: See above.
        seed: See above.
        kind: See above.
        haystack: See above.
        key_kind: See above.
        num_keys: See above.
        num_values: See above.
        num_queries: Keys asked for by the first question.
        questions: How many; after the first, each asks for one key more.

    Returns:
        Prompts and answers that follow one another: tokenize them as one text (`encode_pairs`). A further
        prompt is the last line of the first, with another key.

    Raises:
        ConfigurationError: as `niah_training_pair`, or for more questions than there are keys.
        DataError: as `niah_training_pair`.
    """
    check_length(max_tokens)
    form = NeedleForm(kind, key_kind, num_keys, num_values, num_queries)
    most = num_keys - num_queries + 1
    if isinstance(questions, bool) or not isinstance(questions, int) or not 1 <= questions <= most:
        raise ConfigurationError(
            f"questions is {questions!r}; it must be a whole number from 1 to {most}, since {num_keys} keys "
            f"are hidden and the first question asks for {num_queries}."
        )
    choose(haystack, ("prose", "noise", "needle"), "haystack")
    require_round_trip(tokenizer, (key_kind, kind))
    rng = sample_rng(f"niah-{kind}", max_tokens, index, seed, "train")
    needles = draw_needles(rng, form, "train")
    most_units = None
    if haystack == "prose":
        context, most_units = _window(text, max_tokens, rng)
        places = _free_places(rng, form.num_needles)
    else:
        places = draw_places(rng, False, form.num_needles)
        taken = {said for group in needles for one in group for said in (one.key, one.value)}
        context = noise_context() if haystack == "noise" else needle_context(rng, form, "train", taken)
    asked = _draw_asked(rng, form)
    question = NeedleQuestion(needles, asked, context, places)
    further: list[tuple[str, str]] = []
    if questions > 1:
        left = [key for key in range(num_keys) if key not in asked]
        others = [NeedleQuestion(needles, [key], context, places) for key in rng.sample(left, questions - 1)]
        further = [(other.further_prompt, other.answer) for other in others]
    tail = question.answer + "".join(prompt + answer for prompt, answer in further)

    def count(units: int) -> int:
        if most_units is not None and units > most_units:
            return max_tokens + 1  # beyond the window there is nothing to add: as if it did not fit
        return count_tokens(tokenizer, question.prompt(units) + tail)

    tokens_a_unit = 1.35 if context.is_prose else 24.0
    estimate = round(max_tokens / tokens_a_unit)
    units = fit_units(count, max_tokens, estimate if most_units is None else min(estimate, most_units))
    if units < 0:
        raise too_short(max_tokens, count(0))
    return [(question.prompt(units), question.answer), *further]


def _is_prose(source: TextSource) -> bool:
    return source is not _NEEDLES and not is_noise(source)


def _draw_asked(rng: random.Random, form: NeedleForm) -> list[int]:
    return rng.sample(range(form.num_keys), form.num_queries)


def _free_places(rng: random.Random, count: int) -> Places:
    places = sorted(rng.random() for _ in range(count))
    return lambda pieces: places


def _window(text: str, max_tokens: int, rng: random.Random) -> tuple[Context, int]:
    """Return a window of a text as a context, and how many words it has."""
    # Ten characters a token is more than any tokenizer packs into one of prose.
    window_chars = 10 * max_tokens
    start = rng.randrange(max(1, len(text) - window_chars + 1))
    sentences = split_sentences(text[start : start + window_chars])
    if start > 0 and len(sentences) > 1:
        sentences = sentences[1:]  # its beginning is cut off
    if not sentences:
        raise DataError(
            "The text holds no words, so nothing can be hidden in it. Give prose to train needles on."
        )
    words_of = [sentence.split() for sentence in sentences]

    def pieces(num_words: int) -> list[str]:
        kept: list[str] = []
        for words in words_of:
            if num_words <= 0:
                break
            kept.append(" ".join(words[:num_words]))
            num_words -= len(words)
        return kept

    return Context(pieces, is_prose=True, separator=" "), sum(map(len, words_of))
