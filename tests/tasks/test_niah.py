import re
import time
import uuid

import numpy as np
import pytest

from lawcat.errors import ConfigurationError, DataError
from lawcat.tasks import (
    NIAH_SINGLE_1,
    NIAH_SINGLE_2,
    NIAH_SINGLE_3,
    TASKS,
    Sample,
    TextSource,
    builtin_source,
    encode_pair,
    get_task,
    held_out,
    niah_training_pair,
)
from lawcat.tasks.context import DEPTHS, prose_context
from lawcat.tasks.needle import NeedleForm, draw_needles
from lawcat.tasks.sample import sample_rng

ALL = [NIAH_SINGLE_1, NIAH_SINGLE_2, NIAH_SINGLE_3]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def test_noise_prompt_is_rulers(tokenizer):
    made = NIAH_SINGLE_1.generate(tokenizer, 600, 0, 0)
    key, value = made.metadata["key"], made.answers[0]
    lines = [NOISE] * made.metadata["haystack_units"]
    lines.insert(int(made.depth * len(lines)), f"One of the special magic numbers for {key} is: {value}.")
    context = "\n".join(lines)
    assert len(lines) > 3
    assert made.prompt == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz "
        f"you about the number afterwards.\n{context}\nWhat is the special magic number for {key} mentioned "
        f"in the provided text? The special magic number for {key} mentioned in the provided text is"
    )


@pytest.mark.parametrize(
    ("place", "context"),
    [
        (0.0, " NEEDLE One is here. Mr. Two went. Three?"),
        (0.5, "One is here. NEEDLE Mr. Two went. Three?"),
        (0.99, "One is here. Mr. Two went. NEEDLE Three?"),
        (1.0, "One is here. Mr. Two went. Three? NEEDLE "),
    ],
)
def test_prose_keeps_sentences_and_takes_the_needle_between_two(place, context):
    source = TextSource("three", "One is here.\n\nMr. Two  went. Three? Four.")
    [[needle]] = draw_needles(sample_rng("x", 1, 0, 0), NeedleForm("uuids"), "evaluation")
    assert needle.sentence == f"One of the special magic uuids for {needle.key} is: {needle.value}."
    assert prose_context(source).text(7, [needle.sentence], [place]) == context.replace(
        "NEEDLE", needle.sentence
    )


def test_prose_prompt_is_rulers(tokenizer):
    made = NIAH_SINGLE_3.generate(tokenizer, 1000, 0, 0)
    key, value = made.metadata["key"], made.answers[0]
    needle = f"One of the special magic uuids for {key} is: {value}."
    start, end = made.prompt.split(needle)
    assert start.startswith(
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the uuid afterwards.\n"
    )
    assert end.endswith(
        f"\nWhat is the special magic uuid for {key} mentioned in the provided text? The special magic uuid "
        f"for {key} mentioned in the provided text is"
    )
    words = builtin_source().text.split()[: made.metadata["haystack_units"]]
    assert start.split("\n", 1)[1].split() + end.rsplit("\n", 1)[0].split() == words


def test_depths_are_rulers():
    assert list(DEPTHS) == np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int).tolist()


def test_values_have_rulers_form():
    rng = sample_rng("x", 1, 0, 0)
    for split in ("evaluation", "train"):
        for _ in range(100):
            kinds = ("numbers", "words", "uuids")
            needles = [draw_needles(rng, NeedleForm(kind), split)[0][0] for kind in kinds]
            number, word, identifier = (needle.value for needle in needles)
            assert re.fullmatch(r"[1-9]\d{6}", number)
            assert re.fullmatch(r"\S+-\S+", word)
            assert uuid.UUID(identifier).version == 4
            for needle in needles:
                assert held_out(needle.key) == held_out(needle.value) == (split == "evaluation")


@pytest.mark.parametrize(
    ("answers", "text", "score"),
    [
        (("1234567",), " 1234567.", 1.0),
        (("1234567",), " it\x00is\n 91234567", 1.0),
        (("ABcd-12",), "abCD-12", 1.0),
        (("1234567",), " 123456", 0.0),
        (("1234567",), "", 0.0),
        (("12", "34"), "the 34", 0.5),
        (("12", "34"), "34 and 12", 1.0),
    ],
)
def test_string_match_all(answers, text, score):
    made = Sample("niah_single_1", 64, 0, 0, "...", answers, 128, 64)
    assert NIAH_SINGLE_1.score(made, text) == {"string_match_all": score}
    assert NIAH_SINGLE_1.is_answered(made, text) is (score == 1.0)


