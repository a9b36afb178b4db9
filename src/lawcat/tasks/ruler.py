"""What RULER's tasks share: a question around a context of any size, its fit to a length, and the metric.

Source: NVIDIA/RULER (arXiv 2404.06654), `scripts/data/synthetic` and `scripts/eval/synthetic/constants.py`;
the linear fit as lm-evaluation-harness has it, `lm_eval/tasks/ruler`.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import WeakKeyDictionary

from lawcat.errors import DataError
from lawcat.tasks.context import Context, sentences_of
from lawcat.tasks.haystack import TextSource, resolve_source
from lawcat.tasks.round_trip import require_round_trip
from lawcat.tasks.sample import Sample, SampleRequest, Task, choose, count_tokens, fit_units

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Fit = Literal["binary", "linear"]
Overflow = Literal["trim", "step"]


class Question(ABC):
    """A question with its answers, around a context whose size is still open.

    A unit is a word where the context is prose, else a line.

    Attributes:
        answers: What the continuation must hold.
        context: What surrounds the answers.
    """

    answers: tuple[str, ...]
    context: Context

    @abstractmethod
    def prompt(self, units: int) -> str:
        """Return what the model continues, with a context of so many units."""

    @abstractmethod
    def linear_texts(self, units: int, is_probe: bool) -> tuple[str, ...]:
        """Return the texts whose tokens the linear fit adds up.

        Args:
            units: Size of the context.
            is_probe: Whether the length is being searched for, or a sample of it checked:
                lm-evaluation-harness counts the answers in the first case only.
        """

    @abstractmethod
    def depth(self, units: int) -> float | None:
        """Return where the answer stands, 0 to 1, or None where there are several."""

    @abstractmethod
    def describe(self, units: int) -> dict[str, Any]:
        """Return what a sample's metadata says of this question."""


@dataclass(frozen=True)
class _Filling:
    """How contexts of one length are filled."""

    tokenizer: PreTrainedTokenizerBase
    length: int
    limit: int  # tokens of a prompt
    step: int
    linear: bool

    def tokens(self, question: Question, units: int, is_probe: bool = False) -> int:
        """Return the tokens of a question as its fit counts them: the binary one without special tokens."""
        if self.linear:
            texts = question.linear_texts(units, is_probe)
            return sum(count_tokens(self.tokenizer, text) for text in texts)
        return count_tokens(self.tokenizer, question.prompt(units)) - num_special_tokens(self.tokenizer)

    def most_units(self, question: Question, tokens_a_unit: float) -> int:
        """Return the units with which a question fits, whole steps of them in the linear fit."""
        step = self.step if self.linear else 1

        def count(steps: int) -> int:
            return self.tokens(question, steps * step, is_probe=True)

        steps = fit_units(count, self.limit, estimate=round(self.limit / (tokens_a_unit * step)))
        if steps < 0:
            raise too_short(self.length, count(0) + self.length - self.limit)
        if self.linear and steps == 0:
            raise DataError(
                f"A length of {self.length} tokens cannot hold one step of the linear fit ({step} words or "
                f"lines, {count(1) + self.length - self.limit} tokens in all). Use fit='binary', or a "
                "greater length."
            )
        return steps * step

    def fit(self, question: Question, units: int, by_step: bool) -> tuple[int, int]:
        """Return how many units, at most `units`, a question has room for, and its tokens with them."""
        while True:
            tokens = self.tokens(question, units)
            if tokens <= self.limit:
                return units, tokens
            if units == 0:
                raise too_short(self.length, tokens + self.length - self.limit)
            if by_step and units > self.step:
                units -= self.step
            else:
                units = max(0, units - math.ceil((tokens - self.limit) * units / tokens))


