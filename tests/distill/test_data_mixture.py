"""The mixture: random access, proportions, task samples, and the same data whoever asks."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lawcat.distill.mixture import Mixture, Turns, build_mixture
from lawcat.distill.recipe import Recipe
from lawcat.distill.sequence import Batch, PackedSequence
from lawcat.distill.sources import TaskSource, WindowSource, seed_of, shuffled
from lawcat.errors import ConfigurationError, DataError, LawcatError, MissingDependencyError
from lawcat.tasks import held_out, niah_training_pair, passkey_training_pair

PROSE = " ".join(
    f"The {animal} of {place} went to the river and said that number {i} was enough. Nobody answered."
    for i, (animal, place) in enumerate(
        [("fox", "Rome"), ("owl", "Bath"), ("cat", "Oslo"), ("elk", "Lima")] * 20
    )
)


@lru_cache(maxsize=1)
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, digits one by one, trained on what the tasks say."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?[A-Za-z]+|\s|[^\sA-Za-z\d]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([PROSE], trainer)
    draft = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    texts = [PROSE, "".join(passkey_training_pair(draft, 900, 0, 0))]
    texts += [
        "".join(niah_training_pair(draft, PROSE, 900, 0, 0, kind=k)) for k in ("numbers", "words", "uuids")
    ]
    backend.train_from_iterator(texts * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path


def recipe_of(*data: dict[str, Any], **fields: Any) -> Recipe:
    return Recipe.from_dict({"name": "test", "sequence_length": 192, "data": list(data), **fields})


def mixture_of(tmp_path: Path, *data: dict[str, Any], **fields: Any) -> Mixture:
    return build_mixture(recipe_of(*data, **fields), make_tokenizer(), cache_dir=tmp_path / "cache")


def same(a: PackedSequence, b: PackedSequence) -> bool:
    return same_batch(Batch.stack([a]), Batch.stack([b]))


def same_batch(mine: Batch, theirs: Batch) -> bool:
    return mine.sources == theirs.sources and all(
        torch.equal(tensor, theirs.tensors()[name]) for name, tensor in mine.tensors().items()
    )


class Numbers:
    """A source whose sequences name themselves."""

    def __init__(self, name: str) -> None:
        self.name = name

    def sequence(self, index: int) -> PackedSequence:
        return PackedSequence(
            np.full(4, index), np.ones(4, np.float32), np.zeros(4, np.bool_), f"{self.name}{index}"
        )

    def describe(self) -> dict[str, Any]:
        return {"sha256": self.name}


def numbers(*weights: float, seed: int = 0) -> Mixture:
    return Mixture([(Numbers(chr(ord("a") + i)), weight) for i, weight in enumerate(weights)], 4, seed)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 5))
def test_proportions_are_exact_after_each_round(weights: list[int], seed: int) -> None:
    mixture, total = numbers(*(weight / 8 for weight in weights), seed=seed), sum(weights)
    for turn in range(2):
        given_ = Counter(mixture.turn(i)[0] for i in range(turn * total, (turn + 1) * total))
        assert [given_[i] for i in range(len(weights))] == weights
    counts = np.zeros(len(weights))
    for i in range(total):
        counts[mixture.turn(i)[0]] += 1
        ahead = counts - np.array(weights) * (i + 1) / total
        assert abs(ahead).max() < 2


@given(st.lists(st.integers(0, 60), min_size=1, max_size=20))
def test_any_order_gives_what_the_sequential_order_gives(indices: list[int]) -> None:
    sequential = [numbers(1, 2, 0.5).sequence(i).source for i in range(61)]
    mixture = numbers(1, 2, 0.5)
    assert [mixture.sequence(i).source for i in indices] == [sequential[i] for i in indices]
    by_source = [[s for s in sequential if s[0] == name] for name in "abc"]
    assert by_source == [
        [f"{name}{i}" for i in range(len(s))] for name, s in zip("abc", by_source, strict=True)
    ]


def test_the_seed_orders_equal_claims() -> None:
    firsts = {numbers(1, 1, 1, seed=seed).sequence(0).source for seed in range(20)}
    assert firsts == {"a0", "b0", "c0"}


def test_decimal_weights_do_not_drift() -> None:
    mixture = numbers(0.1, 0.2, 0.7)
    for start in range(0, 1000, 10):
        assert Counter(mixture.turn(i)[0] for i in range(start, start + 10)) == {0: 1, 1: 2, 2: 7}


def test_shuffled_is_a_fixed_permutation() -> None:
    order = shuffled(1000, 7)
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() != shuffled(1000, 8).tolist()
    # Held fast, since a resumed run relies on it whatever the version of numpy.
    assert shuffled(8, 0).tolist() == [2, 4, 6, 5, 1, 7, 0, 3]
    assert seed_of(0, "text") == 2221655281673227970


@pytest.mark.parametrize("pieces", [[25], [3, 0, 14, 8], [10, 10, 5], [1] * 25])
def test_windows_cover_the_text_once_each_time_round(pieces: list[int]) -> None:
    flat = np.arange(25, dtype=np.uint16)
    arrays = np.split(flat, np.cumsum(pieces)[:-1])
    source = WindowSource("text", arrays, 4, 3, {})
    epochs = [[source.sequence(6 * epoch + i).input_ids.tolist() for i in range(6)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == flat[:24].reshape(6, 4).tolist()
    assert epochs[0] != epochs[1] != epochs[2]
    first = source.sequence(0)
    assert first.loss_weight.tolist() == [0, 1, 1, 1]
    assert not first.is_answer.any()
    assert first.input_ids.dtype == np.int64


def test_text_windows_hold_the_files_with_eos_between(tmp_path: Path, tokenizer: Any) -> None:
    texts = [PROSE[:700], PROSE[800:1500], PROSE[1700:2500]]
    lines = "\n".join(json.dumps({"text": text}) for text in texts[:2])
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.txt").write_text(texts[2], encoding="utf-8")
    data = {"provider": "text", "path": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")]}
    mixture = mixture_of(tmp_path, data, sequence_length=16)
    source: Any = mixture._sources[0]
    stream = [t for w in range(source.num_windows) for t in source._slice(16 * w, 16).tolist()]
    parts = tokenizer.decode(stream).split("<eos>")
    assert parts[:2] == texts[:2]
    assert texts[2].startswith(parts[2])
    assert sum(mixture.sequence(i).input_ids.tolist().count(0) for i in range(source.num_windows)) >= 2


def samples_of(sequence: PackedSequence, tokenizer: Any) -> Iterator[tuple[str, str, PackedSequence]]:
    """Yield the prompt and answer of each sample in a sequence, with its part of the arrays."""
    start = 0
    for end in np.flatnonzero(sequence.input_ids == tokenizer.eos_token_id) + 1:
        if end - start > 1:
            part = slice(start, int(end))
            ids, is_answer = sequence.input_ids[part], sequence.is_answer[part]
            border = int(np.argmax(is_answer))
            assert is_answer[border:].all()
            assert not is_answer[:border].any()
            piece = PackedSequence(ids, sequence.loss_weight[part], is_answer, sequence.source)
            yield tokenizer.decode(ids[:border]), tokenizer.decode(ids[border:]), piece
        start = int(end)


@pytest.mark.parametrize("provider", ["passkey", "needle"])
def test_task_samples(tmp_path: Path, tokenizer: Any, prose: Path, provider: str) -> None:
    data: dict[str, Any] = {"provider": provider, "min_sample_tokens": 100}
    if provider == "needle":
        data["path"] = str(prose)
    length = 400
    mixture = mixture_of(
        tmp_path,
        data,
        sequence_length=length,
        recovery={"answer_weight": 3, "context_weight": 0.5},
    )
    assert mixture.has_task_data
    lengths, values, packed = [], [], []
    for i in range(12):
        sequence = mixture.sequence(i)
        assert sequence.input_ids.shape == (length,)
        found = list(samples_of(sequence, tokenizer))
        packed.append(len(found))
        used = 0
        for prompt, answer, part in found:
            weights = part.loss_weight.copy()
            if used == 0:
                assert weights[0] == 0
                weights[0] = 0.5
            assert (weights == np.where(part.is_answer, np.float32(3), np.float32(0.5))).all()
            value = answer.removesuffix("<eos>").strip().removesuffix(".")
            assert re.search(rf"\b{re.escape(value)}\b", prompt)
            assert not held_out(value)
            assert prompt.endswith("The pass key is" if provider == "passkey" else "provided text is")
            used += len(part.input_ids)
            lengths.append(len(part.input_ids))
            values.append(value)
        rest = slice(used, None)
        assert (sequence.input_ids[rest] == tokenizer.eos_token_id).all()
        assert not sequence.loss_weight[rest].any()
        assert not sequence.is_answer[rest].any()
    assert min(packed) >= 1
    assert max(packed) > 1
    assert min(lengths) < 300 < max(lengths)
    assert len(set(values)) == len(values)
    if provider == "needle":
        kinds = Counter("uuids" if len(v) == 36 else "numbers" if v.isdecimal() else "words" for v in values)
        assert set(kinds) == {"numbers", "words", "uuids"}
        assert kinds["numbers"] == max(kinds.values())


def test_a_sequence_too_short_for_a_sample(tmp_path: Path) -> None:
    mixture = mixture_of(tmp_path, {"provider": "passkey", "min_sample_tokens": 8}, sequence_length=32)
    with pytest.raises(DataError, match="passkey question takes"):
        mixture.sequence(0)


def test_needles_lie_in_the_recipes_own_text(tmp_path: Path, tokenizer: Any, prose: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"body": "Zebras sleep. " * 200}), encoding="utf-8")
    needle = {"provider": "needle", "value_kinds": ["numbers"]}
    text = {"provider": "text", "path": str(other), "text_field": "body"}
    mixture = mixture_of(tmp_path, needle, text)
    decoded = [tokenizer.decode(s.input_ids) for s in map(mixture.sequence, range(4)) if s.source == "needle"]
    assert all("Zebras sleep" in one for one in decoded)
    record = mixture.describe()["sources"][0]
    assert record["files"] == [
        {"name": "other.jsonl", "sha256": hashlib.sha256(other.read_bytes()).hexdigest()}
    ]


def test_needles_lie_in_every_haystack_asked_for(tmp_path: Path, tokenizer: Any, prose: Path) -> None:
    options = {"value_kinds": ["numbers"], "haystacks": ["noise", "needle"], "num_keys": [1, 3]}
    mixture = mixture_of(tmp_path, {"provider": "needle", **options}, sequence_length=512)
    texts = [tokenizer.decode(mixture.sequence(index).input_ids) for index in range(12)]
    assert any("The grass is green" in text for text in texts)
    assert any("The grass is green" not in text for text in texts)
    assert all("special magic number" in text for text in texts)
    record = mixture.describe()["sources"][0]
    assert {name: record[name] for name in options} == options
    again = mixture_of(tmp_path, {"provider": "needle", **options, "num_keys": [3]}, sequence_length=512)
    assert again.describe()["sources"][0]["sha256"] != record["sha256"]


def three_sources(prose: Path) -> list[dict[str, Any]]:
    return [
        {"provider": "text", "path": str(prose), "weight": 2},
        {"provider": "passkey", "answer_kl_weight": 0.5},
        {"provider": "needle", "min_sample_tokens": 120},
    ]


def test_random_access_equals_sequential(tmp_path: Path, prose: Path) -> None:
    one, other = (mixture_of(tmp_path, *three_sources(prose)) for _ in range(2))
    expected = [one.sequence(i) for i in range(12)]
    for i in (11, 0, 5, 5, 3, 10, 1):
        assert same(other.sequence(i), expected[i])


def test_a_batch_shared_by_two_processes_is_the_same_batch(tmp_path: Path, prose: Path) -> None:
    whole = mixture_of(tmp_path, *three_sources(prose)).batch(4, 8)
    parts = [mixture_of(tmp_path, *three_sources(prose)).batch(4 + 4 * rank, 4) for rank in range(2)]
    assert whole.tensors().keys() == {"input_ids", "loss_weight", "is_answer", "kl_factor"}
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, torch.cat([part.tensors()[name] for part in parts]))
    assert whole.sources == parts[0].sources + parts[1].sources
    assert (whole.input_ids.dtype, whole.loss_weight.dtype) == (torch.int64, torch.float32)
    assert whole.is_answer.dtype == torch.bool
    assert whole.to("cpu").sources == whole.sources


def test_batches_made_ahead_are_the_same(tmp_path: Path, prose: Path) -> None:
    one, other = (mixture_of(tmp_path, *three_sources(prose)) for _ in range(2))
    requests = [(2, 3, 1), (5, 1, 4), (8, 3, 2), (8, 3, 1)]
    ahead = list(one.batches(requests))
    assert [tuple(batch.input_ids.shape) for batch in ahead] == [(3, 192), (1, 768), (3, 384), (3, 192)]
    for request, batch in zip(requests, ahead, strict=True):
        expected = other.batch(*request)
        assert same_batch(batch, expected)
    assert list(one.batches([])) == []


def test_an_error_in_the_data_reaches_who_asked(tmp_path: Path) -> None:
    mixture = mixture_of(tmp_path, {"provider": "passkey", "min_sample_tokens": 8}, sequence_length=32)
    with pytest.raises(DataError, match="passkey question takes"):
        list(mixture.batches([(0, 1, 1)]))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), st.integers(0, 5))
def test_turns_of_weight_zero_never_come(weights: list[int], seed: int) -> None:
    turns, total = Turns([weight / 4 for weight in weights], seed), sum(weights)
    found = [turns.turn(i) for i in range(3 * total)]
    assert Counter(number for number, _ in found) == {i: 3 * w for i, w in enumerate(weights) if w}
    for number in range(len(weights)):
        locals_ = [local for other, local in found if other == number]
        assert locals_ == list(range(len(locals_)))
    again = Turns([weight / 4 for weight in weights], seed)
    assert again.turn(total - 1) == found[total - 1]


def test_long_sequences_have_turns_of_their_own(tmp_path: Path, prose: Path) -> None:
    data = [
        {"provider": "text", "path": str(prose), "carried_weight": 0},
        {"provider": "passkey", "weight": 1, "carried_weight": 3},
        {"provider": "needle", "weight": 2, "min_sample_tokens": 120},
    ]
    mixture, plain = mixture_of(tmp_path, *data), mixture_of(tmp_path, *three_sources(prose))
    short = Counter(mixture.sequence(i).source for i in range(8))
    assert short == {"text": 2, "passkey": 2, "needle": 4}
    long = Counter(mixture.sequence(i, 2).source for i in range(10))
    assert long == {"passkey": 6, "needle": 4}
    # Where nothing is said, long sequences come from the same sources as short ones.
    assert [plain.sequence(i, 2).source for i in range(8)] == [plain.sequence(i).source for i in range(8)]


@pytest.mark.parametrize("num_segments", [2, 3, 7])
def test_long_windows_are_the_text_itself(num_segments: int) -> None:
    flat = np.arange(26, dtype=np.uint16)
    source = WindowSource("text", np.split(flat, [7, 7, 20]), 4, 3, {})
    wanted = 4 * num_segments
    starts = set()
    for i in range(12):
        sequence = source.long_sequence(i, num_segments)
        ids = sequence.input_ids
        assert (ids.shape, ids.dtype) == ((wanted,), np.int64)
        assert sequence.loss_weight.tolist() == [0] + [1] * (wanted - 1)
        starts.add(int(ids[0]))
        if wanted <= len(flat):
            assert ids.tolist() == list(range(ids[0], ids[0] + wanted))
            # The window that this number has when it is short is in it.
            assert set(source.sequence(i).input_ids.tolist()) <= set(ids.tolist())
        else:
            assert ids.tolist() == (list(range(26)) * 2)[:wanted]
    assert starts == {max(min(4 * window, 26 - wanted), 0) for window in range(6)}


@pytest.mark.parametrize("provider", ["passkey", "needle"])
def test_long_task_samples_end_in_their_answer(
    tmp_path: Path, tokenizer: Any, prose: Path, provider: str
) -> None:
    data = {"provider": provider, **({"path": str(prose)} if provider == "needle" else {})}
    weights = {"recovery": {"answer_weight": 3, "context_weight": 0.5}}
    mixture = mixture_of(tmp_path, data, sequence_length=200, **weights)
    values = []
    for i, num_segments in ((0, 2), (1, 2), (1, 4), (2, 8)):
        sequence = mixture.sequence(i, num_segments)
        length = 200 * num_segments
        assert sequence.input_ids.shape == (length,)
        border = int(np.argmax(sequence.is_answer))
        assert length - border < 60
        assert sequence.is_answer[border:].all()
        assert sequence.loss_weight.tolist() == [0.0] * border + [3.0] * (length - border)
        assert sequence.input_ids[-1] == tokenizer.eos_token_id
        front = int(np.argmax(sequence.input_ids != tokenizer.eos_token_id))
        assert front < 80, "a sample fills its sequence but for a sentence"
        assert not (sequence.input_ids[front:-1] == tokenizer.eos_token_id).any()
        value = tokenizer.decode(sequence.input_ids[border:]).removesuffix("<eos>").strip().removesuffix(".")
        assert value in tokenizer.decode(sequence.input_ids[front:border])
        assert not held_out(value)
        values.append(value)
    short = [tokenizer.decode(mixture.sequence(i).input_ids) for i in range(3)]
    assert not any(value in text for value in values for text in short)
    again = mixture_of(tmp_path, data, sequence_length=200, **weights)
    assert same(mixture.sequence(1, 2), again.sequence(1, 2))


def digest_of(mixture: Mixture) -> str:
    batch = mixture.batch(0, 8)
    content = b"".join(tensor.numpy().tobytes() for tensor in batch.tensors().values())
    return hashlib.sha256(content + json.dumps(mixture.describe()).encode()).hexdigest()


def test_another_process_makes_the_same_data(tmp_path: Path, prose: Path) -> None:
    expected = digest_of(mixture_of(tmp_path, *three_sources(prose)))
    # The tokenizer is handed over, since training one anew need not give the same merges.
    make_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    code = """
