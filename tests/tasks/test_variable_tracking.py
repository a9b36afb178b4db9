import re
from itertools import pairwise

import numpy as np
import pytest

from lawcat.errors import ConfigurationError, DataError
from lawcat.tasks import VARIABLE_TRACKING, TextSource, builtin_source, held_out
from lawcat.tasks.variable_tracking import Chain

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
FIRST_LINE = "Memorize and track the chain(s) of variable assignment hidden in the following text."


ANSWERS = ("TTEIJ", "ONJEK", "FRMYF", "OSATJ", "BUVXO")
GOLDEN = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
    "\n"
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    "VAR PRI = 57260\n"
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    "VAR UFM = VAR PRI \n"
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    "VAR UDK = VAR UFM \n"
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    "VAR RWJ = VAR UDK \n"
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    "VAR KVR = VAR RWJ \n"
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    "Question: Find all variables that are assigned the value 57260 in the text above. Answer: Accord"
    "ing to the chain(s) of variable assignment in the text above, 5 variables are assigned the value"
    " 57260, they are:  PRI UFM UDK RWJ KVR\n"
    "\n"
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
    "\n"
    "VAR TTEIJ = 98017\n"
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    "VAR ONJEK = VAR TTEIJ \n"
    "VAR FRMYF = VAR ONJEK \n"
    "VAR OSATJ = VAR FRMYF \n"
    "VAR BUVXO = VAR OSATJ \n"
    "Question: Find all variables that are assigned the value 98017 in the text above. Answer: Accord"
    "ing to the chain(s) of variable assignment in the text above, 5 variables are assigned the value"
    " 98017, they are: "
)
LINEAR_ANSWERS = ("OXNCC", "WBYXV", "VZPEZ", "LACOO", "AFJXS")
LINEAR_GOLDEN = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
    "\n"
    "VAR MUT = 40277 The grass is green. The sky is blue. The sun is yellow. Here we go. There and ba"
    "ck again.\n"
    " VAR QFI = VAR MUT  The grass is green. The sky is blue. The sun is yellow. Here we go. There an"
    "d back again.\n"
    " VAR BTM = VAR QFI  The grass is green. The sky is blue. The sun is yellow. Here we go. There an"
    "d back again.\n"
    " VAR WFL = VAR BTM  The grass is green. The sky is blue. The sun is yellow. Here we go. There an"
    "d back again.\n"
    " VAR GAQ = VAR WFL  The grass is green. The sky is blue. The sun is yellow. Here we go. There an"
    "d back again.\n"
    "\n"
    "Question: Find all variables that are assigned the value 40277 in the text above. Answer: Accord"
    "ing to the chain(s) of variable assignment in the text above, 5 variables are assgined the value"
    " 40277, they are:  MUT QFI BTM WFL GAQ\n"
    "\n"
    "\n"
    "\n"
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
    "\n"
    "VAR OXNCC = 24283 The grass is green. The sky is blue. The sun is yellow. Here we go. There and "
    "back again.\n"
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    " VAR WBYXV = VAR OXNCC  The grass is green. The sky is blue. The sun is yellow. Here we go. Ther"
    "e and back again.\n"
    " VAR VZPEZ = VAR WBYXV  The grass is green. The sky is blue. The sun is yellow. Here we go. Ther"
    "e and back again.\n"
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    " VAR LACOO = VAR VZPEZ  The grass is green. The sky is blue. The sun is yellow. Here we go. Ther"
    "e and back again.\n"
    " VAR AFJXS = VAR LACOO  The grass is green. The sky is blue. The sun is yellow. Here we go. Ther"
    "e and back again.\n"
    "\n"
    "Question: Find all variables that are assigned the value 24283 in the text above. Answer: Accord"
    "ing to the chain(s) of variable assignment in the text above, 5 variables are assgined the value"
    " 24283, they are:"
)


def halves(made):
    """The example and the question."""
    example, question = made.prompt.split(FIRST_LINE)[1:]
    return FIRST_LINE + example, FIRST_LINE + question


