"""The needle tasks of RULER with several needles, and training pairs of their forms."""

import hashlib
import random
import re
from collections import Counter

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from lawcat.errors import ConfigurationError, DataError
from lawcat.tasks import (
    NIAH_MULTIKEY_1,
    NIAH_MULTIKEY_2,
    NIAH_MULTIKEY_3,
    NIAH_MULTIQUERY,
    NIAH_MULTIVALUE,
    NIAH_SINGLE_2,
    TextSource,
    builtin_source,
    encode_pair,
    encode_pairs,
    get_task,
    held_out,
    niah_training_pair,
    niah_training_pairs,
)
from lawcat.tasks.context import Context, draw_places
from lawcat.tasks.needle import NeedleForm, draw_needles, needle_context
from lawcat.tasks.sample import sample_rng

IN_PROSE = [NIAH_MULTIKEY_1, NIAH_MULTIVALUE, NIAH_MULTIQUERY]
ALL = [*IN_PROSE, NIAH_MULTIKEY_2, NIAH_MULTIKEY_3]
NEEDLE = re.compile(r"One of the special magic (?P<kind>\w+) for (?P<key>\S+) is: (?P<value>\S+)\.")
PROSE = TextSource("prose", "First it rains. Then it pours. Now it stops. The sun comes out. " * 500)


def needles_in(prompt):
    return [match.groupdict() for match in NEEDLE.finditer(prompt)]


def test_golden_multikey_2(tokenizer):
    made = NIAH_MULTIKEY_2.generate(tokenizer, 330, 0, 0)
    assert made.answers == ("7073577",)
    assert made.prompt == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz "
        "you about the number afterwards.\n"
        "One of the special magic numbers for ruthless-transplantation is: 7073577.\n"
        "One of the special magic numbers for spicy-decimal is: 7853032.\n"
        "What is the special magic number for ruthless-transplantation mentioned in the provided text? "
        "The special magic number for ruthless-transplantation mentioned in the provided text is"
    )


def test_golden_multikey_3(tokenizer):
    made = NIAH_MULTIKEY_3.generate(tokenizer, 520, 0, 0)
    assert made.answers == ("92cb7677-0ffb-48b0-9dd7-aa2314fde8e8",)
    assert made.prompt == (
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the uuid afterwards.\n"
        "One of the special magic uuids for b742c369-66ce-4a94-8893-62c08e856196 is: "
        "92cb7677-0ffb-48b0-9dd7-aa2314fde8e8.\n"
        "One of the special magic uuids for 40712311-b7cd-464e-943e-b08ae3b78abb is: "
        "1d87775e-5be1-4aa6-9b57-be2178a91a32.\n"
        "What is the special magic uuid for b742c369-66ce-4a94-8893-62c08e856196 mentioned in the provided "
        "text? The special magic uuid for b742c369-66ce-4a94-8893-62c08e856196 mentioned in the provided "
        "text is"
    )


def test_golden_multikey_1(tokenizer):
    made = NIAH_MULTIKEY_1.generate(tokenizer, 460, 0, 0, haystack=PROSE)
    assert made.answers == ("3483019",)
    assert made.prompt == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz "
        "you about the number afterwards.\n"
        "First it rains. One of the special magic numbers for wanting-cameo is: 3483019. Then it pours. Now "
        "it stops. One of the special magic numbers for swanky-captain is: 8604596. The sun comes out. One "
        "of the special magic numbers for lewd-gown is: 6693529. First it rains. Then it pours. One of the "
        "special magic numbers for scientific-perpendicular is: 7368309. Now it stops. The sun comes out. "
        "First it rains. Then it pours. Now it\n"
        "What is the special magic number for wanting-cameo mentioned in the provided text? The special "
        "magic number for wanting-cameo mentioned in the provided text is"
    )


