"""Training data of BABILong: stories of training alone, in the recipe's own noise."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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


def test_the_recipe() -> None:
    recipe = recipe_of({"provider": "babilong", "tasks": ["qa2", "qa2", "qa3"]}, sequence_length=1024)
    assert recipe.data[0].tasks == ("qa2", "qa2", "qa3")
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    for data, message in [
        ({"provider": "babilong", "tasks": ["qa6"]}, r"data\.0\.tasks.*qa6"),
        ({"provider": "babilong", "tasks": []}, r"data\.0\.tasks.*name at least one"),
        ({"provider": "passkey", "tasks": ["qa1"]}, r"data\.0\.tasks: .*for provider babilong, not passkey"),
        ({"provider": "babilong", "value_kinds": ["words"]}, r"for provider needle, not babilong"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            recipe_of(data)