def test_golden_prompt(tokenizer):
    made = VARIABLE_TRACKING.generate(tokenizer, 800, 0, 0)
    assert made.answers == ANSWERS
    assert made.prompt == GOLDEN


def test_golden_prompt_of_the_harness(tokenizer):
    """Line for line the form that lm-evaluation-harness 0.4.13 prints."""
    made = VARIABLE_TRACKING.generate(tokenizer, 1300, 0, 0, fit="linear")
    assert made.answers == LINEAR_ANSWERS
    assert made.prompt == LINEAR_GOLDEN


def test_ruler_form(tokenizer):
    made = VARIABLE_TRACKING.generate(tokenizer, 2048, 3, 1)
    example, question = halves(made)
    assert example.endswith("\n\n")
    for text, ends in ((example, r" (?P<said>[A-Z ]+)\n\n"), (question, "")):
        letters = 3 if ends else 5
        found = re.fullmatch(
            re.escape(FIRST_LINE)
            + r"\n\n(?P<context>.*)\nQuestion: Find all variables that are assigned the "
            r"value (?P<value>\d{5}) in the text above\. Answer: According to the chain\(s\) of variable "
            r"assignment in the text above, 5 variables are assigned the value (?P=value), they are: " + ends,
            text,
            re.DOTALL,
        )
        lines = [line for line in found["context"].split("\n") if line != NOISE]
        names = re.findall(rf"VAR ([A-Z]{{{letters}}}) = ", found["context"])
        assert len(set(names)) == 5
        assert lines[0] == f"VAR {names[0]} = {found['value']}"
        assert lines[1:] == [f"VAR {new} = VAR {old} " for old, new in pairwise(names)]
        if ends:
            assert found["said"].split() == names
        else:
            assert made.answers == tuple(names)
    places = [i for i, line in enumerate(question.split("\n")[2:-1]) if line != NOISE]
    assert [place - i for i, place in enumerate(places)] == [
        int(depth * made.metadata["haystack_units"]) for depth in made.metadata["depths"]
    ]


def test_example_keeps_its_lines_and_changes_its_names(tokenizer):
    examples = [
        halves(VARIABLE_TRACKING.generate(tokenizer, length, index, 0))[0]
        for length, index in ((900, 0), (900, 1), (2048, 2))
    ]
    assert len({re.findall(r"VAR [A-Z]{3} = (\d+)", text)[0] for text in examples}) == 3
    assert len({re.sub(r"\b[A-Z]{3}\b|\d{5}", "x", re.sub("VAR", "var", text)) for text in examples}) == 1
    assert 440 < len(tokenizer(examples[0]).input_ids) < 520


def test_harness_form_keeps_the_value_of_its_example(tokenizer):
    made = [VARIABLE_TRACKING.generate(tokenizer, 1500, index, 0, fit="linear") for index in range(3)]
    values = {re.search(r"VAR [A-Z]{3} = (\d+)", one.prompt).group(1) for one in made}
    names = {re.search(r"VAR ([A-Z]{3}) = \d+", one.prompt).group(1) for one in made}
    assert (len(values), len(names)) == (1, 3)


@pytest.mark.parametrize("length", [800, 1024, 2048, 4096])
def test_binary_fit_fills_the_length(tokenizer, length):
    unit = len(tokenizer(f"\n{NOISE}").input_ids)
    for index in range(4):
        made = VARIABLE_TRACKING.generate(tokenizer, length, index, 0)
        assert made.num_tokens == len(tokenizer(made.prompt).input_ids)
        assert length - 30 - unit - 20 <= made.num_tokens <= length - 30 + 1
        assert made.max_new_tokens == 30
        assert made.depth is None


def test_linear_fit_with_mistral_gives_the_harness_lengths(mistral):
    """What lm-evaluation-harness 0.4.13 makes: mean prompt tokens and, in lines of noise, 10, 50 and 140."""
    for length, mean, lines in ((1024, 781, 10), (2048, 1778, 50), (4096, 4030, 140)):
        made = [VARIABLE_TRACKING.generate(mistral, length, index, 0, fit="linear") for index in range(4)]
        assert np.mean([one.num_tokens for one in made]) == pytest.approx(mean, abs=8)
        assert {one.metadata["haystack_units"] for one in made} == {lines}


