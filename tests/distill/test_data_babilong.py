"""Training data of BABILong: stories of training alone, in the recipe's own noise."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_data_mixture import make_tokenizer, mixture_of, recipe_of, same, same_batch
from transformers import ByT5Tokenizer

from lawcat.distill.mixture import build_mixture
from lawcat.distill.recipe import Recipe
from lawcat.distill.sequence import Batch, PackedSequence
from lawcat.distill.sources import _encode_labelled
from lawcat.errors import ConfigurationError
from lawcat.tasks import babilong_training_label, held_out
from lawcat.tasks.babi_solver import solve

TIDE = "The old woman of the seventh house waited for the tide, and nobody in the town knew why. " * 60


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    path = tmp_path / "tide.jsonl"
    path.write_text(json.dumps({"body": TIDE}), encoding="utf-8")
    return path


def samples_of(sequence: Any) -> list[tuple[str, str]]:
    tokenizer = make_tokenizer()
    # A sample ends where its answer does, with the EOS.
    ends = np.flatnonzero(np.diff(np.append(sequence.is_answer, False).astype(int)) == -1) + 1
    found, start = [], 0
    for end in ends:
        answer = start + int(np.argmax(sequence.is_answer[start:end]))
        found.append(
            (
                tokenizer.decode(sequence.input_ids[start:answer]),
                tokenizer.decode(sequence.input_ids[answer:end]),
            )
        )
        start = int(end)
    return found


def test_samples_in_a_sequence(tmp_path: Path, noise: Path) -> None:
    data = {"provider": "babilong", "path": str(noise), "text_field": "body", "tasks": ["qa1", "qa2"]}
    mixture = mixture_of(tmp_path, data, sequence_length=1600)
    assert mixture.has_task_data
    forms, noisy, plain = set(), 0, 0
    for index in range(10):
        found = samples_of(mixture.sequence(index))
        assert found
        for prompt, answer in found:
            assert prompt.startswith("I")
            assert answer.startswith("\nAnswer: The ")
            assert answer.endswith(".<eos>")
            forms.add("most recent" in answer)
            context = prompt.rsplit("<context>\n", 1)[1].split("\n</context>")[0]
            noisy += "woman" in context
            if "woman" not in context and "grass" not in context:
                facts = context.replace(". ", ".\n")
                assert not held_out("\n".join([facts, prompt.rsplit("Question: ", 1)[1]]))
                plain += 1
    assert forms == {True, False}
    assert noisy > 5
    assert plain >= 1


def test_long_sequences_are_filled(tmp_path: Path, noise: Path) -> None:
    data = {"provider": "babilong", "path": str(noise), "text_field": "body"}
    mixture = mixture_of(tmp_path, data, sequence_length=1200)
    for index in range(4):
        long = mixture.sequence(index, 4)
        (prompt, _answer) = samples_of(long)[0]
        assert long.is_answer[-1]
        filled = (long.input_ids != make_tokenizer().eos_token_id).mean()
        assert filled > 0.98, prompt[:100]


def test_the_noise_is_the_recipes_text_or_a_sentence(tmp_path: Path, noise: Path) -> None:
    text = {"provider": "text", "path": str(noise), "text_field": "body"}
    mixture = mixture_of(tmp_path, {"provider": "babilong"}, text, sequence_length=1200)
    record = mixture.describe()["sources"][0]
    assert record["tasks"] == ["qa1", "qa2", "qa3"]
    sha256 = hashlib.sha256(noise.read_bytes()).hexdigest()
    assert record["files"] == [{"name": "tide.jsonl", "sha256": sha256}]
    alone = mixture_of(tmp_path, {"provider": "babilong", "tasks": ["qa4"]}, sequence_length=1200)
    assert alone.describe()["sources"][0]["files"] == []
    prompts = [prompt for index in range(3) for prompt, _ in samples_of(alone.sequence(index))]
    assert any("The grass is green." in prompt for prompt in prompts)


def test_the_same_data_again(tmp_path: Path, noise: Path) -> None:
    data = {"provider": "babilong", "path": str(noise), "text_field": "body"}
    one, again = (mixture_of(tmp_path, data, sequence_length=1000) for _ in range(2))
    assert same(one.sequence(2), again.sequence(2))
    assert same(one.sequence(1, 2), again.sequence(1, 2))
    other = mixture_of(tmp_path, {**data, "tasks": ["qa1"]}, sequence_length=1000)
    assert one.describe()["sha256"] != other.describe()["sha256"]


def runs_of(mask: Any) -> list[tuple[int, int]]:
    edges = np.diff(np.concatenate([[0], mask.astype(int), [0]]))
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))


def answers_of(sequence: Any) -> list[tuple[int, int]]:
    return runs_of(sequence.is_answer)


BABILONG = {"provider": "babilong", "text_field": "body", "tasks": ["qa2", "qa3"], "questions": 5}
NEEDLES = {"provider": "needle", "text_field": "body", "value_kinds": ["numbers"], "needles": 3}
WEIGHTS = {"answer_weight": 3.0, "context_weight": 0.5}
COUNTS = {"answer_weight": 2.0, "label_weight": 64.0, "answer_kl_weight": 0.25}


@pytest.mark.parametrize("data", [BABILONG, NEEDLES])
def test_several_questions_a_sample(tmp_path: Path, noise: Path, data: dict[str, Any]) -> None:
    tokenizer = make_tokenizer()
    mixture = mixture_of(tmp_path, {**data, "path": str(noise)}, sequence_length=1400, recovery=WEIGHTS)
    counts = []
    for index in range(12):
        sequence = mixture.sequence(index)
        answers = answers_of(sequence)
        expected = np.where(sequence.is_answer, np.float32(3), np.float32(0.5))
        ends = np.flatnonzero((sequence.input_ids == tokenizer.eos_token_id) & sequence.is_answer) + 1
        expected[ends[-1] :] = 0
        expected[0] = 0
        assert (sequence.loss_weight == expected).all()
        for start, end in zip([0, *ends], ends, strict=False):
            mine = [(first, last) for first, last in answers if start <= first < end]
            counts.append(len(mine))
            text = tokenizer.decode(sequence.input_ids[start:end])
            said = [tokenizer.decode(sequence.input_ids[first:last]) for first, last in mine]
            if data is BABILONG:
                wanted = re.findall(r"\nAnswer: [^<]*?\.(?=\n|<eos>)", text.split("</context>")[1])
            else:
                wanted = re.findall(r"(?<=mentioned in the provided text is) \d{7}\.", text)
                hidden = dict(re.findall(r"magic numbers for (\S+) is: (\d+)\.", text))
                asked = re.findall(r"number for (\S+) mentioned in the provided text is (\d+)", text)
                assert all(hidden[key] == value for key, value in asked)
                assert len(hidden) == len(asked)
            assert said == [*wanted[:-1], wanted[-1] + "<eos>"]
    assert max(counts) == (5 if data is BABILONG else 3)
    if data is NEEDLES:
        assert 0.4 < np.mean(np.array(counts) == 1) < 0.9


@pytest.mark.parametrize("data", [BABILONG, NEEDLES])
def test_several_questions_at_the_end_of_a_long_sample(
    tmp_path: Path, noise: Path, data: dict[str, Any]
) -> None:
    mixture = mixture_of(tmp_path, {**data, "path": str(noise)}, sequence_length=1200, recovery=WEIGHTS)
    counts = []
    for index in range(8):
        sequence = mixture.sequence(index, 3)
        assert sequence.is_answer[-1]
        assert not sequence.is_answer[:-1200].any()
        assert (sequence.loss_weight == np.where(sequence.is_answer, np.float32(3), np.float32(0))).all()
        counts.append(len(answers_of(sequence)))
    assert 1 < max(counts) <= 5


def test_answers_before_the_last_segment_do_not_count(tmp_path: Path) -> None:
    mixture = mixture_of(tmp_path, {"provider": "passkey"}, sequence_length=120, recovery=WEIGHTS)
    source: Any = mixture._sources[0]
    turns = [(f"\nSay {number * 11111}:", f" {number * 11111}.") for number in range(1, 10)]
    source._pairs = lambda *arguments: turns
    sequence, text = mixture.sequence(0, 2), "".join(map("".join, turns)) + "<eos>"
    decoded = make_tokenizer().decode(sequence.input_ids)
    assert decoded.endswith(text)
    said = [make_tokenizer().decode(sequence.input_ids[a:b]) for a, b in answers_of(sequence)]
    assert 1 < len(said) < 9
    assert said == [*[answer for _, answer in turns][-len(said) : -1], " 99999.<eos>"]
    assert answers_of(sequence)[0][0] >= 120


def test_several_questions_in_other_processes_and_in_any_order(
    tmp_path: Path, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [{**BABILONG, **COUNTS, "path": str(noise)}, {**NEEDLES, "path": str(noise)}]
    made, plain = (mixture_of(tmp_path, *data, sequence_length=1200) for _ in range(2))
    monkeypatch.setattr("lawcat.distill.mixture.num_data_workers", lambda: 2)
    requests = [(4, 2, 1), (1, 1, 2), (6, 2, 1)]
    batches = list(made.batches(requests))
    for request, batch in reversed(list(zip(requests, batches, strict=True))):
        expected = plain.batch(*request)
        assert same_batch(batch, expected)


def test_one_question_is_the_default_and_leaves_no_trace(tmp_path: Path, noise: Path) -> None:
    for data, option in ((BABILONG, "questions"), (NEEDLES, "needles")):
        several = {**data, "path": str(noise)}
        one, given = ({**several, option: 1}, {k: v for k, v in several.items() if k != option})
        mixtures = [mixture_of(tmp_path, each, sequence_length=1200) for each in (one, given, several)]
        records = [mixture.describe()["sources"][0] for mixture in mixtures]
        assert records[0] == records[1]
        assert option not in records[0]
        assert records[2][option] == data[option]
        assert records[2]["sha256"] != records[0]["sha256"]
        assert same(mixtures[0].sequence(1), mixtures[1].sequence(1))
        assert not all(same(mixtures[0].sequence(i), mixtures[2].sequence(i)) for i in range(4))


def labels_of(sequence: PackedSequence) -> list[str]:
    """Return the text at weight 64, a run after another."""
    return [make_tokenizer().decode(sequence.input_ids[a:b]) for a, b in runs_of(sequence.loss_weight == 64)]


@pytest.mark.parametrize("num_segments", [1, 3])
def test_the_label_of_an_answer_has_a_weight_of_its_own(
    tmp_path: Path, noise: Path, num_segments: int
) -> None:
    data = {**BABILONG, "tasks": ["qa1", "qa2", "qa3", "qa4", "qa5"], "path": str(noise)}
    recovery = {"answer_weight": 7.0, "context_weight": 0.5}
    counted, plain = (
        mixture_of(tmp_path, each, sequence_length=1400, recovery=recovery)
        for each in ({**data, **COUNTS}, data)
    )
    seen: set[str] = set()
    for index in range(10 if num_segments == 1 else 5):
        one, other = counted.sequence(index, num_segments), plain.sequence(index, num_segments)
        # Tokens, and what counts at all, are as without; of answers all but the label at the source's weight.
        assert np.array_equal(one.input_ids, other.input_ids)
        assert np.array_equal(one.is_answer, other.is_answer)
        assert np.array_equal(one.loss_weight[~one.is_answer], other.loss_weight[~one.is_answer])
        assert set(one.loss_weight[one.is_answer].tolist()) == {2.0, 64.0}
        assert set(other.loss_weight[one.is_answer].tolist()) == {7.0}
        assert one.kl_factor is not None
        assert np.array_equal(one.kl_factor, np.where(one.is_answer, np.float32(0.25), np.float32(1)))
        said = [make_tokenizer().decode(one.input_ids[a:b]) for a, b in runs_of(one.is_answer)]
        labels = labels_of(one)
        assert len(labels) == len(said)
        for label, answer in zip(labels, said, strict=True):
            word = re.findall(r"\w+", answer.removesuffix("<eos>"))[-1]
            assert label.strip() == word
            assert re.fullmatch(r"\nAnswer:.* ?" + label + r"\.?(<eos>)?", answer)
            seen.add(word)
    assert {"bathroom", "office"} <= seen


def test_labels_word_for_word(tmp_path: Path, noise: Path) -> None:
    data = {**BABILONG, **COUNTS, "tasks": ["qa2"], "noise_shares": [0, 0, 1], "path": str(noise)}
    sequence = mixture_of(tmp_path, data, sequence_length=1400).sequence(0)
    text = make_tokenizer().decode(sequence.input_ids[: answers_of(sequence)[-1][1]])
    context, _, asked = text.split("<context>\n")[-1].partition("\n</context>")
    facts = tuple(context.replace(". ", ".\n").split("\n"))
    found = [solve(facts, one).answer for one in re.findall(r"Question: (.*)", asked)]
    assert len(found) > 1
    assert [label.strip() for label in labels_of(sequence)[-len(found) :]] == found


def test_an_eos_that_the_tokenizer_puts_there_is_not_of_the_label(tmp_path: Path) -> None:
    tokenizer = ByT5Tokenizer()
    data = {"provider": "babilong", "tasks": ["qa4"], "label_weight": 64, "min_sample_tokens": 1200}
    sequence = build_mixture(recipe_of(data, sequence_length=1800), tokenizer, cache_dir=tmp_path).sequence(0)
    (first, last), *_ = runs_of(sequence.loss_weight == 64)
    assert re.fullmatch(r"[a-z]+", tokenizer.decode(sequence.input_ids[first:last]))
    assert sequence.input_ids[last] == tokenizer.eos_token_id
    assert sequence.loss_weight[last] == 8.0


class Pieces:
    """A tokenizer with one token for each match of a pattern."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def cut(self, text: str) -> list[str]:
        return re.findall(self.pattern, text, re.DOTALL)

    def __call__(self, text: str, verbose: bool) -> Any:
        return SimpleNamespace(input_ids=[hash(piece) for piece in self.cut(text)])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"\s?\w+|.", [" hall", " office"]),
        (r"\w+|.", ["hall", "office"]),  # the space alone is not of the label
        (r" the hall|\s?\w+|.", [" the hall", " office"]),
        (r" (?:hall|office)\.|\s?\w+|.", [" hall.", " office."]),
        (r" ha|ll\.|\s?off|ice\.|\s?\w+|.", [" ha", " off"]),  # the rest is not the label's alone
    ],
)
def test_a_token_that_is_a_labels_in_part(pattern: str, expected: list[str]) -> None:
    pairs = [
        ("A story.\nQuestion: Where?", "\nAnswer: In the hall."),
        ("\n\nQuestion: And?", "\nAnswer: office."),
    ]
    tokenizer: Any = Pieces(pattern)
    tokens, answers, labels = _encode_labelled(tokenizer, pairs, babilong_training_label)
    pieces = tokenizer.cut("".join(map("".join, pairs)))
    assert tokens == [hash(piece) for piece in pieces]
    assert ["".join(pieces[a:b]) for a, b in labels] == expected
    assert all(a <= first < last <= b for (a, b), (first, last) in zip(answers, labels, strict=True))


