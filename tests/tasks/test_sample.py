import re
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lawcat.errors import ConfigurationError, DataError
from lawcat.tasks import TASKS, encode_pair, encode_pairs, encode_pieces, get_task, held_out
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


PAIRS = [
    ("One\nWhere is it?", "\nAnswer: The 7 is here."),
    ("\n\nWhere else?", "\nAnswer: There, in the hallway."),
    ("\n\nAnd?", " 31."),
]


@pytest.mark.parametrize("name", ["tokenizer", "mistral"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_encode_pairs_tells_where_each_answer_is(request, name, count):
    tokenizer, pairs = request.getfixturevalue(name), PAIRS[:count]
    tokens, spans = encode_pairs(tokenizer, pairs)
    assert tokens == tokenizer("".join(map("".join, pairs))).input_ids
    assert [tokenizer.decode(tokens[start:end]).strip() for start, end in spans] == [
        a.strip() for _, a in pairs
    ]
    assert (tokens, spans[0][0]) == encode_pair(
        tokenizer, pairs[0][0], "".join(map("".join, pairs))[len(pairs[0][0]) :]
    )
    assert spans[-1][1] == len(tokens)


def tokenizer_of(pattern, shift=lambda text: 0):
    """Return a tokenizer with one token for each match, and the texts it was given."""
    given = []

    def call(text, verbose):
        given.append(text)
        found = re.findall(pattern, text, re.DOTALL)
        return SimpleNamespace(input_ids=[hash(piece) + shift(text) for piece in found])

    return call, given


@pytest.mark.parametrize("name", ["tokenizer", "mistral"])
def test_encode_pieces_tells_where_each_ends(request, name):
    tokenizer = request.getfixturevalue(name)
    pieces = ["One\nWhere is it?", "\nAnswer: The ", "7", " is", "", " here."]
    tokens, ends = encode_pieces(tokenizer, pieces)
    assert tokens == tokenizer("".join(pieces)).input_ids
    found = [tokenizer.decode(tokens[a:b]) for a, b in pairwise(ends)]
    assert [piece.strip() for piece in found] == [piece.strip() for piece in pieces[1:]]
    assert ends[-1] == len(tokens)
    assert (tokens, ends[0]) == encode_pair(tokenizer, pieces[0], "".join(pieces[1:]))
    with pytest.raises(DataError, match="no tokens for the answer"):
        encode_pieces(tokenizer, ["One", ""])


def test_a_token_across_a_border_is_of_the_piece_after_it():
    pieces = ["Ask:", " The ", "hall", ".\n\nA", "nd:", " 2."]
    pattern = r"\.\n\n|And|: | hall|[Tt]he|."
    call, _ = tokenizer_of(pattern)
    tokens, ends = encode_pieces(call, pieces)
    found = re.findall(pattern, "".join(pieces), re.DOTALL)
    assert tokens == [hash(piece) for piece in found]
    assert [found[a:b] for a, b in zip([0, *ends], ends, strict=False)] == [
        ["A", "s", "k"],
        [": ", "The"],
        [" hall"],
        [".\n\n"],
        ["And"],
        [": ", "2", "."],
    ]


def test_a_token_across_the_end_of_an_answer_is_not_of_it():
    pairs = [("Ask:", " 1."), ("\n\nAnd:", " 2.")]
    call, _ = tokenizer_of(r"\.\n\n|: |.")
    tokens, spans = encode_pairs(call, pairs)
    found = re.findall(r"\.\n\n|: |.", "Ask: 1.\n\nAnd: 2.", re.DOTALL)
    assert tokens == [hash(piece) for piece in found]
    # One across the beginning is, as in encode_pair.
    assert [found[start:end] for start, end in spans] == [[": ", "1"], [": ", "2", "."]]


def test_a_long_context_is_tokenized_twice_whatever_follows():
    pairs = [("Long. " * 500 + "\nAsk:", " 1.")] + [(f"\n\n{n}:", f" {n}.") for n in range(5)]
    call, given = tokenizer_of(".")
    _, spans = encode_pairs(call, pairs)
    assert [len(text) > 2000 for text in given] == [True, True] + [False] * 12
    # A tokenizer for which what stands far before changes all tokens: the short way does not hold.
    call, given = tokenizer_of(".", shift=lambda text: text.count("L"))
    assert encode_pairs(call, pairs)[1] == spans
    assert sum(len(text) > 2000 for text in given) == 2 + 10


def test_encode_pairs_without_an_answer(tokenizer):
    for index in range(3):
        pairs = [(prompt, "" if index == n else answer) for n, (prompt, answer) in enumerate(PAIRS)]
        with pytest.raises(DataError, match="no tokens for the answer ''; it cannot be trained on"):
            encode_pairs(tokenizer, pairs)


def test_importing_tasks_imports_neither_torch_nor_transformers():
    code = "import sys, lawcat.tasks; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
