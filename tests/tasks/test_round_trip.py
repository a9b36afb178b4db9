import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lawcat.errors import DataError
from lawcat.tasks import TASKS, builtin_source, niah_training_pair, passkey_training_pair
from lawcat.tasks.round_trip import ALPHABETS, require_round_trip


def characters(alphabet):
    """A tokenizer of single characters that knows no others."""
    vocabulary = {character: index for index, character in enumerate(["<unk>", *sorted(set(alphabet))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.clean_up_tokenization_spaces = False
    return fast


def uncased_words():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "is": 1, ".": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_a_byte_level_tokenizer_holds_everything(tokenizer):
    require_round_trip(tokenizer, ALPHABETS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("passkey", "numbers"),
        ("niah_single_1", "words"),
        ("niah_multikey_3", "uuids"),
        ("vt", "capitals"),
        ("associative_recall", "words"),
        ("copy", "words"),
    ],
)
def test_every_task_that_hides_a_value_refuses_a_tokenizer_that_cannot_hold_it(name, kind):
    message = rf"cannot hold the {kind} that this task hides: '.*' comes back as '.*<unk>.*Use the tokenizer"
    with pytest.raises(DataError, match=message):
        TASKS[name].generate(uncased_words(), 1024, 0, 0)


def test_training_pairs_too():
    with pytest.raises(DataError, match="cannot hold the numbers"):
        passkey_training_pair(uncased_words(), 500, 0, 0)
    with pytest.raises(DataError, match="cannot hold the words"):
        niah_training_pair(uncased_words(), builtin_source().text, 500, 0, 0)


def test_one_missing_character_is_enough(tokenizer):
    class Joined:
        """The tokenizer of characters, decoding without spaces; it counts how often it is asked."""

        def __init__(self, alphabet):
            self.inner = characters(alphabet)
            self.calls = 0

        def __call__(self, *arguments, **options):
            self.calls += 1
            return self.inner(*arguments, **options)

        def decode(self, tokens, skip_special_tokens=False):
            texts = self.inner.convert_ids_to_tokens(tokens, skip_special_tokens=skip_special_tokens)
            return "".join(texts)

    whole = Joined("is 0123456789.")
    require_round_trip(whole, ["numbers"])
    asked = whole.calls
    require_round_trip(whole, ["numbers"])
    assert whole.calls == asked <= 2
    for digit in "0123456789":
        with pytest.raises(DataError, match="cannot hold the numbers"):
            require_round_trip(Joined("is 0123456789.".replace(digit, "")), ["numbers"])
    require_round_trip(Joined("is abcdefghijklmnopqrstuvwxyz-."), ["words"])
    with pytest.raises(DataError, match="cannot hold the words"):
        require_round_trip(Joined("is abcdefghijklmnopqrstuvwxyz."), ["words"])
    # The metrics take upper and lower case alike, so a tokenizer may too.
    lower = Joined("is abcdefghijklmnopqrstuvwxyz-.")
    lower.inner.backend_tokenizer.normalizer = normalizers.Lowercase()
    require_round_trip(lower, ["capitals"])


def test_alphabets_hold_every_character():
    assert set("".join(ALPHABETS["numbers"])) == set("0123456789")
    assert set("".join(ALPHABETS["uuids"])) == set("0123456789abcdef-")
    assert set("".join(ALPHABETS["words"])) == set("abcdefghijklmnopqrstuvwxyz-")
    assert set("".join(ALPHABETS["capitals"])) == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