import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])
import test_data_mixture as t
place = Path(sys.argv[2])
tokenizer = t.PreTrainedTokenizerFast(tokenizer_file=str(place / "tokenizer.json"), eos_token="<eos>")
t.make_tokenizer = lambda: tokenizer
print(t.digest_of(t.mixture_of(place / "fresh", *t.three_sources(place / "prose.txt"))))
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "4242", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert run.stdout.strip() == expected


def test_the_seed_changes_everything(tmp_path: Path, prose: Path) -> None:
    one = mixture_of(tmp_path, *three_sources(prose)).batch(0, 4)
    other = mixture_of(tmp_path, *three_sources(prose), seed=1).batch(0, 4)
    for i, source in enumerate(one.sources):
        mine, theirs = one.input_ids[i], other.input_ids[other.sources.index(source)]
        assert not torch.equal(mine, theirs)


def test_the_record(tmp_path: Path, prose: Path) -> None:
    record = mixture_of(tmp_path, *three_sources(prose)).describe()
    assert json.loads(json.dumps(record)) == record
    assert str(tmp_path) not in json.dumps(record)
    assert [(s["name"], s["share"]) for s in record["sources"]] == [
        ("text", 0.5),
        ("passkey", 0.25),
        ("needle", 0.25),
    ]
    hashes = [record["sha256"], *(source["sha256"] for source in record["sources"])]
    assert len(set(hashes)) == 4
    assert record["has_task_data"]
    prose.write_text(PROSE + " More.", encoding="utf-8")
    assert mixture_of(tmp_path, *three_sources(prose)).describe()["sha256"] != record["sha256"]