class RulerTask(Task):
    """A task of RULER.

    Options:
        haystack: What the answers are hidden in: a `TextSource`, `"noise"`, `"emerson-excerpt"`, a path or a
            glob, `"hf:owner/name"`. None means the task's own; where that is prose, it is the built-in one
            (RULER takes Paul Graham's essays, which cannot be shipped).
        fit: How a nominal length of L tokens is filled; room for the answer is always kept free. `"binary"`,
            RULER since June 2025: the most words of prose (or lines) with which the whole prompt fits,
            special tokens not counted. `"linear"`, RULER before and lm-evaluation-harness: in steps of 500
            words or 25 lines (5 below 4,096 tokens; variable tracking 10 lines), needles counted without the
            answer's beginning; so at 1,024 tokens prose has 500 words. Published numbers of 2024 and early
            2025 mean `"linear"`.
        overflow: What becomes of a sample in the binary fit whose own keys and values make it too long.
            `"trim"`: it loses as many words as it must. `"step"`, as in RULER: it loses a whole step, which
            at 1,024 tokens leaves a tenth of the text. In the linear fit it always loses a step.

    Metric:
        string_match_all: Share of the answers that occur in the continuation, upper and lower case alike.

    Where a step less is nothing at all, RULER's code loops for ever; ours trims.
    """

    metrics: ClassVar[tuple[str, ...]] = ("string_match_all",)
    default_options: ClassVar[Mapping[str, Any]] = {"haystack": None, "fit": "binary", "overflow": "trim"}
    max_new_tokens: ClassVar[int]
    haystack: str
    value_kinds: tuple[str, ...]
    tokens_a_line: float = 24.0

    @abstractmethod
    def ask(self, request: SampleRequest) -> Question:
        """Return the question of this request, drawn from `request.rng()`."""

    @abstractmethod
    def step(self, options: Mapping[str, Any], length: int) -> int:
        """Return how many words or lines RULER adds or takes away at a time."""

    def resolve_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options with defaults filled in, the haystack as a `TextSource`."""
        chosen = super().resolve_options(options)
        source = chosen["haystack"]
        chosen["haystack"] = self.resolve_haystack(self.haystack if source is None else source)
        choose(chosen["fit"], ("binary", "linear"), "fit")
        choose(chosen["overflow"], ("trim", "step"), "overflow")
        return chosen

    def resolve_haystack(self, spec: Any) -> TextSource:
        """Return the source that the option `haystack` stands for."""
        return resolve_source(spec)

    def make(self, request: SampleRequest) -> Sample:
        """Return one prompt; see the class for the options."""
        tokenizer, options, length = request.tokenizer, request.options, request.length
        require_round_trip(tokenizer, self.value_kinds)
        linear = options["fit"] == "linear"
        step = self.step(options, length)
        filling = _Filling(tokenizer, length, length - self.max_new_tokens, step, linear)
        question = self.ask(request)
        units, tokens = filling.fit(
            question,
            self._units_of_length(filling, request),
            by_step=linear or options["overflow"] == "step",
        )
        repeats = sentences_of(options["haystack"], units)[1] if question.context.is_prose else 0
        return request.sample(
            question.prompt(units),
            question.answers,
            self.max_new_tokens,
            # The linear fit counts other texts than the prompt.
            num_tokens=None if linear else tokens + num_special_tokens(tokenizer),
            depth=question.depth(units),
            metadata={
                **question.describe(units),
                "haystack_units": units,
                "haystack_repeats": repeats,
            },
        )

    def score(self, sample: Sample, answer_text: str) -> dict[str, float]:
        """Return `string_match_all`; see the class.

        Example:
            >>> from lawcat.tasks import NIAH_SINGLE_1
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

    def _units_of_length(self, filling: _Filling, request: SampleRequest) -> int:
        """Return how many words or lines all samples of a length start from: found once, by a probe."""
        known = _fitted.setdefault(request.tokenizer, {})
        options = request.options
        told = [(name, value) for name, value in options.items() if name not in ("haystack", "overflow")]
        source = options["haystack"].sha256
        key = (self.name, source, request.length, request.seed, request.split, *told)
        if key not in known:
            probe = self.ask(replace(request, index=-1))
            tokens_a_unit = 1.35 if probe.context.is_prose else self.tokens_a_line
            known[key] = filling.most_units(probe, tokens_a_unit)
        return known[key]


# By tokenizer and what else decides: how many words or lines a length holds.
_fitted: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[object, ...], int]] = WeakKeyDictionary()


def num_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens the tokenizer puts around every text."""
    return int(tokenizer.num_special_tokens_to_add(pair=False))


def too_short(length: int, needed: int) -> DataError:
    """Return the error for a length that cannot hold a question, naming one that can."""
    return DataError(
        f"The question, what it asks for and the room for its answer take {needed} tokens without any text "
        f"around them, which does not fit in {length}. Ask for a length of at least {needed} tokens."
    )
