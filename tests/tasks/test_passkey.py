import pytest

from lawcat.errors import ConfigurationError, DataError
from lawcat.tasks import PASSKEY, Sample, encode_pair, held_out, passkey_text, passkey_training_pair
from lawcat.tasks.sample import count_tokens

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def test_prompt_is_the_original_one():
    garbage = " ".join([NOISE] * 3)
    assert passkey_text("48291", 100, 30) == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there.\n"
        f"{garbage[:100]}\n"
        "The pass key is 48291. Remember it. 48291 is the pass key.\n"
        "The grass is green. The sky is\n"
        "What is the pass key? The pass key is"
    )
    assert passkey_text("7", 0, 0).splitlines()[1::2] == ["", ""]
    assert len(passkey_text("7", 0, 100_000)) - len(passkey_text("7", 0, 0)) == 100_000


def sample(key):
    return Sample("passkey", 64, 0, 0, "...", (key,), 10, 64)


@pytest.mark.parametrize(
    ("key", "answer", "accuracy", "exact", "digits"),
    [
        ("12345", " 12345. Remember", 1, 1, 1),
        ("12345", "12345", 1, 1, 1),
        ("12345", " the number 12345", 1, 0, 1),
        ("12345", " 123456", 0, 1, 1),
        ("12345", " 12045", 0, 0, 0.8),
        ("12345", " 1234", 0, 0, 0.8),
        ("12345", " 54321, no: 12345", 0, 0, 0.2),
        ("12345", " not there", 0, 0, 0),
        ("12345", "", 0, 0, 0),
        ("7", " 007", 1, 0, 0),
    ],
)
def test_metrics(key, answer, accuracy, exact, digits):
    scores = PASSKEY.score(sample(key), answer)
    assert list(scores) == ["accuracy", "exact", "digit_accuracy"]
    assert scores == pytest.approx({"accuracy": accuracy, "exact": exact, "digit_accuracy": digits})


@pytest.mark.parametrize(
    ("answer", "answered"), [("", False), (" ", False), (" 12", False), (" 12.", True), (" a 1 ", True)]
)
def test_generation_may_stop_after_the_first_number(answer, answered):
    assert PASSKEY.is_answered(sample("12345"), answer) is answered


@pytest.mark.parametrize("length", [256, 1024, 4000])
def test_nominal_length_is_the_true_one(tokenizer, length):
    for index in range(11):
        made = PASSKEY.generate(tokenizer, length, index, seed=0)
        assert length - 4 <= made.num_tokens <= length
        assert made.num_tokens == len(tokenizer(made.prompt).input_ids)
        assert made.depth == index / 10
        lines = made.prompt.split("\n")
        assert len(lines[1]) == round(made.depth * made.metadata["garbage_chars"])
        assert f"The pass key is {made.answers[0]}. " in lines[2]


def test_published_length_rules(tokenizer):
    for length, chars in ((1000, 3072), (2000, 7168), (4000, 14336), (16000, 59392), (22000, 81920)):
        made = PASSKEY.generate(tokenizer, length, 0, 0, length_rule="longlora")
        assert made.metadata["garbage_chars"] == chars
    made = PASSKEY.generate(tokenizer, 1000, 0, 0, length_rule="longrope")
    assert made.metadata["garbage_chars"] == 3650
    with pytest.raises(ConfigurationError, match=r"length_rule is 'longlore'.*Did you mean 'longlora'"):
        PASSKEY.generate(tokenizer, 1000, 0, 0, length_rule="longlore")


def test_longlora_lengths_with_mistral(mistral):
    lengths = {}
    for nominal in (1000, 2000, 4000, 8000):
        made = [PASSKEY.generate(mistral, nominal, index, 0, length_rule="longlora") for index in range(5)]
        lengths[nominal] = sum(one.num_tokens for one in made) / len(made)
    assert lengths == pytest.approx({1000: 891, 2000: 1985, 4000: 3895, 8000: 7989}, abs=6)


def test_same_arguments_same_sample_and_another_seed_another(tokenizer):
    one = PASSKEY.generate(tokenizer, 300, 3, seed=5)
    assert one == PASSKEY.generate(tokenizer, 300, 3, seed=5)
    keys = {PASSKEY.generate(tokenizer, 300, 3, seed=seed).answers for seed in range(10)}
    assert len(keys) == 10


def test_depths(tokenizer):
    depths = {PASSKEY.generate(tokenizer, 300, index, 0, depth="random").depth for index in range(5)}
    assert len(depths) == 5
    assert PASSKEY.generate(tokenizer, 300, 4, 0, depth=0.25).depth == 0.25
    for depth in ("deep", 1.5, True, None):
        with pytest.raises(ConfigurationError, match="depth is"):
            PASSKEY.generate(tokenizer, 300, 0, 0, depth=depth)


def test_training_never_holds_an_evaluation_key(tokenizer):
    asked = {PASSKEY.generate(tokenizer, 300, index, 0).answers[0] for index in range(50)}
    pairs = [passkey_training_pair(tokenizer, 300, index, 0) for index in range(50)]
    trained = {answer.strip(" .") for _, answer in pairs}
    other = {PASSKEY.generate(tokenizer, 300, index, 0, split="train").answers[0] for index in range(50)}
    assert all(map(held_out, asked))
    assert not any(map(held_out, trained | other))
    assert len(trained) > 45


@pytest.mark.parametrize("max_tokens", [256, 700])
def test_training_pairs_fill_their_budget(tokenizer, max_tokens):
    for index in range(8):
        prompt, answer = passkey_training_pair(tokenizer, max_tokens, index, 0)
        tokens, start = encode_pair(tokenizer, prompt, answer)
        assert max_tokens - 4 <= len(tokens) <= max_tokens
        assert tokenizer.decode(tokens[start:]) == answer
        assert prompt.endswith("The pass key is")
        assert f"{answer.strip(' .')} is the pass key." in prompt


def test_too_short_a_length_says_what_is_needed(tokenizer):
    needed = count_tokens(tokenizer, passkey_text("1", 0, 0))
    with pytest.raises(DataError, match="at least") as caught:
        PASSKEY.generate(tokenizer, 20, 0, 0)
    assert int(str(caught.value).split()[-2]) >= needed
    with pytest.raises(DataError, match="at least"):
        passkey_training_pair(tokenizer, 20, 0, 0)
    for length in (0, -5, 2.5, True):
        with pytest.raises(ConfigurationError, match="length is"):
            PASSKEY.generate(tokenizer, length, 0, 0)


def test_unknown_option(tokenizer):
    with pytest.raises(ConfigurationError, match=r"no option 'dept'.*Did you mean 'depth'"):
        PASSKEY.generate(tokenizer, 300, 0, 0, dept="grid")
