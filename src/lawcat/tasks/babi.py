"""bAbI's little world: its facts, stories and questions as text.

Source: Weston et al., "Towards AI-Complete Question Answering" (arXiv 1502.05698), tasks 1 to 5 of version
    1.2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from lawcat.errors import DataError

BabiTask = Literal["qa1", "qa2", "qa3", "qa4", "qa5"]
FactKind = Literal["move", "get", "drop", "give", "north", "south", "east", "west"]

BABI_TASKS: tuple[BabiTask, ...] = get_args(BabiTask)

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
ACTORS = ("Daniel", "John", "Mary", "Sandra")
GIVING_ACTORS = ("Bill", "Fred", "Jeff", "Mary")
"""Who acts in qa5, where objects change hands."""

MOVE_VERBS = ("journeyed", "moved", "travelled", "went", "went back")
GET_VERBS = ("got", "grabbed", "picked up", "took")
DROP_VERBS = ("discarded", "dropped", "left", "put down")
GIVE_VERBS = ("gave", "handed", "passed")

OPPOSITES = {"north": "south", "south": "north", "east": "west", "west": "east"}


@dataclass(frozen=True)
class Fact:
    """What one sentence says.

    Args:
        kind: What happened, or for two places in which direction of the second the first is.
        subject: Who did it, or the first place.
        target: The place gone to, the object handled, or the second place.
        receiver: Who was given the object.

    Example:
        >>> parse_fact("Fred passed the milk to Jeff.")
        Fact(kind='give', subject='Fred', target='milk', receiver='Jeff')
    """

    kind: FactKind
    subject: str
    target: str
    receiver: str | None = None


@dataclass(frozen=True)
class Question:
    """A question about the facts before it.

    Args:
        text: The question, no white space around it.
        answer: One word.
        num_facts: How many of the story's facts come before it.
        supports: Which of them, from 0, the answer follows from, in the order of the published files.
    """

    text: str
    answer: str
    num_facts: int
    supports: tuple[int, ...]


@dataclass(frozen=True)
class Story:
    """Facts in the order they happen, and questions in between.

    Args:
        facts: Sentences.
        questions: At least one, in order.
    """

    facts: tuple[str, ...]
    questions: tuple[Question, ...]


def _alternatives(words: tuple[str, ...]) -> str:
    # The longest first: "went" would leave the "back" of "went back".
    return "|".join(sorted(words, key=len, reverse=True))


_FACTS: tuple[tuple[FactKind, re.Pattern[str]], ...] = (
    ("move", re.compile(rf"(\w+) (?:{_alternatives(MOVE_VERBS)}) to the (\w+)\.")),
    ("get", re.compile(rf"(\w+) (?:{_alternatives(GET_VERBS)}) the (\w+)(?: there)?\.")),
    ("drop", re.compile(rf"(\w+) (?:{_alternatives(DROP_VERBS)}) the (\w+)(?: there)?\.")),
    ("give", re.compile(rf"(\w+) (?:{_alternatives(GIVE_VERBS)}) the (\w+) to (\w+)\.")),
)
_RELATION = re.compile(r"The (\w+) is (north|south|east|west) of the (\w+)\.")


def parse_fact(text: str) -> Fact:
    """Return what a sentence of qa1 to qa5 says.

    Args:
        text: One sentence.

    Returns:
        The fact.

    Raises:
        DataError: for a sentence of another form.

    Example:
        >>> parse_fact("The office is north of the bedroom.").kind
        'north'
    """
    for kind, pattern in _FACTS:
        if match := pattern.fullmatch(text.strip()):
            return Fact(kind, *match.groups())
    if match := _RELATION.fullmatch(text.strip()):
        subject, direction, target = match.groups()
        return Fact(_DIRECTIONS[direction], subject, target)
    raise DataError(
        f"The fact {text!r} is none of bAbI's tasks qa1 to qa5, such as 'John went to the office.'"
    )


_DIRECTIONS: dict[str, FactKind] = {"north": "north", "south": "south", "east": "east", "west": "west"}