def test_golden_multivalue(tokenizer):
    made = NIAH_MULTIVALUE.generate(tokenizer, 460, 0, 0, haystack=PROSE)
    assert made.answers == ("1486794", "7234545", "3555869", "7366344")
    assert made.metadata["depths"] == [0.92, 0.08, 0.0, 0.23]
    assert made.prompt == (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will "
        "quiz you about the numbers afterwards.\n"
        " One of the special magic numbers for bad-suppression is: 3555869.  One of the special magic "
        "numbers for bad-suppression is: 7234545. First it rains. Then it pours. One of the special magic "
        "numbers for bad-suppression is: 7366344. Now it stops. The sun comes out. First it rains. Then it "
        "pours. Now it stops. The sun comes out. One of the special magic numbers for bad-suppression is: "
        "1486794. First it rains.\n"
        "What are all the special magic numbers for bad-suppression mentioned in the provided text? The "
        "special magic numbers for bad-suppression mentioned in the provided text are"
    )


def test_golden_multiquery(tokenizer):
    made = NIAH_MULTIQUERY.generate(tokenizer, 620, 0, 0, haystack=PROSE)
    assert made.answers == ("7541581", "4026365", "1398117", "6764831")
    assert made.metadata["depths"] == [0.33, 0.31, 0.77, 0.41]
    assert made.prompt == (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will "
        "quiz you about the numbers afterwards.\n"
        "First it rains. Then it pours. Now it stops. The sun comes out. First it rains. Then it pours. Now "
        "it stops. The sun comes out. One of the special magic numbers for agreeable-gobbler is: 4026365.  "
        "One of the special magic numbers for light-louse is: 7541581. First it rains. Then it pours. One of "
        "the special magic numbers for uninterested-service is: 6764831. Now it stops. The sun comes out. "
        "First it rains. Then it pours. Now it stops. The sun comes out. First it rains. Then it pours. Now "
        "it stops. The sun comes out. One of the special magic numbers for selfish-ficlet is: 1398117. First "
        "it rains. Then it pours. Now it stops. The sun comes out. First it rains. Then it\n"
        "What are all the special magic numbers for light-louse, agreeable-gobbler, selfish-ficlet, and "
        "uninterested-service mentioned in the provided text? The special magic numbers for light-louse, "
        "agreeable-gobbler, selfish-ficlet, and uninterested-service mentioned in the provided text are"
    )


@pytest.mark.parametrize("task", IN_PROSE)
def test_prompt_is_rulers(tokenizer, task):
    made = task.generate(tokenizer, 1200, 1, 0)
    found = needles_in(made.prompt)
    assert len(found) == 4
    asked = {
        NIAH_MULTIKEY_1: [made.metadata["key"]],
        NIAH_MULTIVALUE: [made.metadata["key"]],
        NIAH_MULTIQUERY: re.split(r", and |, ", made.metadata["key"]),
    }[task]
    value_of = {}
    for needle in found:
        assert needle["kind"] == "numbers"
        value_of.setdefault(needle["key"], []).append(needle["value"])
    assert Counter(made.answers) == Counter(value for key in asked for value in value_of[key])
    assert len(value_of) == (1 if task is NIAH_MULTIVALUE else 4)

    start, end = made.prompt.split("\n", 1)[0], made.prompt.rsplit("\n", 1)[1]
    if task is NIAH_MULTIKEY_1:
        assert start == (
            "A special magic number is hidden within the following text. Make sure to memorize it. I will "
            "quiz you about the number afterwards."
        )
        assert end == (
            f"What is the special magic number for {asked[0]} mentioned in the provided text? The special "
            f"magic number for {asked[0]} mentioned in the provided text is"
        )
    else:
        query = asked[0] if len(asked) == 1 else "{}, {}, {}, and {}".format(*asked)
        assert start == (
            "Some special magic numbers are hidden within the following text. Make sure to memorize it. I "
            "will quiz you about the numbers afterwards."
        )
        assert end == (
            f"What are all the special magic numbers for {query} mentioned in the provided text? The special "
            f"magic numbers for {query} mentioned in the provided text are"
        )
    text = NEEDLE.sub("", made.prompt.split("\n", 1)[1].rsplit("\n", 1)[0])
    assert text.split() == builtin_source().text.split()[: made.metadata["haystack_units"]]