@pytest.mark.parametrize("task", ALL)
@pytest.mark.parametrize("length", [700, 2048])
def test_binary_fit_fills_the_length(tokenizer, task, length):
    unit = len(tokenizer(f"\n{NOISE}").input_ids) if task is NIAH_SINGLE_1 else 12
    for index in range(6):
        made = task.generate(tokenizer, length, index, 0)
        assert made.num_tokens == len(tokenizer(made.prompt).input_ids)
        # One more than the limit for the BOS, which RULER does not count; less by what a longer needle takes.
        assert length - 128 - unit - 20 <= made.num_tokens <= length - 128 + 1
        assert made.prompt.count(made.answers[0]) == 1
        assert made.max_new_tokens == 128


@pytest.mark.parametrize("task", ALL)
def test_linear_fit_goes_by_steps(tokenizer, task):
    length, step = 4096, 25 if task is NIAH_SINGLE_1 else 500
    made = [task.generate(tokenizer, length, index, 0, fit="linear") for index in range(4)]
    units = made[0].metadata["haystack_units"]
    assert units % step == 0
    assert units > 0
    for one in made:
        assert one.num_tokens == len(tokenizer(one.prompt).input_ids)
        question = one.prompt[: one.prompt.rindex(" The special magic")]
        assert len(tokenizer(question).input_ids) + 128 <= length


def test_linear_fit_with_mistral_gives_the_published_lengths(mistral):
    """What lm-evaluation-harness made of the same opening pages: mean prompt tokens at 1K, 2K and 4K."""
    expected = {
        NIAH_SINGLE_1: (841, 1841, 3841),
        NIAH_SINGLE_2: (715, 1400, 3378),
        NIAH_SINGLE_3: (740, 1425, 3405),
    }
    for task, means in expected.items():
        for length, mean in zip((1024, 2048, 4096), means, strict=True):
            made = [task.generate(mistral, length, index, 0, fit="linear") for index in range(4)]
            assert np.mean([one.num_tokens for one in made]) == pytest.approx(mean, abs=8)


def test_overflow_step_is_rulers_and_trim_keeps_the_text(tokenizer):
    trimmed = [NIAH_SINGLE_2.generate(tokenizer, 1500, index, 0) for index in range(12)]
    stepped = [NIAH_SINGLE_2.generate(tokenizer, 1500, index, 0, overflow="step") for index in range(12)]
    most = max(one.metadata["haystack_units"] for one in trimmed)
    assert {one.metadata["haystack_units"] for one in stepped} == {most, most - 500}
    assert min(one.metadata["haystack_units"] for one in trimmed) > most - 20
    for one, other in zip(trimmed, stepped, strict=True):
        assert (one.answers, one.depth) == (other.answers, other.depth)


def test_own_haystack_and_its_repeats(tokenizer):
    source = TextSource("short", "Nothing happens here today. " * 20)
    made = NIAH_SINGLE_2.generate(tokenizer, 1000, 0, 0, haystack=source)
    assert made.metadata["haystack_repeats"] == (made.metadata["haystack_units"] - 1) // 80 > 0
    assert NIAH_SINGLE_2.generate(tokenizer, 1000, 0, 0).metadata["haystack_repeats"] == 0
    noisy = NIAH_SINGLE_2.generate(tokenizer, 1000, 0, 0, haystack="noise")
    assert NOISE + "\n" in noisy.prompt


def test_same_arguments_same_sample_and_another_seed_another(tokenizer):
    one = NIAH_SINGLE_3.generate(tokenizer, 600, 3, seed=5)
    assert one == NIAH_SINGLE_3.generate(tokenizer, 600, 3, seed=5)
    answers = {NIAH_SINGLE_3.generate(tokenizer, 600, 3, seed=seed).answers for seed in range(5)}
    assert len(answers) == 5
    train = NIAH_SINGLE_3.generate(tokenizer, 600, 3, seed=5, split="train")
    assert not held_out(train.answers[0])


