"""Random words from wonderwords' lists: RULER's keys, and plain nouns."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files

from lawcat.tasks.sample import Split, draw


def random_word(rng: random.Random) -> str:
    """Return an adjective and a noun joined by a hyphen, RULER's "word": one of 6.2 million.

    Example:
        >>> "-" in random_word(random.Random(0))
        True
    """
    # RULER sorts all pairs into a list and draws from that: 15 seconds and 1.5 GB for the same.
    adjectives, nouns = _word_lists()
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


def random_noun(rng: random.Random) -> str:
    """Return a noun of three to nine letters a to z: one of 5,629.

    Example:
        >>> random_noun(random.Random(0)).isalpha()
        True
    """
    return rng.choice(_plain_nouns())


def draw_new(make: Callable[[], str], split: Split, taken: set[str]) -> str:
    """Return a value of the split that is not among those taken, and add it to them.

    Args:
        make: Draws one value.
        split: As in `draw`.
        taken: What was drawn before; grows by the value.

    Returns:
        The value.
    """
    value = draw(make, split)
    while value in taken:
        value = draw(make, split)
    taken.add(value)
    return value


@lru_cache(maxsize=1)
def _word_lists() -> tuple[list[str], list[str]]:
    folder = files("wonderwords").joinpath("assets")
    adjectives, nouns = (
        sorted(set(folder.joinpath(name).read_text(encoding="utf-8").split()))
        for name in ("adjectivelist.txt", "nounlist.txt")
    )
    return adjectives, nouns


@lru_cache(maxsize=1)
def _plain_nouns() -> list[str]:
    return [noun for noun in _word_lists()[1] if re.fullmatch("[a-z]{3,9}", noun)]
