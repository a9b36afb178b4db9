"""Two short probes of what a recurrent state holds: associative recall, and copying.

Source: the idea of associative recall as a probe of recurrent models, Arora et al., "Zoology"
(arXiv 2312.04927), and of copying, Jelassi et al., "Repeat After Me" (arXiv 2402.01032); prompts and scores
are our own, of words instead of made-up symbols, so that a pretrained model can be asked as it is.
"""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from lawcat.errors import DataError
from lawcat.tasks.round_trip import require_round_trip
from lawcat.tasks.sample import (
    Sample,
    SampleRequest,
    Split,
    Task,
    count_tokens,
    draw,
    fit_units,
    register_task,
)
from lawcat.tasks.words import draw_new, random_noun, random_word

NUM_CUE_WORDS = 3
NUM_COPIED_WORDS = 8

_WORD = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")


@dataclass(frozen=True)
class _Probe:
    """A probe whose size is still open."""

    prompt: Callable[[int], str]
    answers: Callable[[int], tuple[str, ...]]
    depth: Callable[[int], float | None]


class _RecallTask(Task):
    """A list of random words that fills a length, and a question about it; without options."""

    max_new_tokens: ClassVar[int]
    least_units: ClassVar[int]

    @abstractmethod
    def draw_probe(self, rng: random.Random, split: Split) -> _Probe:
        """Return a probe drawn from `rng`."""

    def make(self, request: SampleRequest) -> Sample:
        """Return one prompt of at most as many tokens as asked for."""
        tokenizer, length = request.tokenizer, request.length
        require_round_trip(tokenizer, ("words",))
        probe = self.draw_probe(request.rng(), request.split)

        def count(more: int) -> int:
            return count_tokens(tokenizer, probe.prompt(self.least_units + more))

        more = fit_units(count, length, estimate=length // 8)
        if more < 0:
            raise DataError(
                f"The shortest {self.name} question takes {count(0)} tokens, which does not fit in {length}. "
                f"Ask for a length of at least {count(0)} tokens."
            )
        units = self.least_units + more
        return request.sample(
            probe.prompt(units),
            probe.answers(units),
            self.max_new_tokens,
            depth=probe.depth(units),
            metadata={"units": units},
        )

    def is_answered(self, sample: Sample, answer_text: str) -> bool:
        """Return whether all the words that count are complete: something else follows them."""
        words = list(_WORD.finditer(answer_text))
        wanted = len(sample.answers)
        # What follows could still belong to the word, as the hyphen of "well-known" does.
        return len(words) > wanted or (
            len(words) == wanted and re.search(r"[^\w'-]", answer_text[words[-1].end() :]) is not None
        )


class AssociativeRecall(_RecallTask):
    """Key-value pairs, one a line, then one of the keys: the model is to give its value.

    The prompt of a length holds as many pairs as fit, about one to eight tokens: lengths from 64 tokens on
    are of use. All keys (adjective and noun) and values (nouns) of evaluation belong to the held-out split.

    Metric:
        accuracy: The first word of the continuation is the value.
    """

    name = "associative_recall"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    max_new_tokens: ClassVar[int] = 10
    least_units: ClassVar[int] = 2

    def draw_probe(self, rng: random.Random, split: Split) -> _Probe:
        """Return pairs without end, one of which is asked for."""
        place = rng.random()
        pairs: list[tuple[str, str]] = []
        keys: set[str] = set()

        def first(units: int) -> list[tuple[str, str]]:
            while len(pairs) < units:
                key = draw_new(lambda: random_word(rng), split, keys)
                pairs.append((key, draw(lambda: random_noun(rng), split)))
            return pairs[:units]

        def asked(units: int) -> tuple[str, str]:
            return first(units)[int(place * units)]

        def prompt(units: int) -> str:
            lines = [f"{key}: {value}" for key, value in first(units)]
            return "\n".join([*lines, f"{asked(units)[0]}:"])

        return _Probe(
            prompt, lambda units: (asked(units)[1],), lambda units: int(place * units) / (units - 1)
        )

    def score(self, sample: Sample, answer_text: str) -> dict[str, float]:
        """Return accuracy; see the class.

        Example:
            >>> sample = Sample("associative_recall", 64, 0, 0, "...", ("river",), 10, 64)
            >>> ASSOCIATIVE_RECALL.score(sample, " river\\nmute-cat: lake")
            {'accuracy': 1.0}
        """
        word = _WORD.search(answer_text)
        return {"accuracy": float(word is not None and word.group().lower() == sample.answers[0])}


class Copy(_RecallTask):
    """A line of random words, then its first three: the model is to go on with the next eight.

    The line of a length holds as many words as fit, so that what is copied lies a whole length back. Words of
    evaluation belong to the held-out split.

    Metrics:
        word_accuracy: Share of the eight words that are right, by position.
        exact: All of them are.
    """

    name = "copy"
    metrics: ClassVar[tuple[str, ...]] = ("word_accuracy", "exact")
    max_new_tokens: ClassVar[int] = 40
    least_units: ClassVar[int] = NUM_CUE_WORDS + NUM_COPIED_WORDS

    def draw_probe(self, rng: random.Random, split: Split) -> _Probe:
        """Return words without end, the first of which are asked for."""
        words: list[str] = []

        def first(units: int) -> list[str]:
            while len(words) < units:
                words.append(draw(lambda: random_noun(rng), split))
            return words[:units]

        def prompt(units: int) -> str:
            return " ".join(first(units)) + "\n" + " ".join(first(NUM_CUE_WORDS))

        def answers(units: int) -> tuple[str, ...]:
            return tuple(first(units)[NUM_CUE_WORDS : NUM_CUE_WORDS + NUM_COPIED_WORDS])

        return _Probe(prompt, answers, lambda units: None)

    def score(self, sample: Sample, answer_text: str) -> dict[str, float]:
        """Return word_accuracy and exact; see the class.

        Example:
            >>> sample = Sample("copy", 64, 0, 0, "...", ("river", "lake"), 40, 64)
            >>> COPY.score(sample, " river pond")
            {'word_accuracy': 0.5, 'exact': 0.0}
        """
        said = _WORD.findall(answer_text.lower())
        right = sum(ours == wanted for ours, wanted in zip(said, sample.answers, strict=False))
        return {
            "word_accuracy": right / len(sample.answers),
            "exact": float(right == len(sample.answers)),
        }


ASSOCIATIVE_RECALL = register_task(AssociativeRecall())
COPY = register_task(Copy())
