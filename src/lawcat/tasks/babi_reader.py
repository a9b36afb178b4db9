"""Reading the published text files of bAbI."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lawcat.errors import DataError
from lawcat.tasks.babi import BabiTask, Question, Story
from lawcat.tasks.haystack import TextSource, read_texts


def find_babi_file(directory: str | os.PathLike[str], task: BabiTask) -> Path:
    """Return the file of a task in a folder of bAbI.

    That is `qa2_*_train.txt`, which BABILong is made of, or `qa2_*_test.txt` if only that is there.

    Args:
        directory: A folder of the published archive, such as `tasks_1-20_v1-2/en-10k`.
        task: `"qa1"` to `"qa5"`.

    Returns:
        Its path.

    Raises:
        DataError: if there is no such file, or more than one.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise DataError(
            f"There is no folder {folder}. Give a folder of bAbI, such as tasks_1-20_v1-2/en-10k."
        )
    for split in ("train", "test"):
        pattern = f"{task}_*_{split}.txt"
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise DataError(f"{folder} holds several files of {task}: {names}. Leave one.")
        if found:
            return found[0]
    below = sorted({str(path.parent.relative_to(folder)) for path in folder.rglob(f"{task}_*_train.txt")})
    hint = f" There are such files in its folders {', '.join(below)}: name one." if below else ""
    raise DataError(
        f"{folder} holds no {task}_*_train.txt.{hint or ' Give a folder of bAbI, such as en-10k.'}"
    )


def babi_source(directory: str | os.PathLike[str], task: BabiTask) -> TextSource:
    """Return a task's file as a text with its name and hash, for results to record.

    Args:
        directory: As for `find_babi_file`.
        task: `"qa1"` to `"qa5"`.

    Returns:
        The file's text; `parse_stories` reads it.

    Raises:
        DataError: as `find_babi_file`, or if the file is empty or unreadable.
    """
    path = find_babi_file(directory, task)
    return TextSource(path.name, "".join(read_texts(path)))


def read_stories(path: str | os.PathLike[str]) -> list[Story]:
    """Return the stories of one file of bAbI.

    Args:
        path: A file of lines `ID sentence` and `ID question<tab>answer<tab>supporting IDs`; an ID of 1 begins
            a story.

    Returns:
        The stories, in order.

    Raises:
        DataError: if the file is missing, empty or not of this form, with the number of the line.
    """
    return parse_stories("".join(read_texts(path)), os.path.basename(path))


def parse_stories(text: str, name: str) -> list[Story]:
    """Return the stories of a text in bAbI's format.

    Args:
        text: As in the files.
        name: What messages call it.

    Returns:
        The stories, in order.

    Raises:
        DataError: for a line of another form, naming it.

    Example:
        >>> story, = parse_stories("1 Mary went to the office.\\n2 Where is Mary? \\toffice\\t1\\n", "x.txt")
        >>> story.questions[0].answer
        'office'
    """
    stories = [_parse_story(lines, name) for lines in _story_lines(text, name)]
    if not stories:
        raise DataError(
            f"{name} holds no story. Give a file of bAbI such as qa1_single-supporting-fact_train.txt."
        )
    return stories


def _story_lines(text: str, name: str) -> Iterator[list[tuple[int, str]]]:
    """Yield each story's lines without their IDs, with their numbers in the file."""
    lines: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        identifier, _, rest = line.partition(" ")
        if not identifier.isdecimal() or not rest.strip():
            raise _malformed(name, number, f"{line[:60]!r} is not an ID, a space and a sentence")
        if identifier == "1":
            if lines:
                yield lines
            lines = []
        if int(identifier) != len(lines) + 1:
            raise _malformed(
                name, number, f"the ID is {identifier} where {len(lines) + 1} or 1 should follow"
            )
        lines.append((number, rest))
    if lines:
        yield lines


def _parse_story(lines: Iterable[tuple[int, str]], name: str) -> Story:
    facts: list[str] = []
    fact_of_id: dict[int, int] = {}
    questions: list[Question] = []
    number = 0
    for identifier, (number, rest) in enumerate(lines, start=1):
        fields = [field.strip() for field in rest.split("\t")]
        if len(fields) == 1:
            fact_of_id[identifier] = len(facts)
            facts.append(fields[0])
            continue
        if len(fields) != 3 or not all(fields):
            raise _malformed(name, number, "a question needs an answer and supporting IDs, with tabs between")
        text, answer, listed = fields
        supports = []
        for word in listed.split():
            if not word.isdecimal() or int(word) not in fact_of_id:
                raise _malformed(name, number, f"the supporting ID {word!r} is no fact before the question")
            supports.append(fact_of_id[int(word)])
        questions.append(Question(text, answer, len(facts), tuple(supports)))
    if not questions:
        raise _malformed(name, number, "a story ends here without a question")
    return Story(tuple(facts), tuple(questions))


def _malformed(name: str, number: int, what: str) -> DataError:
    return DataError(f"{name}, line {number}: {what}.")
