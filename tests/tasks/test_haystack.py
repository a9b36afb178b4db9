import gzip
import hashlib
import json
import lzma
import sys
from types import SimpleNamespace

import pytest

from lawcat.errors import DataError, MissingDependencyError
from lawcat.tasks import haystack
from lawcat.tasks.haystack import (
    TextSource,
    builtin_source,
    file_source,
    hub_source,
    noise_source,
    resolve_source,
)


def test_builtin_prose_ships_with_the_package():
    source = builtin_source()
    assert source.sha256 == "728bc45d34756c469c38854f3a14797f32e803cf5d91e5b7b2b110057e7ebf7e"
    assert 110_000 < len(source.text) < 130_000
    assert source.describe() == {"name": "emerson-excerpt", "sha256": source.sha256}
    words, repeats = source.words(20_000)
    assert words[:5] == ["History", "There", "is", "no", "great"]
    assert (len(words), repeats) == (20_000, 0)


def test_a_short_text_repeats_and_says_so():
    source = TextSource("tiny", " one\n two  three ")
    assert source.words(2) == (["one", "two"], 0)
    assert source.words(3) == (["one", "two", "three"], 0)
    assert source.words(8) == (["one", "two", "three"] * 2 + ["one", "two"], 2)
    assert source.words(0) == ([], 0)
    with pytest.raises(DataError, match="holds no words"):
        TextSource("blank", " \n ").words(1)


def test_files_of_every_kind(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffalpha é", encoding="utf-8")
    (tmp_path / "b.txt").write_text("beta", encoding="utf-8")
    with gzip.open(tmp_path / "c.md.gz", "wt", encoding="utf-8") as file:
        file.write("gamma")
    with lzma.open(tmp_path / "d.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"text": "delta"}) + "\n\n" + json.dumps({"text": "epsilon", "id": 1}) + "\n")
    assert file_source(tmp_path / "a.txt").text == "alpha é"
    assert file_source(tmp_path / "c.md.gz").text == "gamma"
    assert file_source(tmp_path / "d.jsonl.xz").text == "delta\n\nepsilon"
    several = file_source(str(tmp_path / "*.txt"))
    assert (several.name, several.text) == ("*.txt (2 files)", "alpha é\n\nbeta")
    assert several.sha256 == hashlib.sha256("alpha é\n\nbeta".encode()).hexdigest()


def test_resolve_source(tmp_path):
    assert resolve_source(None) is builtin_source()
    assert resolve_source("emerson-excerpt") is builtin_source()
    assert resolve_source("noise") is noise_source()
    (tmp_path / "a.txt").write_text("alpha")
    own = resolve_source(str(tmp_path / "a.txt"))
    assert own.name == "a.txt"
    assert resolve_source(own) is own


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "No file found for"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n ", "is empty"),
        ("latin.txt", "é".encode("latin-1") + b" caf", r"not UTF-8 text \(it holds the byte 0xe9\)"),
        ("empty.jsonl", b"\n", "is empty"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("other.jsonl", b'{"content": "a"}\n', "line 1: no text under the key 'text' .found: 'content'"),
        ("list.jsonl", b"[1]\n", "line 1: no text under the key 'text' .found: list"),
        ("cut.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:-20], "cannot be read"),
        ("wrong.txt.gz", b"not gzip", "cannot be read"),
        ("wrong.txt.xz", b"not xz", "cannot be read"),
    ],
)
def test_unusable_files_are_refused_in_clear_words(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        file_source(tmp_path / name)
    assert name in str(caught.value)


def test_a_folder_is_refused_with_the_way_to_name_its_files(tmp_path):
    with pytest.raises(DataError, match=r"is a folder.*\*\.txt"):
        file_source(tmp_path)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`, with the calls it got."""
    rows = {"rows": [{"text": "alpha"}, {"text": "beta", "url": "x"}], "calls": []}

    def load_dataset(*arguments, **options):
        rows["calls"].append((arguments, options))
        if isinstance(rows["rows"], Exception):
            raise rows["rows"]
        return iter(rows["rows"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    hub_source.cache_clear()
    yield rows
    hub_source.cache_clear()


def test_a_data_set_of_the_hub(hub):
    source = resolve_source("hf:baber/paul_graham_essays")
    assert source.name == "hf:baber/paul_graham_essays"
    assert source.text == "alpha\n\nbeta"
    assert source.sha256 == hashlib.sha256(b"alpha\n\nbeta").hexdigest()
    assert resolve_source("hf:baber/paul_graham_essays") is source
    wanted = {"split": "train", "revision": None, "streaming": True}
    assert hub["calls"] == [(("baber/paul_graham_essays", None), wanted)]
    resolve_source("hf:deepmind/pg19:small@v1.0#test")
    wanted = {"split": "test", "revision": "v1.0", "streaming": True}
    assert hub["calls"][1:] == [(("deepmind/pg19", "small"), wanted)]


def test_a_data_set_is_read_up_to_a_bound(hub, monkeypatch):
    monkeypatch.setattr(haystack, "MAX_HUB_CHARS", 4)
    assert hub_source("a/b").text == "alpha"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ConnectionError("no route to host"), r"'a/b' cannot be read: no route to host.*Without a network"),
        ([{"body": "x"}], r"has no text in a field 'text'; it has 'body'"),
        ([{"text": 3}], r"has no text in a field 'text'"),
        ([], "'a/b' holds no text"),
        ([{"text": ""}], "'a/b' holds no text"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_refused_in_clear_words(hub, rows, message):
    hub["rows"] = rows
    with pytest.raises(DataError, match=message):
        resolve_source("hf:a/b")


@pytest.mark.parametrize("name", ["", "a/b/c", "a b", "a/b#", "a/b@#x"])
def test_a_malformed_name_of_a_data_set(hub, name):
    with pytest.raises(DataError, match=r"not the name of a data set\. Write hf:owner/name"):
        resolve_source(f"hf:{name}")
    assert hub["calls"] == []


def test_without_the_package_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        MissingDependencyError, match=r"Reading the data set 'a/b' needs the package 'datasets'"
    ):
        resolve_source("hf:a/b")