@pytest.mark.parametrize("provider", ["passkey", "needle"])
def test_answers_of_other_tasks_count_as_their_source_says(
    tmp_path: Path, noise: Path, provider: str
) -> None:
    data = {"provider": provider, "answer_weight": 5, "answer_kl_weight": 0}
    data |= {"path": str(noise), "text_field": "body"} if provider == "needle" else {}
    mixture = mixture_of(tmp_path, data, sequence_length=300, recovery=WEIGHTS)
    for sequence in (mixture.sequence(1), mixture.sequence(1, 3)):
        assert set(sequence.loss_weight[sequence.is_answer].tolist()) == {5.0}
        assert sequence.kl_factor is not None
        assert np.array_equal(sequence.kl_factor == 0, sequence.is_answer)
    record = mixture.describe()["sources"][0]
    assert (record["answer_weight"], record["answer_kl_weight"]) == (5.0, 0.0)
    assert "label_weight" not in record


def test_sequences_with_and_without_a_factor_in_one_batch(tmp_path: Path, noise: Path) -> None:
    text = {"provider": "text", "path": str(noise), "text_field": "body"}
    mixture = mixture_of(tmp_path, text, {"provider": "passkey", "answer_kl_weight": 0}, sequence_length=300)
    batch = mixture.batch(0, 4)
    assert batch.kl_factor is not None
    for row, source in enumerate(batch.sources):
        assert batch.kl_factor[row].bool().all() == (source == "text")
    alone = Batch.stack([PackedSequence(*[np.zeros(3, kind) for kind in ("i8", "f4", "?")], "text")] * 2)
    assert alone.kl_factor is not None
    assert alone.kl_factor.tolist() == [[1.0] * 3] * 2


