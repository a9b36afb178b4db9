"""Needles: sentences that give a key its value, and RULER's question about some of them.

Source: NVIDIA/RULER (arXiv 2404.06654), `scripts/data/synthetic/niah.py` and `constants.py`.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lawcat.errors import ConfigurationError
from lawcat.tasks.context import Context, Places
from lawcat.tasks.ruler import Question
from lawcat.tasks.sample import Split, choose
from lawcat.tasks.words import draw_new, random_word

ValueKind = Literal["numbers", "words", "uuids"]
VALUE_KINDS: tuple[ValueKind, ...] = ("numbers", "words", "uuids")

NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
TEMPLATE = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type_needle_v} afterwards.\n{context}\n"
    "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?"
)
ANSWER_PREFIX = " The special magic {type_needle_v} for {query} mentioned in the provided text are"

# RULER shuffles the needles of every sample alike, by a generator of their own seeded with its default seed.
_SHUFFLE_SEED = 42


@dataclass(frozen=True)
class Needle:
    """A key with one of its values.

    Args:
        kind: Of the value, in the plural, as the needle's sentence has it.
        key: What is asked for.
        value: The answer.

    Example:
        >>> Needle("numbers", "mute-cat", "1234567").sentence
        'One of the special magic numbers for mute-cat is: 1234567.'
    """

    kind: ValueKind
    key: str
    value: str

    @property
    def sentence(self) -> str:
        """The sentence that is hidden."""
        return NEEDLE.format(type_needle_v=self.kind, key=self.key, value=self.value)


@dataclass(frozen=True)
class NeedleForm:
    """How many needles of what kinds are hidden, and how many keys are asked for.

    Args:
        value_kind: `"numbers"` of seven digits, `"words"` or `"uuids"`.
        key_kind: The same for what is asked by.
        num_keys: Keys in the text; those not asked for distract.
        num_values: Values of each key.
        num_queries: Keys asked for, at most `num_keys`.

    Raises:
        ConfigurationError: for another kind, a number below 1, or more queries than keys.

    Example:
        >>> NeedleForm(num_keys=4).num_needles
        4
    """

    value_kind: ValueKind = "numbers"
    key_kind: ValueKind = "words"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def __post_init__(self) -> None:
        choose(self.value_kind, VALUE_KINDS, "kind")
        choose(self.key_kind, VALUE_KINDS, "key_kind")
        for name in ("num_keys", "num_values", "num_queries"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigurationError(f"{name} is {number!r}; it must be a whole number, at least 1.")
        if self.num_queries > self.num_keys:
            raise ConfigurationError(
                f"num_queries is {self.num_queries}, more than the {self.num_keys} keys that are hidden. Set "
                f"num_keys to at least {self.num_queries}."
            )
        if self.num_needles > 40:
            raise ConfigurationError(
                f"num_keys x num_values is {self.num_needles}; prose has places for at most 40 needles."
            )

    @property
    def num_needles(self) -> int:
        """How many sentences are hidden."""
        return self.num_keys * self.num_values


def draw_value(rng: random.Random, kind: ValueKind, split: Split, taken: set[str]) -> str:
    """Return a key or value of the split that is not among those taken, and add it to them."""
    return draw_new(lambda: _VALUES[kind](rng), split, taken)


def draw_needles(rng: random.Random, form: NeedleForm, split: Split) -> list[list[Needle]]:
    """Return the needles of each key; no key and no value comes twice."""
    taken: set[str] = set()
    needles = []
    for _ in range(form.num_keys):
        key = draw_value(rng, form.key_kind, split, taken)
        values = [draw_value(rng, form.value_kind, split, taken) for _ in range(form.num_values)]
        needles.append([Needle(form.value_kind, key, value) for value in values])
    return needles


class NeedleQuestion(Question):
    """RULER's question for the values of one or several keys.

    Args:
        needles: For each key its needles.
        asked: Which of the keys are asked for, in order.
        context: What surrounds the needles.
        places: Where the needles go.

    Example:
        >>> needle = Needle("numbers", "mute-cat", "1234567")
        >>> context = Context(lambda units: ["Noise."] * units, is_prose=False)
        >>> question = NeedleQuestion([[needle]], [0], context, lambda units: [0.5])
        >>> question.answer_prefix
        ' The special magic number for mute-cat mentioned in the provided text is'
    """

    def __init__(
        self, needles: list[list[Needle]], asked: list[int], context: Context, places: Places
    ) -> None:
        self.context = context
        self._places = places
        self._hidden = [needle for group in needles for needle in group]
        random.Random(_SHUFFLE_SEED).shuffle(self._hidden)
        self._asked = [needles[index] for index in asked]
        self.answers = tuple(needle.value for group in self._asked for needle in group)
        keys = [group[0].key for group in self._asked]
        self._query = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
        self._kind = self._hidden[0].kind

    @property
    def answer_prefix(self) -> str:
        """The beginning of the answer, which the model is given."""
        return self._worded(ANSWER_PREFIX)

    @property
    def answer(self) -> str:
        """How the answer goes on, for training: `" {value}."`, several joined by commas and "and"."""
        values = list(self.answers)
        said = values[0] if len(values) == 1 else ", ".join(values[:-1]) + ", and " + values[-1]
        return f" {said}."

    @property
    def further_prompt(self) -> str:
        """The prompt without instruction and text, after another question about the same text."""
        return "\n" + self._worded(TEMPLATE.rpartition("\n")[2]) + self.answer_prefix

    def prompt(self, units: int) -> str:
        """Return RULER's `input` and `answer_prefix`."""
        return self._input(units) + self.answer_prefix

    def linear_texts(self, units: int, is_probe: bool) -> tuple[str, ...]:
        """Return RULER's `input` alone, in the search with the values stuck to its end."""
        return (self._input(units) + (" ".join(self.answers) if is_probe else ""),)

    def depth(self, units: int) -> float | None:
        """Return where the answer stands, or None if it has several parts."""
        return self._depths(units)[0] if len(self.answers) == 1 else None

    def describe(self, units: int) -> dict[str, Any]:
        """Return what is asked for, and the depths of several answers."""
        described: dict[str, Any] = {"key": self._query}
        if len(self.answers) > 1:
            described["depths"] = self._depths(units)
        return described

    def _depths(self, units: int) -> list[float]:
        depth_of = dict(zip(self._hidden, self._places(units), strict=True))
        return [min(depth_of[needle], 1.0) for group in self._asked for needle in group]

    def _input(self, units: int) -> str:
        sentences = [needle.sentence for needle in self._hidden]
        text = self.context.text(units, sentences, self._places(units))
        return self._worded(TEMPLATE, context=text)

    def _worded(self, template: str, **texts: str) -> str:
        kind: str = self._kind
        if len(self.answers) == 1:
            # RULER's own replacements, in its order, for one value and one query.
            template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
            template = template.replace("answers", "answer")
            kind = kind[:-1]
        return template.format(type_needle_v=kind, query=self._query, **texts)


def needle_context(rng: random.Random, form: NeedleForm, split: Split, taken: set[str]) -> Context:
    """Return a context of further needles, whose keys and values are none of those taken.

    Args:
        rng: Draws them.
        form: Says of what kinds.
        split: Of their keys and values.
        taken: Keys and values that must not occur; grows.

    Returns:
        A context whose first lines stay the same whatever its size.
    """
    lines: list[str] = []

    def pieces(units: int) -> list[str]:
        while len(lines) < units:
            key = draw_value(rng, form.key_kind, split, taken)
            value = draw_value(rng, form.value_kind, split, taken)
            lines.append(Needle(form.value_kind, key, value).sentence)
        return lines[:units]

    return Context(pieces, is_prose=False)


def _number(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


_VALUES: dict[ValueKind, Callable[[random.Random], str]] = {
    "words": random_word,
    "numbers": _number,
    "uuids": _uuid,
}