def test_answers_of_several_queries_follow_the_order_of_asking(tokenizer):
    in_order_of_the_text = set()
    for index in range(8):
        made = NIAH_MULTIQUERY.generate(tokenizer, 700, index, 0)
        value_of = {needle["key"]: needle["value"] for needle in needles_in(made.prompt)}
        keys = re.split(r", and |, ", made.metadata["key"])
        assert made.answers == tuple(value_of[key] for key in keys)
        assert made.depth is None
        depths = made.metadata["depths"]
        assert [key for _, key in sorted(zip(depths, keys, strict=True))] == list(value_of)
        in_order_of_the_text.add(keys == list(value_of))
    assert False in in_order_of_the_text


def test_the_key_asked_for_stands_anywhere_among_the_others(tokenizer):
    ranks = set()
    for index in range(24):
        made = NIAH_MULTIKEY_1.generate(tokenizer, 700, index, 0)
        keys = [needle["key"] for needle in needles_in(made.prompt)]
        ranks.add(keys.index(made.metadata["key"]))
        place = made.prompt.index(f"for {made.metadata['key']} is:") / len(made.prompt)
        assert abs(place - made.depth) < 0.35
    assert ranks == {0, 1, 2, 3}


def test_needles_are_shuffled_as_rulers(tokenizer):
    """RULER shuffles the needles of each sample by `random.Random(42)`."""
    order = list(range(4))
    random.Random(42).shuffle(order)
    rng = sample_rng("niah_multivalue", 700, 0, 0)
    [needles] = draw_needles(rng, NeedleForm(num_values=4), "evaluation")
    made = NIAH_MULTIVALUE.generate(tokenizer, 700, 0, 0)
    assert made.answers == tuple(needle.value for needle in needles)
    assert [one["value"] for one in needles_in(made.prompt)] == [made.answers[index] for index in order]
    assert sorted(made.metadata["depths"]) == [made.metadata["depths"][index] for index in order]


def test_needles_in_prose_stand_between_sentences():
    context = Context(lambda units: ["A.", "B.", "C.", "D."][:units], is_prose=True, separator=" ")
    assert context.text(4, ["x", "y"], [0.0, 0.5]) == " x A. B. y C. D."
    assert context.text(4, ["x", "y", "z"], [0.5, 0.55, 1.0]) == "A. B. x  y C. D. z "
    lines = Context(lambda units: ["A", "B", "C", "D"][:units], is_prose=False)
    assert lines.text(4, ["x", "y", "z"], [0.0, 0.1, 0.9]) == "x\ny\nA\nB\nC\nz\nD"
    assert lines.text(0, ["x"], [0.7]) == "x"


def test_places_are_rulers():
    depths = {depth for seed in range(200) for depth in draw_places(random.Random(seed), True, 4)(99)}
    assert depths == {round(percent) / 100 for percent in np.linspace(0, 100, 40)}
    for seed in range(50):
        places = draw_places(random.Random(seed), False, 5)
        lines = [int(place * 12) for place in places(12)]
        assert lines == sorted(set(lines))
        assert places(12) == places(12)
        assert [int(place * 2) for place in places(2)] == sorted(int(place * 2) for place in places(2))
        assert all(0 <= int(place * 2) <= 2 for place in places(2))