def test_what_is_as_ever_leaves_no_trace(tmp_path: Path, noise: Path) -> None:
    data = {**BABILONG, "path": str(noise)}
    as_ever = {"answer_weight": 3, "label_weight": 3, "answer_kl_weight": 1, "noise_shares": [4, 3, 1]}
    given, plain, *others = (
        mixture_of(tmp_path, {**data, **more}, sequence_length=1200, recovery=WEIGHTS)
        for more in (
            as_ever,
            {},
            {"answer_weight": 2},
            {"label_weight": 9},
            {"answer_kl_weight": 0},
            {"noise_shares": [1, 1, 6]},
        )
    )
    assert given.describe() == plain.describe()
    assert same_batch(given.batch(0, 3), plain.batch(0, 3))
    records = [mixture.describe()["sources"][0] for mixture in others]
    usual = plain.describe()["sources"][0]
    for record, (name, value) in zip(
        records,
        [("answer_weight", 2), ("label_weight", 9), ("answer_kl_weight", 0), ("noise_shares", [1, 1, 6])],
        strict=True,
    ):
        assert record.pop(name) == value
        # With the source's weight for the rest of an answer, the label's is the same: nothing to note.
        assert record.keys() == usual.keys()
        assert record.pop("sha256") != usual["sha256"]
    assert len({mixture.describe()["sha256"] for mixture in (plain, *others)}) == 5


