"""Variable tracking: which variables hold a value, through a chain of assignments hidden in noise.

Source: NVIDIA/RULER (arXiv 2404.06654), `scripts/data/synthetic/variable_tracking.py` and `constants.py`;
the form of lm-evaluation-harness, `lm_eval/tasks/ruler/vt_utils.py`.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import WeakKeyDictionary

from lawcat.tasks.context import Context, Places, draw_places, is_noise, noise_context, prose_context
from lawcat.tasks.haystack import NOISE_SENTENCE, TextSource
from lawcat.tasks.ruler import Question, RulerTask, num_special_tokens
from lawcat.tasks.sample import (
    SampleRequest,
    Split,
    choose,
    count_tokens,
    fit_units,
    register_task,
    sample_rng,
)
from lawcat.tasks.words import draw_new

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Form = Literal["ruler", "lm_eval"]

NUM_HOPS = 4
NAME_LETTERS = 5
EXAMPLE_NAME_LETTERS = 3
EXAMPLE_TOKENS = 500

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
# "assgined" is how RULER had it at first, and how lm-evaluation-harness has it still.
ANSWER_PREFIX: dict[Form, str] = {
    "ruler": " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables "
    "are assigned the value {query}, they are: ",
    "lm_eval": " Answer: According to the chain(s) of variable assignment in the text above, {num_v} "
    "variables are assgined the value {query}, they are: ",
}


@dataclass(frozen=True)
class Chain:
    """Variables of which the first is given a value and each other the one before it.

    Args:
        names: The variables.
        value: What they all hold.

    Example:
        >>> Chain(("ABC", "XYZ"), "12345").assignments
        ['VAR ABC = 12345', 'VAR XYZ = VAR ABC ']
    """

    names: tuple[str, ...]
    value: str

    @property
    def assignments(self) -> list[str]:
        """One line each; all but the first end in a space, as RULER's do."""
        pairs = zip(self.names[1:], self.names[:-1], strict=True)
        return [f"VAR {self.names[0]} = {self.value}", *(f"VAR {name} = VAR {old} " for name, old in pairs)]


class ChainQuestion(Question):
    """Which variables hold the value of a chain, after an example of the same kind.

    Args:
        chain: What is hidden and asked for.
        context: What surrounds it.
        places: Where its assignments go.
        form: Whose wording it is.
        example: The text in front of the question.
    """

    def __init__(self, chain: Chain, context: Context, places: Places, form: Form, example: str = "") -> None:
        self.answers = chain.names
        self.context = context
        self._chain = chain
        self._places = places
        self._form: Form = form
        self._example = example

    def prompt(self, units: int) -> str:
        """Return the example and the question, up to where the names begin."""
        if self._form == "lm_eval":
            # Its harness strips the beginning of the answer and puts a space in front.
            return f"{self._example}{self._question(units)} {self._prefix.strip()}"
        return self._example + self._question(units) + self._prefix

    def solved(self, units: int) -> str:
        """Return the question with its answer, as an example of another."""
        return f"{self._question(units)}{self._prefix} {' '.join(self.answers)}"

    def linear_texts(self, units: int, is_probe: bool) -> tuple[str, ...]:
        """Return the example and the question; in the search with a Python list of the names at its end."""
        said = f" {list(self.answers)}" if is_probe else ""
        example = (self._example,) if self._example else ()
        return (*example, self._question(units) + self._prefix + said)

    def depth(self, units: int) -> float | None:
        """Return None: a chain stands in several places."""
        return None

    def describe(self, units: int) -> dict[str, Any]:
        """Return the value asked for and the depths of the assignments."""
        return {"key": self._chain.value, "depths": [min(place, 1.0) for place in self._places(units)]}

    @property
    def _prefix(self) -> str:
        return ANSWER_PREFIX[self._form].format(num_v=len(self.answers), query=self._chain.value)

    def _question(self, units: int) -> str:
        lines = self._chain.assignments
        if self.context.is_prose:
            lines = [f"{line.strip()}." for line in lines]
        return TEMPLATE.format(
            context=self.context.text(units, lines, self._places(units)), query=self._chain.value
        )