@pytest.mark.parametrize("task", ALL)
@pytest.mark.parametrize("length", [900, 2048])
def test_binary_fit_fills_the_length(tokenizer, task, length):
    unit = {NIAH_MULTIKEY_2: 40, NIAH_MULTIKEY_3: 110}.get(task, 12)
    for index in range(4):
        made = task.generate(tokenizer, length, index, 0)
        assert made.num_tokens == len(tokenizer(made.prompt).input_ids)
        assert length - 128 - unit - 60 <= made.num_tokens <= length - 128 + 1
        assert made.max_new_tokens == 128
        assert all(made.prompt.count(answer) == 1 for answer in made.answers)


@pytest.mark.parametrize("task", ALL)
def test_linear_fit_goes_by_steps(tokenizer, task):
    for length in (2048, 4096):
        step = 500 if task in IN_PROSE else (25 if length == 4096 else 5)
        made = [task.generate(tokenizer, length, index, 0, fit="linear") for index in range(3)]
        for one in made:
            assert one.metadata["haystack_units"] % step == 0 < one.metadata["haystack_units"]
            assert one.num_tokens == len(tokenizer(one.prompt).input_ids)
            question = one.prompt[: one.prompt.rindex(" The special magic")]
            assert len(tokenizer(question).input_ids) + 128 <= length


def test_a_sample_too_long_loses_a_step_in_the_linear_fit(tokenizer):
    made = [NIAH_MULTIKEY_2.generate(tokenizer, 1140, index, 0, fit="linear") for index in range(8)]
    assert {one.metadata["haystack_units"] for one in made} == {20, 25}
    assert all(one.num_tokens == len(tokenizer(one.prompt).input_ids) for one in made)


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("niah_multikey_1", (781, 1465, 3442)),
        ("niah_multikey_2", (812, 1900, 3711)),
        ("niah_multikey_3", (603, 1814, 2216)),
        ("niah_multivalue", (787, 1472, 3448)),
        ("niah_multiquery", (823, 1508, 3482)),
    ],
)
def test_linear_fit_with_mistral_gives_the_harness_lengths(mistral, name, means):
    """What lm-evaluation-harness 0.4.13 makes of the same pages: mean prompt tokens at 1K, 2K and 4K."""
    for length, mean in zip((1024, 2048, 4096), means, strict=True):
        made = [get_task(name).generate(mistral, length, index, 0, fit="linear") for index in range(4)]
        assert np.mean([one.num_tokens for one in made]) == pytest.approx(mean, abs=14)


@pytest.mark.parametrize(("task", "kind"), [(NIAH_MULTIKEY_2, "numbers"), (NIAH_MULTIKEY_3, "uuids")])
def test_a_haystack_of_needles(tokenizer, task, kind):
    for split in ("evaluation", "train"):
        made = task.generate(tokenizer, 2048, 2, 0, split=split)
        found = needles_in(made.prompt)
        lines = made.prompt.split("\n")[1:-1]
        assert len(found) == len(lines) == made.metadata["haystack_units"] + 1
        assert {needle["kind"] for needle in found} == {kind}
        for part in ("key", "value"):
            parts = [needle[part] for needle in found]
            assert len(set(parts)) == len(parts)
            assert {held_out(value) for value in parts} == {split == "evaluation"}
        [right] = [n for n, needle in enumerate(found) if needle["key"] == made.metadata["key"]]
        assert made.answers == (found[right]["value"],)
        assert right == int(made.depth * made.metadata["haystack_units"])
        assert made.metadata["haystack_repeats"] == 0


def test_a_haystack_of_needles_begins_alike_whatever_its_size():
    taken = {"mute-cat"}
    context = needle_context(random.Random(0), NeedleForm(), "train", taken)
    long = context.pieces(30)
    again = needle_context(random.Random(0), NeedleForm(), "train", set())
    assert context.pieces(7) == long[:7] == again.pieces(7)
    assert len(taken) == 61


