import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lawcat.errors import ConfigurationError, DataError
from lawcat.tasks import TASKS, encode_pair, get_task, held_out
from lawcat.tasks.sample import count_tokens, draw, fit_units, sample_rng


def test_registry_knows_the_tasks_and_suggests_the_nearest():
    assert set(TASKS) >= {"passkey", "niah_single_1", "niah_single_2", "niah_single_3"}
    assert all(get_task(name).name == name for name in TASKS)
    with pytest.raises(ConfigurationError, match=r"no task 'passkeys'.*Did you mean 'passkey'"):
        get_task("passkeys")


def test_a_sample_depends_on_its_four_numbers_and_the_split():
    def first(*arguments):
        return sample_rng(*arguments).random()

    # A literal, since the stream must be the same on every machine and in every release.
    assert first("passkey", 1024, 0, 0) == pytest.approx(0.7487946630601771, abs=1e-12)
    streams = [
        first("passkey", 1024, 0, 0),
        first("niah_single_1", 1024, 0, 0),
        first("passkey", 2048, 0, 0),
        first("passkey", 1024, 1, 0),
        first("passkey", 1024, 0, 1),
        first("passkey", 1024, 0, 0, "train"),
    ]
    assert len(set(streams)) == len(streams)
    with pytest.raises(ConfigurationError, match="split is 'test'"):
        sample_rng("passkey", 1024, 0, 0, "test")


def test_held_out_values_are_a_fixed_quarter():
    assert [str(key) for key in range(1, 21) if held_out(str(key))] == ["8", "9", "13"]
    rng = sample_rng("x", 1, 0, 0)
    for split in ("evaluation", "train"):
        drawn = [draw(lambda: str(rng.randint(1, 50_000)), split) for _ in range(200)]
        assert {held_out(value) for value in drawn} == {split == "evaluation"}


@given(
    base=st.integers(0, 50),
    per_unit=st.floats(0.05, 30),
    limit=st.integers(0, 3000),
    estimate=st.integers(-5, 20_000),
)
def test_fit_units_fills_the_limit(base, per_unit, limit, estimate):
    def count(units):
        return base + int(units * per_unit)

    units = fit_units(count, limit, estimate)
    if base > limit:
        assert units == -1
    else:
        assert count(units) == limit or (count(units) < limit < count(units + 1))


def test_fit_units_stops_where_nothing_can_be_added():
    assert fit_units(lambda units: 101 if units > 7 else units, 100, 50) == 7


def test_encode_pair_splits_prompt_and_answer(tokenizer):
    tokens, start = encode_pair(tokenizer, "The pass key is", " 123.")
    assert tokens == tokenizer("The pass key is 123.").input_ids
    assert tokenizer.decode(tokens[start:]) == " 123."
    assert tokens[0] == tokenizer.bos_token_id
    with pytest.raises(DataError, match="no tokens for the answer"):
        encode_pair(tokenizer, "The pass key is", "")
    assert count_tokens(tokenizer, "The pass key is 123.") == len(tokens)


def test_importing_tasks_imports_neither_torch_nor_transformers():
    code = "import sys, lawcat.tasks; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
