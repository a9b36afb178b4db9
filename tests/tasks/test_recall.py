import pytest

from lawcat.errors import ConfigurationError, DataError
from lawcat.tasks import ASSOCIATIVE_RECALL, COPY, Sample, held_out

BOTH = [ASSOCIATIVE_RECALL, COPY]


def test_golden_associative_recall(tokenizer):
    made = ASSOCIATIVE_RECALL.generate(tokenizer, 64, 0, 0)
    assert made.prompt == (
        "nervous-fascia: stamina\nold-representation: loophole\nquizzical-number: inch\n"
        "unequaled-moon: fight\nquizzical-number:"
    )
    assert (made.answers, made.num_tokens, made.depth) == (("inch",), 61, 2 / 3)


def test_golden_copy(tokenizer):
    made = COPY.generate(tokenizer, 64, 0, 0)
    assert made.prompt == (
        "cut something wish user greed torso vessel goldfish founding piece theater pupil shoat rambler "
        "knock synergy veil typhoon\ncut something wish"
    )
    assert made.answers == ("user", "greed", "torso", "vessel", "goldfish", "founding", "piece", "theater")


@pytest.mark.parametrize("task", BOTH)
@pytest.mark.parametrize("length", [64, 65, 500, 2048])
def test_prompts_fill_their_length(tokenizer, task, length):
    for index in range(5):
        made = task.generate(tokenizer, length, index, 0)
        assert made.num_tokens == len(tokenizer(made.prompt).input_ids)
        assert length - 25 <= made.num_tokens <= length


def test_pairs_have_one_answer_and_every_place_is_asked_for(tokenizer):
    depths = []
    for index in range(40):
        made = ASSOCIATIVE_RECALL.generate(tokenizer, 400, index, 0)
        *pairs, asked = made.prompt.split("\n")
        keys, values = zip(*(pair.split(": ") for pair in pairs), strict=True)
        assert len(set(keys)) == len(keys) == made.metadata["units"]
        place = keys.index(asked.removesuffix(":"))
        assert made.answers == (values[place],)
        assert made.depth == place / (len(keys) - 1)
        depths.append(made.depth)
        assert all(map(held_out, keys + values))
    assert min(depths) < 0.15 < 0.4 < sum(depths) / 40 < 0.6 < 0.85 < max(depths)


def test_copy_goes_on_from_the_beginning(tokenizer):
    for index in range(5):
        made = COPY.generate(tokenizer, 300, index, 0)
        line, cue = made.prompt.split("\n")
        words = line.split(" ")
        assert len(words) == made.metadata["units"]
        assert cue.split(" ") == words[:3]
        assert made.answers == tuple(words[3:11])
        assert all(map(held_out, words))


@pytest.mark.parametrize("task", BOTH)
def test_seeds_and_splits(tokenizer, task):
    assert task.generate(tokenizer, 100, 3, 5) == task.generate(tokenizer, 100, 3, 5)
    assert len({task.generate(tokenizer, 100, 3, seed).prompt for seed in range(5)}) == 5
    train = task.generate(tokenizer, 100, 3, 5, split="train")
    assert not any(map(held_out, train.answers))


@pytest.mark.parametrize(
    ("text", "accuracy", "is_out"),
    [
        (" river", 1, False),
        (" river\n", 1, True),
        (" River.", 1, True),
        (" river-", 1, False),
        (" river-bed ", 0, True),
        (" rivers ", 0, True),
        (" lake river", 0, True),
        (": river,", 1, True),
        (" ", 0, False),
        ("", 0, False),
        (" riv", 0, False),
    ],
)
def test_associative_recall_takes_the_first_word(text, accuracy, is_out):
    made = Sample("associative_recall", 64, 0, 0, "...", ("river",), 10, 60)
    assert ASSOCIATIVE_RECALL.score(made, text) == {"accuracy": accuracy}
    assert ASSOCIATIVE_RECALL.is_answered(made, text) is is_out


@pytest.mark.parametrize(
    ("text", "share", "is_out"),
    [
        (" one two three four", 1, False),
        (" one two three four five", 1, True),
        (" one two three four\n", 1, True),
        (" one two tree four.", 0.75, True),
        (" two three four", 0, False),
        (" one", 0.25, False),
        ("", 0, False),
    ],
)
def test_copy_counts_words_by_position(text, share, is_out):
    made = Sample("copy", 64, 0, 0, "...", ("one", "two", "three", "four"), 40, 60)
    assert COPY.score(made, text) == {"word_accuracy": share, "exact": float(share == 1)}
    assert COPY.is_answered(made, text) is is_out


def test_ending_early_changes_no_score():
    made = Sample("copy", 64, 0, 0, "...", ("one", "two-three"), 40, 60)
    text = " one two-three four-five six"
    for task in BOTH:
        headline = task.metrics[0]
        final = task.score(made, text)[headline]
        for end in range(len(text)):
            if task.is_answered(made, text[:end]):
                assert task.score(made, text[:end])[headline] == final


@pytest.mark.parametrize("task", BOTH)
def test_impossible_lengths_and_options(tokenizer, task):
    with pytest.raises(
        DataError, match=r"which does not fit in 10. Ask for a length of at least \d\d tokens"
    ):
        task.generate(tokenizer, 10, 0, 0)
    with pytest.raises(ConfigurationError, match="has no option 'depth'; it has: none"):
        task.generate(tokenizer, 64, 0, 0, depth=0.5)