def test_any_task_takes_any_haystack(tokenizer):
    noise = NIAH_MULTIQUERY.generate(tokenizer, 1000, 0, 0, haystack="noise")
    assert noise.prompt.count("\nThe grass is green.") > 10
    assert len(needles_in(noise.prompt)) == 4
    among = NIAH_SINGLE_2.generate(tokenizer, 1000, 0, 0, haystack="needle")
    assert len(needles_in(among.prompt)) > 10
    short = TextSource("short", "Nothing happens here today. " * 20)
    prose = NIAH_MULTIKEY_2.generate(tokenizer, 1000, 0, 0, haystack=short)
    assert len(needles_in(prose.prompt)) == 1
    assert prose.metadata["haystack_repeats"] == (prose.metadata["haystack_units"] - 1) // 80 > 0
    for task in IN_PROSE:
        made = task.generate(tokenizer, 1000, 0, 0, haystack=short)
        assert made.metadata["haystack_repeats"] == (made.metadata["haystack_units"] - 1) // 80 > 0


def test_described_options_tell_the_haystacks_apart():
    names = [task.resolve_options({})["haystack"].describe()["name"] for task in ALL]
    assert names == ["emerson-excerpt"] * 3 + ["needle"] * 2
    assert [task.uses_prose for task in ALL] == [True] * 3 + [False] * 2


def test_partial_answers_score_in_part_and_do_not_end_the_generation(tokenizer):
    made = NIAH_MULTIVALUE.generate(tokenizer, 700, 0, 0)
    first, second, third, fourth = made.answers
    for text, score in (
        (f" {first}, {third}", 0.5),
        (f" {first} {second} {third} {fourth[:-1]}", 0.75),
        (f" {fourth}\n{third}\t{second}, and {first}.", 1.0),
        (" none", 0.0),
    ):
        assert NIAH_MULTIVALUE.score(made, text) == {"string_match_all": score}
        assert NIAH_MULTIVALUE.is_answered(made, text) is (score == 1.0)


def test_same_arguments_same_sample_and_another_seed_another(tokenizer):
    for task in ALL:
        assert task.generate(tokenizer, 700, 3, 5) == task.generate(tokenizer, 700, 3, 5)
        assert len({task.generate(tokenizer, 700, 3, seed).answers for seed in range(4)}) == 4


def test_too_short_a_length_says_what_is_needed(tokenizer):
    with pytest.raises(DataError, match=r"which does not fit in 300. Ask for a length of at least 4\d\d "):
        NIAH_MULTIQUERY.generate(tokenizer, 300, 0, 0)


@pytest.mark.parametrize(
    "form",
    [
        {"haystack": "noise"},
        {"haystack": "noise", "kind": "uuids"},
        {"haystack": "needle", "kind": "uuids", "key_kind": "uuids"},
        {"haystack": "needle"},
        {"num_keys": 4},
        {"num_keys": 3, "num_queries": 2, "kind": "words"},
        {"num_values": 4},
        {"haystack": "noise", "num_keys": 4, "num_queries": 4},
    ],
)
def test_training_pairs_of_every_form(tokenizer, form):
    for index in range(4):
        prompt, answer = niah_training_pair(tokenizer, PROSE.text, 900, index, 0, **form)
        assert (prompt, answer) == niah_training_pair(tokenizer, PROSE.text, 900, index, 0, **form)
        tokens, start = encode_pair(tokenizer, prompt, answer)
        assert 900 - 130 <= len(tokens) <= 900
        assert tokenizer.decode(tokens[start:]) == answer
        found = needles_in(prompt)
        assert not any(held_out(needle[part]) for needle in found for part in ("key", "value"))
        hidden = form.get("num_keys", 1) * form.get("num_values", 1)
        assert len(found) == hidden or (len(found) > 5 and form.get("haystack") == "needle")
        assert ("\nThe grass is green." in prompt) == (form.get("haystack") == "noise")
        asked = re.search(r".* for (.+) mentioned in the provided text (is|are)$", prompt).group(1)
        keys = re.split(r", and |, ", asked)
        wanted = [n["value"] for key in keys for n in found if n["key"] == key]
        assert len(wanted) == form.get("num_queries", 1) * form.get("num_values", 1)
        said = re.split(r", and |, ", answer.strip(" ."))
        assert sorted(said) == sorted(wanted)
        if len(keys) > 1:
            assert said == wanted


