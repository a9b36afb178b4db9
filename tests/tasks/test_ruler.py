"""The two fits of RULER, with a tokenizer whose tokens can be counted by hand."""

from types import SimpleNamespace

import pytest

from lawcat.errors import DataError
from lawcat.tasks.context import Context
from lawcat.tasks.needle import Needle, NeedleQuestion
from lawcat.tasks.ruler import Question, _Filling
from lawcat.tasks.variable_tracking import Chain, ChainQuestion

LINES = Context(lambda units: ["noise"] * units, is_prose=False)


class Words:
    """A token a word, and one in front."""

    def __call__(self, text, **options):
        return SimpleNamespace(input_ids=[0, *text.split()])

    def num_special_tokens_to_add(self, pair):
        return 1


class Stub(Question):
    """Ten words and two for each unit; an answer of three words that only the linear search counts."""

    answers = ("a b c",)
    context = LINES

    def prompt(self, units):
        return "w " * (10 + 2 * units)

    def linear_texts(self, units, is_probe):
        return (self.prompt(units), *(("a b c",) if is_probe else ()))

    def depth(self, units):
        return None

    def describe(self, units):
        return {}


def filling(limit, step, linear):
    return _Filling(Words(), limit + 5, limit, step, linear)


@pytest.mark.parametrize(("limit", "units"), [(10, 0), (11, 0), (12, 1), (49, 19), (50, 20)])
def test_binary_fit_takes_the_most_units_and_counts_no_special_tokens(limit, units):
    assert filling(limit, 5, linear=False).most_units(Stub(), 3.0) == units
    assert filling(limit, 5, linear=False).fit(Stub(), 25, by_step=False) == (units, 10 + 2 * units)


@pytest.mark.parametrize(("limit", "units"), [(25, 5), (34, 5), (35, 10), (44, 10), (45, 15)])
def test_linear_fit_takes_whole_steps_and_counts_answer_and_special_tokens(limit, units):
    # 1 + 10 + 2 a unit, then 1 + 3 for the answer: 35 for ten units.
    assert filling(limit, 5, linear=True).most_units(Stub(), 3.0) == units


def test_a_sample_too_long_loses_a_step_or_what_it_must():
    # 25 units take 60 words, of which 50 fit.
    assert filling(50, 7, linear=False).fit(Stub(), 25, by_step=True) == (18, 46)
    assert filling(50, 7, linear=False).fit(Stub(), 25, by_step=False) == (20, 50)
    assert filling(51, 7, linear=True).fit(Stub(), 25, by_step=True) == (18, 47)
    # A step less would be nothing, so it is trimmed.
    assert filling(18, 7, linear=False).fit(Stub(), 7, by_step=True) == (4, 18)


def test_impossible_lengths():
    with pytest.raises(DataError, match=r"take 15 tokens without any text around them, .* fit in 14"):
        filling(9, 5, linear=False).most_units(Stub(), 3.0)
    with pytest.raises(
        DataError, match=r"length of 29 tokens cannot hold one step .*5 words or lines, 30 tokens"
    ):
        filling(24, 5, linear=True).most_units(Stub(), 3.0)


def test_what_the_linear_fit_counts_of_needles():
    needles = [[Needle("numbers", "mute-cat", "1234567"), Needle("numbers", "mute-cat", "7654321")]]
    question = NeedleQuestion(needles, [0], LINES, lambda units: [0.5, 0.5])
    asked = question.prompt(2).removesuffix(question.answer_prefix)
    assert asked.endswith(" mentioned in the provided text?")
    assert question.linear_texts(2, is_probe=False) == (asked,)
    assert question.linear_texts(2, is_probe=True) == (f"{asked}1234567 7654321",)


def test_what_the_linear_fit_counts_of_chains():
    question = ChainQuestion(
        Chain(("AB", "CD"), "12345"), LINES, lambda units: [0.0, 0.5], "lm_eval", "shown\n"
    )
    prompt = question.prompt(2)
    assert prompt.startswith("shown\nMemorize and track")
    assert prompt.endswith("they are:")
    assert question.linear_texts(2, is_probe=False) == ("shown\n", prompt.removeprefix("shown\n") + " ")
    assert question.linear_texts(2, is_probe=True)[1].endswith("they are:  ['AB', 'CD']")
    assert question.solved(2).endswith("they are:  AB CD")


def test_trimming_does_not_loop_where_nothing_helps():
    class Stubborn(Stub):
        def prompt(self, units):
            return "w " * 100

    with pytest.raises(DataError, match="take 105 tokens"):
        filling(50, 5, linear=False).fit(Stubborn(), 40, by_step=True)
