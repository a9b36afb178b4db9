"""From which length on a model beats another, and from which it loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lawcat.evaluation.lengths import format_length
from lawcat.evaluation.results import Payload, cells_by_length, task_names

HOW_COMPARED = (
    "A model beats another at a length where its 95% interval (Wilson) lies wholly above the other's, and "
    "loses where it lies wholly below. Ahead and behind compare the two accuracies alone, however near."
)


@dataclass(frozen=True)
class Difference:
    """Two models at one length of a task.

    Args:
        length: Nominal length in tokens.
        points: Accuracy of the model less that of the baseline, in percentage points.
        apart: Whether the two 95% intervals do not overlap.
    """

    length: int
    points: float
    apart: bool


@dataclass(frozen=True)
class Comparison:
    """A model against a baseline on a task, at the lengths that both were measured at.

    Args:
        task: Name of the task.
        model: Name of the model.
        baseline: Name of what it is compared with.
        differences: Shortest length first.
    """

    task: str
    model: str
    baseline: str
    differences: tuple[Difference, ...]

    @property
    def first_beats(self) -> int | None:
        """The shortest length at which the model's interval lies wholly above the baseline's, or None."""
        return self._first(lambda one: one.apart and one.points > 0)

    @property
    def first_loses(self) -> int | None:
        """The shortest length at which the model's interval lies wholly below the baseline's, or None."""
        return self._first(lambda one: one.apart and one.points < 0)

    @property
    def first_ahead(self) -> int | None:
        """The shortest length at which the model's accuracy is above the baseline's, or None."""
        return self._first(lambda one: one.points > 0)

    @property
    def first_behind(self) -> int | None:
        """The shortest length at which the model's accuracy is below the baseline's, or None."""
        return self._first(lambda one: one.points < 0)

    def _first(self, holds: Callable[[Difference], bool]) -> int | None:
        return next((one.length for one in self.differences if holds(one)), None)


def compare_models(payloads: Sequence[Payload]) -> list[Comparison]:
    """Return, task by task, every student against every baseline, and against the students after it.

    Students are the models whose results say `"kind": "student"`. Where all or none say so, every other model
    is compared with the first.

    Args:
        payloads: Results, one a model.

    Returns:
        In the order of tasks, students, baselines; without pairs that share no length.
    """
    comparisons = []
    for task in task_names(payloads):
        for model, baseline in _pairs(payloads):
            ours, theirs = cells_by_length(model, task), cells_by_length(baseline, task)
            differences = []
            for length, cell in ours.items():
                other = theirs.get(length)
                if other is None or cell["accuracy"] is None or other["accuracy"] is None:
                    continue
                (low, high), (other_low, other_high) = cell["ci95"], other["ci95"]
                differences.append(
                    Difference(
                        length,
                        100 * (cell["accuracy"] - other["accuracy"]),
                        low > other_high or high < other_low,
                    )
                )
            if differences:
                comparisons.append(Comparison(task, model["model"], baseline["model"], tuple(differences)))
    return comparisons


def comparison_notes(payloads: Sequence[Payload]) -> list[str]:
    """Return, a sentence each, where models were not asked the same questions.

    Args:
        payloads: Results, one a model.
    """
    notes = []
    for model, baseline in _pairs(payloads):
        names = f"{model['model']} and {baseline['model']}"
        if model.get("seed") != baseline.get("seed"):
            seeds = f"{model.get('seed')} and {baseline.get('seed')}"
            notes.append(f"{names} were asked different questions: their seeds are {seeds}.")
            continue
        for task in task_names([model]):
            theirs = cells_by_length(baseline, task)
            for length, cell in cells_by_length(model, task).items():
                other = theirs.get(length)
                if other is None:
                    continue
                where = f"{task} at {format_length(length)}"
                if cell.get("options") != other.get("options"):
                    notes.append(f"{names} were asked different questions: options of {where} differ.")
                elif (asked := _asked(cell)) != (also := _asked(other)):
                    notes.append(f"{names} were asked {asked} and {also} questions of {where}.")
    return notes


def _asked(cell: Payload) -> int:
    return int(cell["samples"]) + int(cell.get("errors", 0))


def _pairs(payloads: Sequence[Payload]) -> list[tuple[Payload, Payload]]:
    students = [payload for payload in payloads if payload.get("kind") == "student"]
    baselines = [payload for payload in payloads if payload.get("kind") != "student"]
    if not students or not baselines:
        return [(payload, payloads[0]) for payload in payloads[1:]]
    return [
        (student, other)
        for number, student in enumerate(students, start=1)
        for other in [*baselines, *students[number:]]
    ]