def test_data_and_recipes_are_as_before_there_were_these_fields(tmp_path: Path) -> None:
    """By hashes of what was made then; a checkpoint of that time goes on with the same recipe and data."""
    recipe = Recipe.from_dict(
        {
            "name": "as ever",
            "sequence_length": 4200,
            "data": [
                {
                    "provider": "babilong",
                    "tasks": ["qa1", "qa2"],
                    "questions": 4,
                    "min_sample_tokens": 900,
                },
                {"provider": "passkey", "min_sample_tokens": 900},
                {"provider": "needle", "haystacks": ["noise"], "min_sample_tokens": 900},
            ],
            "recovery": {"answer_weight": 3, "context_weight": 0.5},
        }
    )
    assert recipe.fingerprint()[:16] == "058d4f62078381a9"
    mixture = build_mixture(recipe, ByT5Tokenizer(), cache_dir=tmp_path)
    keys = [sorted(source) for source in mixture.describe()["sources"]]
    assert keys == [
        ["files", "name", "provider", "questions", "sha256", "share", "tasks"],
        ["name", "provider", "sha256", "share"],
        ["files", "haystacks", "name", "num_keys", "provider", "sha256", "share", "value_kinds"],
    ]
    digest = hashlib.sha256()
    for index, num_segments in [*((i, 1) for i in range(9)), *((i, 2) for i in range(4))]:
        sequence = mixture.sequence(index, num_segments)
        for array in (sequence.input_ids, sequence.loss_weight, sequence.is_answer):
            digest.update(array.tobytes())
    assert digest.hexdigest()[:16] == "f9e05b9384930ffc"