class VariableTracking(RulerTask):
    """RULER's variable tracking: one chain of four hops, with one solved example in front.

    Options beside those of `RulerTask`:
        form: `"ruler"`: a line for each assignment and each noise sentence, as RULER has it today.
            `"lm_eval"`: as RULER had it in 2024 and lm-evaluation-harness has it: assignments run on into
            the noise, a misspelled word, and a space less at the end. None means `"ruler"` with the binary
            fit and `"lm_eval"` with the linear one.

    The example takes about 500 tokens, so lengths begin at about 700.
    """

    name = "vt"
    max_new_tokens: ClassVar[int] = 30
    default_options: ClassVar[Mapping[str, Any]] = {**RulerTask.default_options, "form": None}
    haystack = "noise"
    value_kinds = ("capitals",)

    def resolve_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options with defaults filled in."""
        chosen = super().resolve_options(options)
        if chosen["form"] is None:
            chosen["form"] = "lm_eval" if chosen["fit"] == "linear" else "ruler"
        choose(chosen["form"], ("ruler", "lm_eval"), "form")
        return chosen

    def step(self, options: Mapping[str, Any], length: int) -> int:
        """Return 10 lines (in RULER's form 5 below 4,096 tokens), or 500 words."""
        if not is_noise(options["haystack"]):
            return 500
        return 5 if options["form"] == "ruler" and length < 4096 else 10

    def ask(self, request: SampleRequest) -> ChainQuestion:
        """Return the question of this request, with its example."""
        rng, split = request.rng(), request.split
        source, form = request.options["haystack"], request.options["form"]
        taken: set[str] = set()
        chain = _draw_chain(rng, split, NAME_LETTERS, taken)
        places = draw_places(rng, not is_noise(source), NUM_HOPS + 1)
        layout = _example_layout(request.tokenizer, source, request.seed, split, form)
        shown = _draw_chain(rng, split, EXAMPLE_NAME_LETTERS, taken)
        if form == "lm_eval":
            shown = Chain(shown.names, layout.value)  # there only the names change from sample to sample
        example = ChainQuestion(shown, _context(source, form), layout.places, form).solved(layout.units)
        example += "\n\n" if form == "ruler" else "\n\n\n\n"
        return ChainQuestion(chain, _context(source, form), places, form, example)


VARIABLE_TRACKING = register_task(VariableTracking())


@dataclass(frozen=True)
class _ExampleLayout:
    """What the example has in common in all samples of a seed."""

    units: int
    places: Places
    value: str


_layouts: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[object, ...], _ExampleLayout]] = (
    WeakKeyDictionary()
)


def _example_layout(
    tokenizer: PreTrainedTokenizerBase, source: TextSource, seed: int, split: Split, form: Form
) -> _ExampleLayout:
    """Return the layout of an example of at most 500 tokens."""
    known = _layouts.setdefault(tokenizer, {})
    key = (source.sha256, seed, split, form)
    if key in known:
        return known[key]
    rng = sample_rng("vt-example", EXAMPLE_TOKENS, -1, seed, split)
    chain = _draw_chain(rng, split, EXAMPLE_NAME_LETTERS, set())
    places = draw_places(rng, not is_noise(source), NUM_HOPS + 1)
    question = ChainQuestion(chain, _context(source, form), places, form)
    if form == "ruler":
        step, reserved = 1, num_special_tokens(tokenizer)
    else:
        step, reserved = 5, -VariableTracking.max_new_tokens

    def count(steps: int) -> int:
        texts = (question.prompt(steps),) if form == "ruler" else question.linear_texts(steps * step, True)
        return sum(count_tokens(tokenizer, text) for text in texts) - reserved

    units = max(0, fit_units(count, EXAMPLE_TOKENS, estimate=16 // step)) * step
    known[key] = _ExampleLayout(units, places, chain.value)
    return known[key]


def _draw_chain(rng: random.Random, split: Split, letters: int, taken: set[str]) -> Chain:
    def name() -> str:
        return "".join(rng.choices(string.ascii_uppercase, k=letters))

    names = tuple(draw_new(name, split, taken) for _ in range(NUM_HOPS + 1))
    return Chain(names, draw_new(lambda: str(rng.randrange(10000, 99999)), split, taken))


def _context(source: TextSource, form: Form) -> Context:
    if not is_noise(source):
        return prose_context(source)
    if form == "ruler":
        return noise_context()
    return Context(lambda units: [f"{NOISE_SENTENCE}\n"] * units, is_prose=False, separator=" ")
