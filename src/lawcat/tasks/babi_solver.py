"""Answers to bAbI's questions, from the text of the facts alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product

from lawcat.errors import DataError
from lawcat.tasks.babi import (
    ACTORS,
    BABI_TASKS,
    GIVING_ACTORS,
    OBJECTS,
    OPPOSITES,
    PLACES,
    BabiTask,
    Fact,
    parse_fact,
)
from lawcat.tasks.sample import choose


@dataclass(frozen=True)
class Solution:
    """An answer and what it follows from.

    Args:
        answer: One word.
        supports: Numbers of facts, from 0, in the order of the published files.
    """

    answer: str
    supports: tuple[int, ...]


def solve(facts: Sequence[str], question: str) -> Solution:
    """Return the answer to a question of bAbI's tasks qa1 to qa5.

    Args:
        facts: The sentences before the question.
        question: The question.

    Returns:
        The answer. Where two facts would do, the later one counts.

    Raises:
        DataError: if a fact or the question has another form, or the facts do not tell the answer.

    Example:
        >>> solve(["Mary got the milk.", "Mary went to the office."], "Where is the milk?")
        Solution(answer='office', supports=(0, 1))
    """
    solution = _solve([parse_fact(fact) for fact in facts], question)
    if solution is None:
        raise DataError(f"The {len(facts)} facts do not tell the answer to {question!r}.")
    return solution


def solve_all(task: BabiTask, facts: Sequence[str]) -> dict[str, Solution]:
    """Return every question of a task that the facts answer, with its answer.

    These are more than a story of the task asks: it never asks for what is carried before its bearer moved,
    nor in qa3 for what came before an object was last taken.

    Args:
        task: `"qa1"` to `"qa5"`.
        facts: Sentences.

    Returns:
        Questions in a fixed order, each with what `solve` says.

    Raises:
        ConfigurationError: for another task.
        DataError: if a sentence has another form.

    Example:
        >>> solve_all("qa2", ["Mary got the milk.", "Mary went to the office."])
        {'Where is the milk?': Solution(answer='office', supports=(0, 1))}
    """
    choose(task, BABI_TASKS, "task")
    parsed = [parse_fact(fact) for fact in facts]
    solved = ((question, _solve(parsed, question)) for question in _possible_questions(task))
    return {question: solution for question, solution in solved if solution is not None}


def _possible_questions(task: BabiTask) -> Iterator[str]:
    if task == "qa1":
        yield from (f"Where is {actor}?" for actor in ACTORS)
    elif task == "qa2":
        yield from (f"Where is the {thing}?" for thing in OBJECTS)
    elif task == "qa3":
        yield from (f"Where was the {thing} before the {place}?" for thing, place in product(OBJECTS, PLACES))
    elif task == "qa4":
        for direction, place in product(OPPOSITES, PLACES):
            yield f"What is {direction} of the {place}?"
            yield f"What is the {place} {direction} of?"
    else:
        for thing in OBJECTS:
            yield from (f"Who gave the {thing}?", f"Who received the {thing}?")
        for giver, receiver in permutations(GIVING_ACTORS, 2):
            yield f"What did {giver} give to {receiver}?"
        for thing, actor in product(OBJECTS, GIVING_ACTORS):
            yield from (f"Who gave the {thing} to {actor}?", f"Who did {actor} give the {thing} to?")


def _solve(parsed: list[Fact], question: str) -> Solution | None:
    for pattern, answer in _QUESTIONS:
        match = re.fullmatch(pattern, question.strip())
        if match:
            return answer(parsed, *match.groups())
    raise DataError(
        f"The question {question!r} is none of bAbI's tasks qa1 to qa5, such as 'Where is the apple?'"
    )


def _actor_place(facts: list[Fact], actor: str) -> Solution | None:
    for number in reversed(range(len(facts))):
        fact = facts[number]
        if fact.kind == "move" and fact.subject == actor:
            return Solution(fact.target, (number,))
    return None


def _object_place(facts: list[Fact], thing: str) -> Solution | None:
    for number in reversed(range(len(facts))):
        fact = facts[number]
        if fact.kind != "move" and fact.target == thing:
            if fact.kind == "drop":
                place = _actor_place(facts[:number], fact.subject)
            else:
                place = _actor_place(facts, fact.receiver or fact.subject)
            return Solution(place.answer, (number, *place.supports)) if place else None
    return None


def _object_place_before(facts: list[Fact], thing: str, place: str) -> Solution | None:
    holder: str | None = None
    handled = -1
    known: dict[str, tuple[str, int]] = {}
    history: list[tuple[str, int]] = []
    for number, fact in enumerate(facts):
        if fact.kind == "move":
            known[fact.subject] = (fact.target, number)
            if fact.subject == holder:
                history.append((fact.target, number))
        elif fact.target == thing:
            holder, handled = (fact.subject if fact.kind == "get" else fact.receiver), number
            here = known.get(fact.subject)
            if here and (not history or history[-1][0] != here[0]):
                history.append(here)
    for last in reversed(range(1, len(history))):
        if history[last][0] == place:
            answer, number = history[last - 1]
            return Solution(answer, (handled, history[last][1], number))
    return None


def _place_towards(facts: list[Fact], direction: str, place: str) -> Solution | None:
    for number, fact in enumerate(facts):
        if (fact.kind, fact.target) == (direction, place):
            return Solution(fact.subject, (number,))
        if (fact.kind, fact.subject) == (OPPOSITES[direction], place):
            return Solution(fact.target, (number,))
    return None


def _place_that_has(facts: list[Fact], place: str, direction: str) -> Solution | None:
    return _place_towards(facts, OPPOSITES[direction], place)


def _last_give(
    facts: list[Fact],
    answer: Callable[[Fact], str | None],
    *,
    giver: str | None = None,
    thing: str | None = None,
    receiver: str | None = None,
) -> Solution | None:
    wanted = (giver, thing, receiver)
    for number in reversed(range(len(facts))):
        fact = facts[number]
        found = (fact.subject, fact.target, fact.receiver)
        if fact.kind == "give" and all(
            one is None or one == other for one, other in zip(wanted, found, strict=True)
        ):
            word = answer(fact)
            assert word is not None
            return Solution(word, (number,))
    return None


def _given(facts: list[Fact], giver: str, receiver: str) -> Solution | None:
    return _last_give(facts, lambda fact: fact.target, giver=giver, receiver=receiver)


def _giver(facts: list[Fact], thing: str, receiver: str | None = None) -> Solution | None:
    return _last_give(facts, lambda fact: fact.subject, thing=thing, receiver=receiver)


def _receiver(facts: list[Fact], thing: str) -> Solution | None:
    return _last_give(facts, lambda fact: fact.receiver, thing=thing)


def _receiver_from(facts: list[Fact], giver: str, thing: str) -> Solution | None:
    return _last_give(facts, lambda fact: fact.receiver, giver=giver, thing=thing)


_QUESTIONS: tuple[tuple[str, Callable[..., Solution | None]], ...] = (
    (r"Where is the (\w+)\?", _object_place),
    (r"Where is (\w+)\?", _actor_place),
    (r"Where was the (\w+) before the (\w+)\?", _object_place_before),
    (r"What is (north|south|east|west) of the (\w+)\?", _place_towards),
    (r"What is the (\w+) (north|south|east|west) of\?", _place_that_has),
    (r"What did (\w+) give to (\w+)\?", _given),
    (r"Who gave the (\w+)(?: to (\w+))?\?", _giver),
    (r"Who received the (\w+)\?", _receiver),
    (r"Who did (\w+) give the (\w+) to\?", _receiver_from),
)