def test_the_search_asks_how_stories_count() -> None:
    fields = {"noise_shares", "answer_weight", "label_weight", "answer_kl_weight"}
    search = Recipe.load("search-longcontext")
    assert search.matrix is not None
    said = {
        name: {key for source in search.variant(name).to_dict()["data"] for key in fields & source.keys()}
        for name in search.matrix.names
    }
    both = {"label_weight", "answer_kl_weight"}
    lookups = {name: keys for name, keys in said.items() if name.startswith("lookups")}
    assert len(lookups) == 11
    assert all(keys == {*both, "noise_shares"} for keys in lookups.values())
    assert {name: keys for name, keys in said.items() if keys and name not in lookups} == {
        "stories-labels-64": {"label_weight"},
        "stories-no-kl": {"answer_kl_weight"},
        "stories-labels-no-kl": both,
        "stories-short": {*both, "noise_shares"},
        "stories-short-rate-double": {*both, "noise_shares"},
        "stories-conv-8": {"label_weight"},
    }


def test_shares_of_noise(tmp_path: Path, noise: Path) -> None:
    data = {"provider": "babilong", "path": str(noise), "text_field": "body", "tasks": ["qa1"]}
    for shares, noisy in (([0, 0, 1], {False}), ([1, 0, 0], {True})):
        mixture = mixture_of(tmp_path, {**data, "noise_shares": shares}, sequence_length=1400)
        found = [samples_of(mixture.sequence(index)) for index in range(5)]
        contexts = [prompt.split("<context>\n")[-1] for samples in found for prompt, _ in samples]
        assert {"woman" in context for context in contexts} == noisy
        # Where a state is carried, distance is what is trained.
        assert "woman" in samples_of(mixture.sequence(0, 2))[0][0]