@pytest.mark.parametrize("haystack", ["prose", "noise", "needle"])
@pytest.mark.parametrize(("num_keys", "num_queries", "questions"), [(4, 1, 4), (5, 2, 3), (3, 1, 2)])
def test_further_questions_about_other_needles(tokenizer, haystack, num_keys, num_queries, questions):
    form = {"haystack": haystack, "num_keys": num_keys, "num_queries": num_queries}
    for index in range(3):
        pairs = niah_training_pairs(tokenizer, PROSE.text, 900, index, 0, questions=questions, **form)
        alone = niah_training_pair(tokenizer, PROSE.text, 900, index, 0, **form)
        assert (pairs[0][1], pairs[0][0].rsplit("\n", 1)[1]) == (alone[1], alone[0].rsplit("\n", 1)[1])
        tokens, spans = encode_pairs(tokenizer, pairs)
        assert 770 <= len(tokens) <= 900
        assert [tokenizer.decode(tokens[start:end]) for start, end in spans] == [said for _, said in pairs]
        value_of = {needle["key"]: needle["value"] for needle in needles_in(pairs[0][0])}
        asked = []
        for prompt, said in pairs[1:]:
            line = (
                r"\nWhat is the special magic number for (\S+) mentioned in the provided text\? "
                r"The special magic number for \1 mentioned in the provided text is"
            )
            asked.append(re.fullmatch(line, prompt).group(1))
            assert said == f" {value_of[asked[-1]]}."
        assert len(set(asked)) == questions - 1
        assert not any(key in pairs[0][0].rsplit("\n", 1)[1] for key in asked)


def test_too_many_questions_for_the_keys(tokenizer):
    for questions, form in (
        (5, {"num_keys": 4}),
        (3, {"num_keys": 3, "num_queries": 2}),
        (0, {}),
        (True, {}),
    ):
        with pytest.raises(
            ConfigurationError, match=r"questions is .* from 1 to \d, since \d keys are hidden"
        ):
            niah_training_pairs(tokenizer, PROSE.text, 900, 0, 0, questions=questions, **form)


def test_one_question_a_text_is_as_ever():
    """By a hash of what was given before there were further questions."""
    digest = hashlib.sha256()
    for index in range(3):
        for haystack in ("prose", "noise", "needle"):
            for num_keys in (1, 3):
                form = {"haystack": haystack, "num_keys": num_keys}
                made = niah_training_pair(ByT5Tokenizer(), builtin_source().text, 2500, index, 0, **form)
                digest.update("|".join(made).encode())
    assert digest.hexdigest()[:16] == "385ac98049742929"


def test_training_pairs_in_noise_need_no_text(tokenizer):
    prompt, answer = niah_training_pair(tokenizer, "", 500, 0, 0, haystack="noise")
    assert answer.strip(" .") in prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"haystack": "nois"}, r"haystack is 'nois'.*Did you mean 'noise'"),
        ({"key_kind": "letters"}, "key_kind is 'letters'"),
        ({"num_keys": 0}, "num_keys is 0; it must be a whole number, at least 1"),
        ({"num_values": True}, "num_values is True"),
        ({"num_queries": 2}, "num_queries is 2, more than the 1 keys that are hidden. Set num_keys"),
        ({"num_keys": 11, "num_values": 4}, "num_keys x num_values is 44; prose has places for at most 40"),
    ],
)
def test_impossible_training_options(tokenizer, options, message):
    with pytest.raises(ConfigurationError, match=message):
        niah_training_pair(tokenizer, PROSE.text, 500, 0, 0, **options)
