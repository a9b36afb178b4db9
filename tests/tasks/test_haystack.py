import gzip
import hashlib
import json
import lzma

import pytest

from lawcat.errors import DataError
from lawcat.tasks.haystack import TextSource, builtin_source, file_source, noise_source, resolve_source


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
        ("cut.txt.gz", gzip.compress(b"text " * 1000)[:-20], "cannot be read"),
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
