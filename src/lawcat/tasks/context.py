"""The context of a RULER task: pieces of text, with sentences put in between."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from lawcat.tasks.haystack import NOISE_SENTENCE, TextSource

DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""RULER's forty depths in percent, `round(linspace(0, 100, 40))`."""

Places = Callable[[int], list[float]]
"""From the number of pieces to the ascending places, from 0 to 1, of what is put between them."""


@dataclass(frozen=True, eq=False)
class Context:
    """Pieces of text in any number, with sentences put in between.

    Args:
        pieces: Makes the pieces of so many units.
        is_prose: A unit is a word and a piece a sentence. Else both are a line.
        separator: What joins the pieces.

    Example:
        >>> context = Context(lambda units: ["Noise."] * units, is_prose=False, separator="|")
        >>> context.text(4, ["Needle."], [0.5])
        'Noise.|Noise.|Needle.|Noise.|Noise.'
    """

    pieces: Callable[[int], list[str]]
    is_prose: bool
    separator: str = "\n"

    def text(self, units: int, sentences: Sequence[str], places: Sequence[float]) -> str:
        """Return the pieces of `units` units, each sentence at its place.

        Args:
            units: Words or lines.
            sentences: What is put in, in the order of the text.
            places: For each sentence the share of the pieces that comes before it, ascending.

        Returns:
            The text.
        """
        pieces = self.pieces(units)
        parts: list[str] = []
        start = 0
        for sentence, place in zip(sentences, places, strict=True):
            end = int(len(pieces) * place)
            parts += [*self._run(pieces[start:end]), sentence]
            start = end
        return self.separator.join([*parts, *self._run(pieces[start:])])

    def _run(self, pieces: list[str]) -> list[str]:
        # In prose, a needle at either end, or two in one place, leave an empty run and so a space too many:
        # RULER's prompts have it, ours too.
        return [" ".join(pieces)] if self.is_prose else pieces


def prose_context(source: TextSource) -> Context:
    """Return a context of the first words of a text, split into sentences."""
    return Context(lambda units: sentences_of(source, units)[0], is_prose=True, separator=" ")


def noise_context() -> Context:
    """Return a context of lines that all hold the noise sentence."""
    return Context(lambda units: [NOISE_SENTENCE] * units, is_prose=False)


def is_noise(source: TextSource) -> bool:
    """Return whether a source is the noise sentence, which fills a context line by line."""
    return source.text == NOISE_SENTENCE


def draw_places(rng: random.Random, is_prose: bool, count: int) -> Places:
    """Return where RULER puts `count` sentences: at different ones of its depths, or before different lines.

    Args:
        rng: Draws them.
        is_prose: Whether the places are depths between sentences or lines.
        count: How many places, at most 40 in prose.

    Returns:
        A function from the number of pieces to the places.

    Example:
        >>> len(draw_places(random.Random(0), True, 3)(100))
        3
    """
    if is_prose:
        depths = sorted(rng.sample(DEPTHS, count))
        return lambda pieces: [depth / 100 for depth in depths]
    if count == 1:
        place = rng.random()
        return lambda pieces: [place]
    seed = rng.getrandbits(64)

    def places(pieces: int) -> list[float]:
        again = random.Random(seed)
        if pieces >= count:
            lines = sorted(again.sample(range(pieces), count))
        else:
            lines = sorted(again.choices(range(pieces + 1), k=count))
        return [(line + 0.5) / max(pieces, 1) for line in lines]

    return places


@lru_cache(maxsize=32)
def sentences_of(source: TextSource, num_words: int) -> tuple[list[str], int]:
    """Return the sentences of a text's first words, and how often the text had to start over for them."""
    words, repeats = source.words(num_words)
    return split_sentences(" ".join(words)), repeats


def split_sentences(text: str) -> list[str]:
    """Return the sentences of an English text as Punkt splits them.

    Example:
        >>> split_sentences("One is here. Mr. Two went.")
        ['One is here.', 'Mr. Two went.']
    """
    import punkt  # here, since it takes a tenth of a second

    sentences: list[str] = punkt.sent_tokenize(text.strip())
    return sentences
