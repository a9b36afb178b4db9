"""The last word of passages: which passages, which words, and what counts as said."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from lawcat.errors import ConfigurationError, DataError
from lawcat.tasks import LAST_WORD, Sample, TextSource, builtin_source, get_task, last_word
from lawcat.tasks.sample import count_tokens


def make(tokenizer: Any, index: int, text: str | None = None, length: int = 64, **options: Any) -> Sample:
    if text is not None:
        options["haystack"] = TextSource("some", text)
    return LAST_WORD.generate(tokenizer, length, index, options.pop("seed", 0), **options)


def story(num_sentences: int) -> str:
    """Sentences that all end in another word."""
    letters = "abcdefghij"
    words = ["".join(letters[int(digit)] for digit in f"{number:04}") for number in range(num_sentences)]
    return " ".join(f"The people of the town went out to the {word}." for word in words)


@pytest.mark.parametrize(
    ("text", "prompt", "word"),
    [
        (
            'The door stood\nopen. "Come in," she said, "before the cold  does."',
            'The door stood open. "Come in," she said, "before the cold',
            "does",
        ),
        (
            "\nIt rained.\n\n  Mr. Brown wiped his feet and went into the\nold house...",
            "It rained.\n\nMr. Brown wiped his feet and went into the old",
            "house",
        ),
        (
            "Who is it? I do not know who it is, but Anna's arm-chair!",
            "Who is it? I do not know who it is, but Anna's",
            "arm-chair",
        ),
    ],
)
def test_golden_prompts(tokenizer: PreTrainedTokenizerFast, text: str, prompt: str, word: str) -> None:
    made = make(tokenizer, 0, text, length=40)
    assert (made.prompt, made.answers) == (prompt, (word,))
    assert made.num_tokens == count_tokens(tokenizer, prompt)
    assert made.metadata == {"sentences": 2, "mentioned": False, "haystack_repeats": 0}


def test_golden_passage_of_the_excerpt(tokenizer: PreTrainedTokenizerFast) -> None:
    made = make(tokenizer, 3, length=96)
    assert made.prompt.startswith("The objection to conforming to")
    assert made.answers == ("character",)
    whole = " ".join(builtin_source().text.split())
    assert f"{' '.join(made.prompt.split())} {made.answers[0]}." in whole


def test_same_arguments_same_sample_in_any_order(tokenizer: PreTrainedTokenizerFast) -> None:
    forwards = [make(tokenizer, index) for index in range(20)]
    last_word._known.clear()
    assert [make(tokenizer, index) for index in reversed(range(20))] == forwards[::-1]
    other = [make(tokenizer, index, seed=1) for index in range(20)]
    assert [one.prompt for one in other] != [one.prompt for one in forwards]


@pytest.mark.parametrize("length", [40, 64, 129, 256])
def test_length(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    starts = [sentence.strip() for sentence in last_word._sentences(builtin_source().text)]
    for index in range(40):
        made = make(tokenizer, index, length=length)
        assert length / 2 <= made.num_tokens <= length
        assert made.num_tokens == count_tokens(tokenizer, made.prompt)
        assert made.metadata["sentences"] >= 2
        assert made.prompt == made.prompt.strip()
        assert any(made.prompt.startswith(start[:30]) for start in starts)


def test_no_overlap_while_the_text_allows(tokenizer: PreTrainedTokenizerFast) -> None:
    text = " ".join(builtin_source().text.split())
    spans = []
    num_first = 0
    for index in range(150):
        made = make(tokenizer, index, text)
        if made.metadata["haystack_repeats"]:
            break
        num_first += 1
        assert text.count(made.prompt) == 1
        start = text.index(made.prompt)
        spans.append((start, start + len(made.prompt) + 1 + len(made.answers[0])))
    assert num_first > 100
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_a_short_text_is_cut_anew_and_then_used_up(tokenizer: PreTrainedTokenizerFast) -> None:
    text = story(40)
    found: list[Sample] = []

    def take_all() -> None:
        for index in range(41):
            found.append(make(tokenizer, index, text))

    with pytest.raises(
        DataError, match=r"'some' has \d+ passages of 32 to 64 tokens .* sample \d+ was asked"
    ):
        take_all()
    words = [made.answers[0] for made in found]
    assert len(set(words)) == len(words) > 20
    assert found[0].metadata["haystack_repeats"] == 0 < found[-1].metadata["haystack_repeats"]


def test_options(tokenizer: PreTrainedTokenizerFast) -> None:
    for index in range(20):
        made = make(tokenizer, index, length=128, min_letters=7)
        assert len(made.answers[0]) >= 7
        made = make(tokenizer, index, length=128, mentioned=True)
        assert made.metadata["mentioned"]
        assert re.search(rf"\b{made.answers[0]}\b", made.prompt, re.IGNORECASE)
    assert not all(make(tokenizer, index, length=128).metadata["mentioned"] for index in range(20))
    assert make(tokenizer, 0, "The bird sang. Then we went to see the Bird!", length=24, mentioned=True)
    with pytest.raises(DataError, match="which occurs earlier in them"):
        make(tokenizer, 0, "The birdsong rose. Then we went to see the bird!", length=24, mentioned=True)


@pytest.mark.parametrize(
    "ending",
    [
        "so it was.",  # a sentence of three words
        "there were twenty of 17.",
        "and it was done as by it.",
        "this is a sentence without an end",
        "he went out and saw--him.",
    ],
)
def test_sentences_that_cannot_be_asked(tokenizer: PreTrainedTokenizerFast, ending: str) -> None:
    with pytest.raises(DataError, match="has 0 passages of 8 to 17 tokens"):
        make(tokenizer, 0, f"It was a dark and stormy night, {ending[-1]}. {ending.capitalize()}", length=17)


def test_a_word_that_the_tokenizer_changes_is_not_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "The night was dark and cold. We went to see our friend Anna."
    assert make(tokenizer, 0, text, length=30).answers == ("Anna",)
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Lowercase()
    lower = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(DataError, match="has 0 passages"):
        make(lower, 0, text, length=30)


@pytest.mark.parametrize(
    ("word", "answer", "score"),
    [
        ("lamb", " lamb", 1),
        ("lamb", " lamb.", 1),
        ("lamb", "\n lamb\n", 1),
        ("lamb", "lamb, and so on", 1),
        ("lamb", " lamb--he said", 1),
        ("lamb", " lamb' ", 1),
        ("lamb", " Lamb.", 0),
        ("lamb", " lambs.", 0),
        ("lamb", " lamb's wool", 0),
        ("lamb", " lamb-like", 0),
        ("lamb", ", lamb.", 0),
        ("lamb", ' "lamb"', 0),
        ("lamb", " sheep or lamb.", 0),
        ("lamb", "", 0),
        ("arm-chair", " arm-chair.", 1),
        ("arm-chair", " arm chair.", 0),
        ("don't", " don't!", 1),
        ("don’t", " don’t!", 1),
        ("naïveté", " naïveté.", 1),
    ],
)
def test_metric(word: str, answer: str, score: float) -> None:
    sample = Sample("last_word", 64, 0, 0, "...", (word,), 4, 9)
    assert LAST_WORD.score(sample, answer) == {"accuracy": score}


@pytest.mark.parametrize(
    ("answer", "is_answered"),
    [
        ("", False),
        (" ", False),
        ("\n", False),
        (" l", False),
        (" lamb", False),
        (" lamb-", False),
        (" lamb'", False),
        (" na\ufffd", False),
        (" lamb.", True),
        (" lamb ", True),
        (" lamb--", True),
        (" lamb' ", True),
        (" lamb's", False),
        (" 7", True),
        (",", True),
        (' "', True),
    ],
)
def test_generation_stops_when_nothing_can_change(answer: str, is_answered: bool) -> None:
    sample = Sample("last_word", 64, 0, 0, "...", ("lamb",), 4, 9)
    assert LAST_WORD.is_answered(sample, answer) is is_answered
    if is_answered:
        before = LAST_WORD.score(sample, answer)
        assert all(LAST_WORD.score(sample, answer + more) == before for more in ("s", "'s", " a", "-x", "."))


def test_there_is_room_to_say_it(tokenizer: PreTrainedTokenizerFast) -> None:
    for index in range(20):
        made = make(tokenizer, index)
        said = tokenizer(f" {made.answers[0]}.", add_special_tokens=False).input_ids
        assert len(said) <= made.max_new_tokens <= len(said) + 3


def test_it_is_a_task_with_the_users_text() -> None:
    assert get_task("last_word") is LAST_WORD
    assert LAST_WORD.uses_prose
    assert LAST_WORD.resolve_options({})["haystack"] is builtin_source()


def test_errors(tokenizer: PreTrainedTokenizerFast) -> None:
    for options, message in (
        ({"min_letters": 0}, "min_letters is 0; it must be a whole number, at least 1"),
        ({"min_letters": True}, "min_letters is True"),
        ({"mentioned": "yes"}, "mentioned is 'yes'; it must be true or false"),
        ({"min_leters": 4}, "Did you mean 'min_letters'"),
        ({"split": "train"}, "no split 'train', only 'evaluation'"),
    ):
        with pytest.raises(ConfigurationError, match=re.escape(message)):
            make(tokenizer, 0, **options)
    with pytest.raises(ConfigurationError, match="length is 0"):
        make(tokenizer, 0, length=0)
    with pytest.raises(DataError, match="has 0 passages of 1 to 3 tokens"):
        make(tokenizer, 0, length=3)
    with pytest.raises(DataError, match="has 0 passages"):
        make(tokenizer, 0, "   \n\n ")