def test_sources_of_one_provider_get_names_of_their_own(tmp_path: Path) -> None:
    passkey = {"provider": "passkey"}
    mixture = mixture_of(tmp_path, passkey, passkey, {**passkey, "name": "far"})
    assert [source["name"] for source in mixture.describe()["sources"]] == ["passkey", "passkey-2", "far"]
    first, second = (mixture._sources[i].sequence(0) for i in (0, 1))
    assert not np.array_equal(first.input_ids, second.input_ids)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"^data\.1 \(text\): .*is empty"),
        (b"too short", r"^data\.1 \(text\): .*holds \d+ tokens, fewer than one sequence of 192"),
        (b"\xff", r"^data\.1 \(text\): .*not UTF-8"),
        (None, r"^data\.1 \(text\): There is no file"),
    ],
)
def test_text_that_cannot_be_used(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        mixture_of(tmp_path, {"provider": "passkey"}, {"provider": "text", "path": str(path)})


def test_the_teachers_own_text(tmp_path: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    calls = []

    def teacher() -> LlamaForCausalLM:
        calls.append(1)
        return LlamaForCausalLM(config).eval()

    recipe = recipe_of({"provider": "teacher", "num_tokens": 90}, sequence_length=16, precision="float32")
    assert Recipe(name="x").data[0].provider == "teacher"
    built = [
        build_mixture(recipe, tokenizer, cache_dir=tmp_path, teacher=teacher, teacher_fingerprint="f")
        for _ in range(2)
    ]
    assert len(calls) == 1
    assert torch.equal(built[0].batch(0, 6).input_ids, built[1].batch(0, 6).input_ids)
    # Sequences are the sampled rows themselves, so each begins as a document does.
    assert (built[0].batch(0, 6).input_ids[:, 0] == tokenizer.eos_token_id).all()
    assert not built[0].has_task_data
    with pytest.raises(ConfigurationError, match="no teacher is given"):
        build_mixture(recipe, tokenizer, cache_dir=tmp_path)


def test_a_sample_that_does_not_fit_is_drawn_again(tokenizer: Any) -> None:
    """One in many thousands, at whose place a run of many hours would stop each time that it is resumed."""
    drawn: list[tuple[int, str]] = []

    def pairs(fits: Callable[[int], bool]) -> Any:
        def make(tokenizer: Any, max_tokens: int, seed: int, rng: random.Random) -> list[tuple[str, str]]:
            drawn.append((seed, rng.choice("abcdefgh")))
            if not fits(len(drawn)):
                raise DataError("too long, this one")
            return [(f"What is {seed % 1000}?", drawn[-1][1])]

        return make

    def source(fits: Callable[[int], bool]) -> TaskSource:
        weights = {"answer_weight": 1.0, "context_weight": 0.1}
        options: dict[str, Any] = {"min_sample_tokens": 128, **weights, "record": {}}
        return TaskSource("task", pairs(fits), tokenizer, 128, 0, **options)

    for make in (lambda one: one.sequence(5), lambda one: one.long_sequence(5, 2)):
        drawn.clear()
        plain = make(source(lambda number: True))
        again = make(source(lambda number: number in (3, 4)))
        first, *others = drawn
        assert others[0] == first
        assert len({seed for seed, _ in others}) == len(others) == 2
        assert {choice for _, choice in drawn} == {first[1]}  # or what is seldom too long would be less often
        assert again.input_ids.shape == plain.input_ids.shape
        assert not same(again, plain)
        drawn.clear()
        with pytest.raises(DataError, match=r"^too long, this one$"):
            make(source(lambda number: False))
        assert 10 < len(drawn) < 50


class Rows:
    """What `datasets.load_dataset(..., streaming=True)` returns, and how often it was read."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.passes = rows, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.passes += 1
        return iter(self.rows)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    given: dict[str, Any] = {}

    def load_dataset(name: str, subset: str | None, **options: Any) -> Rows:
        if name not in given:
            raise FileNotFoundError(f"no data set {name}")
        given["call"] = (name, subset, options)
        rows: Rows = given[name]
        return rows

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return given


def test_a_data_set_is_streamed_in_order_and_begins_again(tmp_path: Path, tokenizer: Any, hub: Any) -> None:
    texts = [PROSE[start : start + 200] for start in range(0, 1000, 200)]
    hub["some/set"] = Rows([{"body": text} for text in texts])
    data = {"provider": "hub", "dataset": "some/set", "text_field": "body", "revision": "abc"}
    mixture = mixture_of(tmp_path, data, sequence_length=16)
    assert hub["call"] == ("some/set", None, {"split": "train", "revision": "abc", "streaming": True})
    stream = [t for i in range(40) for t in mixture.sequence(i).input_ids.tolist()]
    decoded = tokenizer.decode(stream)
    assert decoded.startswith("<eos>".join(texts) + "<eos>" + texts[0])
    assert hub["some/set"].passes >= 2
    resumed = mixture_of(tmp_path, data, sequence_length=16)
    assert same(resumed.sequence(37), mixture.sequence(37))
    assert same(resumed.sequence(36), mixture.sequence(36))
    long = mixture.sequence(5, 3)
    assert long.input_ids.tolist() == stream[5 * 16 : 8 * 16]
    assert (long.source, long.loss_weight.sum()) == ("hub", 3 * 16 - 1)
    resumed._sources[0]._short._recent.clear()  # type: ignore[attr-defined]
    assert same(resumed.sequence(2), mixture.sequence(2))
    record = mixture.describe()["sources"][0]
    assert (record["dataset"], record["revision"]) == ("some/set", "abc")


def test_long_sequences_and_short_ones_do_not_begin_a_data_set_anew(tmp_path: Path, hub: Any) -> None:
    """Of a source that gives few of one kind and most of the other, they are soon far apart."""
    hub["some/set"] = Rows([{"text": PROSE}] * 40)
    data = (
        {"provider": "hub", "dataset": "some/set", "weight": 1, "carried_weight": 9},
        {"provider": "passkey", "weight": 9, "carried_weight": 1, "min_sample_tokens": 16},
    )
    mixture = mixture_of(tmp_path, *data, sequence_length=16)
    steps = [step for step in range(1000) if mixture.turn(step)[0] == 0]
    longs = [step for step in range(1000) if mixture._carried_turns.turn(step)[0] == 0]
    assert (len(steps), len(longs)) == (100, 900)
    in_order = [mixture.sequence(step) for step in steps], [mixture.sequence(step, 2) for step in longs]
    hub["some/set"].passes = 0
    mixture = mixture_of(tmp_path, *data, sequence_length=16)
    found: tuple[list[PackedSequence], list[PackedSequence]] = [], []
    for step in range(1000):
        if step in steps:
            found[0].append(mixture.sequence(step))
        if step in longs:
            found[1].append(mixture.sequence(step, 2))
    for mine, theirs in zip(found, in_order, strict=True):
        assert all(same(a, b) for a, b in zip(mine, theirs, strict=True))
    assert hub["some/set"].passes == 2


def test_data_sets_that_cannot_be_used(tmp_path: Path, hub: Any) -> None:
    hub["short"], hub["other"] = Rows([{"text": "a"}]), Rows([{"txt": "a"}])
    with pytest.raises(
        DataError, match=r"^data\.0 \(hub\): The data set 'gone' cannot be opened: no data set gone"
    ):
        mixture_of(tmp_path, {"provider": "hub", "dataset": "gone"})
    with pytest.raises(DataError, match="'short' holds less text than one sequence of 192 tokens"):
        mixture_of(tmp_path, {"provider": "hub", "dataset": "short"}).sequence(0)
    with pytest.raises(DataError, match=r"no text in a field 'text'; it has 'txt'.*Did you mean 'txt'\?"):
        mixture_of(tmp_path, {"provider": "hub", "dataset": "other"}).sequence(0)


def test_streaming_needs_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lawcat\[distill\]'") as caught:
        mixture_of(tmp_path, {"provider": "hub", "dataset": "some/set"})
    assert isinstance(caught.value, LawcatError)