def test_form_can_be_chosen_apart_from_the_fit(tokenizer):
    assert VARIABLE_TRACKING.resolve_options({})["form"] == "ruler"
    assert VARIABLE_TRACKING.resolve_options({"fit": "linear"})["form"] == "lm_eval"
    lines = VARIABLE_TRACKING.generate(tokenizer, 1500, 0, 0, fit="linear", form="ruler")
    assert lines.metadata["haystack_units"] % 5 == 0
    assert "are assigned the value" in lines.prompt.rsplit("\n", 1)[1]
    runs_on = VARIABLE_TRACKING.generate(tokenizer, 1500, 0, 0, form="lm_eval")
    assert runs_on.prompt.endswith("they are:")
    assert f"{NOISE}\n {NOISE}\n" in runs_on.prompt
    with pytest.raises(ConfigurationError, match=r"form is 'rular'.*Did you mean 'ruler'"):
        VARIABLE_TRACKING.generate(tokenizer, 1500, 0, 0, form="rular")
    with pytest.raises(ConfigurationError, match=r"no option 'forms'.*Did you mean 'form'"):
        VARIABLE_TRACKING.generate(tokenizer, 1500, 0, 0, forms="ruler")


def test_chain_in_prose(tokenizer):
    made = VARIABLE_TRACKING.generate(tokenizer, 2048, 0, 0, haystack="emerson-excerpt")
    names = made.answers
    assert f" VAR {names[1]} = VAR {names[0]}." in made.prompt
    context = halves(made)[1].split("\n\n")[1].rsplit("\nQuestion", 1)[0]
    words = re.sub(r"VAR \w+ = (VAR )?\w+\.", "", context).split()
    assert words == builtin_source().text.split()[: made.metadata["haystack_units"]]
    short = TextSource("short", "Nothing happens here today. " * 20)
    repeated = VARIABLE_TRACKING.generate(tokenizer, 2048, 0, 0, haystack=short)
    assert repeated.metadata["haystack_repeats"] == (repeated.metadata["haystack_units"] - 1) // 80 > 0


def test_values_belong_to_their_split(tokenizer):
    for split in ("evaluation", "train"):
        made = VARIABLE_TRACKING.generate(tokenizer, 1024, 1, 2, split=split)
        assert {held_out(name) for name in made.answers} == {split == "evaluation"}
        assert made == VARIABLE_TRACKING.generate(tokenizer, 1024, 1, 2, split=split)
    assert len({VARIABLE_TRACKING.generate(tokenizer, 1024, 1, seed).answers for seed in range(4)}) == 4


def test_score_and_end(tokenizer):
    made = VARIABLE_TRACKING.generate(tokenizer, 1024, 0, 0)
    text = " ".join(made.answers)
    assert VARIABLE_TRACKING.score(made, f"{text}\n\nMemorize") == {"string_match_all": 1.0}
    assert VARIABLE_TRACKING.score(made, text[:-1].lower()) == {"string_match_all": 0.8}
    assert VARIABLE_TRACKING.is_answered(made, text)
    assert not VARIABLE_TRACKING.is_answered(made, text[:-1])


def test_chain():
    chain = Chain(("AB", "CD", "EF"), "12345")
    assert chain.assignments == ["VAR AB = 12345", "VAR CD = VAR AB ", "VAR EF = VAR CD "]


def test_too_short_a_length_says_what_is_needed(tokenizer):
    with pytest.raises(
        DataError, match=r"which does not fit in 500. Ask for a length of at least 7\d\d tokens"
    ):
        VARIABLE_TRACKING.generate(tokenizer, 500, 0, 0)
    with pytest.raises(DataError, match=r"cannot hold one step of the linear fit .10 words or lines"):
        VARIABLE_TRACKING.generate(tokenizer, 900, 0, 0, fit="linear")
