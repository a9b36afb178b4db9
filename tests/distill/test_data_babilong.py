"""Training data of BABILong: stories of training alone, in the recipe's own noise."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_data_mixture import make_tokenizer, mixture_of, recipe_of, same

from lawcat.distill.recipe import Recipe
from lawcat.errors import ConfigurationError
from lawcat.tasks import held_out

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


def answers_of(sequence: Any) -> list[tuple[int, int]]:
    edges = np.diff(np.concatenate([[0], sequence.is_answer.astype(int), [0]]))
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))


BABILONG = {"provider": "babilong", "text_field": "body", "tasks": ["qa2", "qa3"], "questions": 5}
NEEDLES = {"provider": "needle", "text_field": "body", "value_kinds": ["numbers"], "needles": 3}
WEIGHTS = {"answer_weight": 3.0, "context_weight": 0.5}


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
    data = [{**BABILONG, "path": str(noise)}, {**NEEDLES, "path": str(noise)}]
    made, plain = (mixture_of(tmp_path, *data, sequence_length=1200) for _ in range(2))
    monkeypatch.setattr("lawcat.distill.mixture.num_data_workers", lambda: 2)
    requests = [(4, 2, 1), (1, 1, 2), (6, 2, 1)]
    batches = list(made.batches(requests))
    for request, batch in reversed(list(zip(requests, batches, strict=True))):
        expected = plain.batch(*request)
        assert torch.equal(batch.input_ids, expected.input_ids)
        assert torch.equal(batch.loss_weight, expected.loss_weight)
        assert torch.equal(batch.is_answer, expected.is_answer)


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
        ({"provider": "needle", "needles": 41}, r"data\.0\.needles.*41.*at most 40"),
        ({"provider": "babilong", "value_kinds": ["words"]}, r"for provider needle, not babilong"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            recipe_of(data)