def test_impossible_lengths_and_options(tokenizer):
    with pytest.raises(DataError, match=r"which does not fit in 150. Ask for a length of at least"):
        NIAH_SINGLE_1.generate(tokenizer, 150, 0, 0)
    with pytest.raises(DataError, match=r"cannot hold one step of the linear fit .500 words"):
        NIAH_SINGLE_2.generate(tokenizer, 400, 0, 0, fit="linear")
    with pytest.raises(ConfigurationError, match=r"fit is 'linaer'.*Did you mean 'linear'"):
        NIAH_SINGLE_2.generate(tokenizer, 600, 0, 0, fit="linaer")
    with pytest.raises(ConfigurationError, match="overflow is 'cut'"):
        NIAH_SINGLE_2.generate(tokenizer, 600, 0, 0, overflow="cut")
    with pytest.raises(DataError, match="holds no words"):
        NIAH_SINGLE_2.generate(tokenizer, 600, 0, 0, haystack=TextSource("blank", " "))


@pytest.mark.parametrize("kind", ["numbers", "words", "uuids"])
def test_training_pairs(tokenizer, kind):
    text = builtin_source().text
    starts = set()
    for index in range(8):
        prompt, answer = niah_training_pair(tokenizer, text, 500, index, 0, kind=kind)
        tokens, start = encode_pair(tokenizer, prompt, answer)
        assert 485 <= len(tokens) <= 500
        assert tokenizer.decode(tokens[start:]) == answer
        value = answer[1:-1]
        assert prompt.count(value) == 1
        assert not held_out(value)
        key = re.search(r" for (\S+) mentioned in the provided text is$", prompt).group(1)
        assert not held_out(key)
        starts.add(prompt.split("\n")[1][:40])
    assert len(starts) == 8
    assert niah_training_pair(tokenizer, text, 500, 3, 0, kind=kind) == niah_training_pair(
        tokenizer, text, 500, 3, 0, kind=kind
    )


def test_training_pairs_of_little_text(tokenizer):
    prompt, answer = niah_training_pair(tokenizer, "A few words only. No more.", 500, 0, 0)
    assert "A few words only." in prompt
    assert len(encode_pair(tokenizer, prompt, answer)[0]) < 300
    with pytest.raises(DataError, match="holds no words"):
        niah_training_pair(tokenizer, " \n", 500, 0, 0)
    with pytest.raises(DataError, match="at least"):
        niah_training_pair(tokenizer, "A few words only.", 20, 0, 0)
    with pytest.raises(ConfigurationError, match=r"kind is 'number'.*Did you mean 'numbers'"):
        niah_training_pair(tokenizer, "A few words only.", 500, 0, 0, kind="number")


class Counting:
    """A tokenizer that counts what it is asked."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.texts = []

    def __call__(self, text, **options):
        self.texts.append(text)
        return self.tokenizer(text, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("name", sorted(name for name in TASKS if name.startswith("niah") or name == "vt"))
@pytest.mark.parametrize("fit", ["binary", "linear"])
def test_a_sample_costs_few_calls_of_the_tokenizer(tokenizer, name, fit):
    """The length is searched for once; then a sample is tokenized once, or twice if it was too long."""
    counting = Counting(tokenizer)
    get_task(name).generate(counting, 4096, 0, 0, fit=fit)
    longest = max(map(len, counting.texts))
    assert sum(len(text) > longest / 4 for text in counting.texts) <= 16
    counting.texts.clear()
    for index in range(1, 9):
        get_task(name).generate(counting, 4096, index, 0, fit=fit)
    assert sum(map(len, counting.texts)) <= 8 * 2.5 * longest


def test_making_samples_is_quick(tokenizer):
    for name in ("niah_single_2", "niah_multikey_2"):
        get_task(name).generate(tokenizer, 8192, 0, 0)
        start = time.process_time()
        for index in range(20):
            get_task(name).generate(tokenizer, 8192, index, 0)
        # 20 s for 500, with room for a slow machine.
        assert time.process_time() - start < 3