def test_the_recipe() -> None:
    recipe = recipe_of(
        {"provider": "babilong", "tasks": ["qa2", "qa2", "qa3"], "questions": 6}, sequence_length=1024
    )
    assert recipe.data[0].tasks == ("qa2", "qa2", "qa3")
    assert recipe.data[0].questions == 6
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    for data, message in [
        ({"provider": "babilong", "tasks": ["qa6"]}, r"data\.0\.tasks.*qa6"),
        ({"provider": "babilong", "tasks": []}, r"data\.0\.tasks.*name at least one"),
        ({"provider": "passkey", "tasks": ["qa1"]}, r"data\.0\.tasks: .*for provider babilong, not passkey"),
        ({"provider": "babilong", "questions": 0}, r"data\.0\.questions.*0"),
        ({"provider": "needle", "questions": 2}, r"for provider babilong, not needle"),
        ({"provider": "needle", "label_weight": 2}, r"label_weight: .* is for provider babilong, not needle"),
        ({"provider": "passkey", "noise_shares": [1, 1, 1]}, r"is for provider babilong, not passkey"),
        (
            {"provider": "text", "path": "x", "answer_weight": 2},
            r"data\.0\.answer_weight: got 2\.0, which is for provider passkey or needle or babilong, not t",
        ),
        (
            {"provider": "teacher", "answer_kl_weight": 0},
            r"answer_kl_weight: .* is for provider passkey or needle or babilong, not teacher; leave it out",
        ),
        ({"provider": "passkey", "answer_weight": 0}, r"data\.0\.answer_weight: got 0\.0; .* above 0"),
        ({"provider": "babilong", "label_weight": -1}, r"data\.0\.label_weight: got -1\.0; .* above 0"),
        ({"provider": "babilong", "answer_kl_weight": -1}, r"answer_kl_weight: got -1\.0; .* 0 or above"),
        ({"provider": "babilong", "noise_shares": [1, 1]}, r"noise_shares: got \[1, 1\]; give a list of 3"),
        (
            {"provider": "babilong", "noise_shares": [0, 0, 0]},
            r"data\.0\.noise_shares: got \[0\.0, 0\.0, 0\.0\]; none may be below 0, and not all 0",
        ),
        ({"provider": "babilong", "noise_shares": [2, -1, 1]}, r"data\.0\.noise_shares: .* below 0"),
        ({"provider": "needle", "needles": 41}, r"data\.0\.needles.*41.*at most 40"),
        ({"provider": "babilong", "value_kinds": ["words"]}, r"for provider needle, not babilong"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            recipe_of(data)
    with pytest.raises(
        ConfigurationError, match=r"data\.0\.answer_kl_weight: .*cross_entropy_weight is 0 too"
    ):
        recipe_of({"provider": "passkey", "answer_kl_weight": 0}, recovery={"cross_entropy_weight": 0})


def test_how_answers_count_in_a_recipe() -> None:
    recipe = recipe_of({"provider": "babilong"}, sequence_length=1024)
    assert recipe.fingerprint() == Recipe.from_yaml(recipe.to_yaml()).fingerprint()
    changed = recipe.with_overrides(
        {"data.0.label_weight": "64", "data.0.answer_kl_weight": "0", "data.0.noise_shares": "1,1,6"}
    )
    source = changed.data[0]
    assert (source.answer_weight, source.label_weight, source.answer_kl_weight) == (None, 64.0, 0.0)
    assert source.noise_shares == (1.0, 1.0, 6.0)
    assert Recipe.from_yaml(changed.to_yaml()) == changed
    assert changed.with_overrides({"data.0.provider": "passkey"}).data[0].answer_kl_weight == 0.0
    assert changed.with_overrides({"data.0.provider": "passkey"}).data[0].label_weight is None
