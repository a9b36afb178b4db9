"""Text files: formats, refusals, documents, the token cache."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lawcat.distill import text as text_module
from lawcat.distill.text import find_files, read_documents, tokenize_documents, tokenize_files
from lawcat.distill.token_cache import load_tokens, token_dtype, tokenizer_fingerprint
from lawcat.errors import ConfigurationError, DataError, LawcatError

WORDS = ["<unk>", "<bos>", "<eos>", "a", "b", "c", "d", "é", "\n"]
EOS = WORDS.index("<eos>")


def make_tokenizer(*, adds_bos: bool = False, eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few words, one token a character."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token=eos, pad_token="<unk>"
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def words(tokens: Any) -> str:
    return "".join("|" if t == EOS else "^" if t == 1 else WORDS[t] for t in tokens)


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".xz":
        data = lzma.compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("compression", ["", ".gz", ".xz"])
@pytest.mark.parametrize("ending", [".txt", ".md", ".jsonl"])
def test_formats(tmp_path: Path, ending: str, compression: str) -> None:
    if ending == ".jsonl":
        content = '{"text": "ab", "other": 1}\n\n{"text": " "}\n{"text": "é"}\n'
        expected = ["ab", "é"]
    else:
        content, expected = "ab\né\n", ["ab\né\n"]
    path = write(tmp_path / f"file{ending}{compression}", content)
    assert list(read_documents(path)) == expected


def test_text_field_and_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"body": "ab"}')
    assert list(read_documents(path, text_field="body")) == ["ab"]
    assert list(read_documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfab"))) == ["ab"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\xffcd", r"a\.txt is not UTF-8 text: byte 0xff at offset 2"),
        ("a.txt.gz", b"ab\xffcd", r"a\.txt\.gz is not UTF-8 text: byte 0xff at offset 2"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xe9"}',
            r"a\.jsonl is not UTF-8 text: byte 0xe9 at offset 24",
        ),
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b" \n\t", r"a\.txt is empty"),
        ("a.jsonl", b"\n\n", r"a\.jsonl is empty"),
        ("a.jsonl.xz", b'{"text": ""}', r"a\.jsonl\.xz is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'"text"', r"a\.jsonl, line 1: holds str"),
        ("a.jsonl", b'{"txt": "a"}', r"line 1: has no field 'text' but 'txt'.*Did you mean 'txt'\?"),
        ("a.jsonl", b'{"text": 3}', r"line 1: the field 'text' holds int, not text"),
        (
            "a.jsonl",
            rb'{"text": "\ud800"}',
            r"line 1: the field 'text' holds an escape that is not a character",
        ),
    ],
)
def test_refusals(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        list(read_documents(path))


@pytest.mark.parametrize("ending", [".gz", ".xz"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "other"])
def test_damaged_archives(tmp_path: Path, ending: str, damage: str) -> None:
    path = write(tmp_path / f"a.txt{ending}", "abcd" * 1000 + "".join(map(chr, range(200, 900))))
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    else:
        data[:] = b"plain text"
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_documents(path))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path / "a.pdf", "a")
    with pytest.raises(DataError, match=r"There is no file .*missing\.txt"):
        find_files([str(tmp_path / "missing.txt")])
    with pytest.raises(DataError, match=r"There is no file .*\*\.txt"):
        find_files([str(tmp_path / "*.txt")])
    with pytest.raises(DataError, match=r"is a folder.*\*\.txt"):
        find_files([str(tmp_path)])
    with pytest.raises(DataError, match=r"a\.pdf has an ending that is not known here. Give \.txt"):
        find_files([str(tmp_path / "a.pdf")])
    with pytest.raises(DataError, match="There is no file"):
        list(read_documents(tmp_path / "missing.txt"))


def test_globs_are_sorted_and_files_come_once(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.md"):
        write(tmp_path / name, "a")
    found = find_files([str(tmp_path / "b.txt"), str(tmp_path / "*.txt"), str(tmp_path / "**" / "*.md")])
    assert [path.name for path in found] == ["b.txt", "a.txt", "c.md"]


def test_documents_are_separated_by_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    assert words(tokenize_documents(tokenizer, iter(["ab", "c", "d"]))) == "ab|c|d|"
    assert words(tokenize_documents(make_tokenizer(adds_bos=True), iter(["ab", "c"]))) == "^ab|^c|"
    assert len(tokenize_documents(tokenizer, iter([]))) == 0


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no end-of-sequence token"):
        tokenize_documents(make_tokenizer(eos=None), iter(["a"]))


def test_a_long_document_in_pieces_has_the_same_tokens(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = ["ab\ncd\n" * 7, "a", "abcd" * 5, "b\n"]
    whole = tokenize_documents(tokenizer, iter(documents))
    monkeypatch.setattr(text_module, "_PIECE_CHARS", 8)
    monkeypatch.setattr(text_module, "_BATCH_CHARS", 20)
    assert tokenize_documents(tokenizer, iter(documents)).tolist() == whole.tolist()


def test_tokens_are_cached(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "ab", "body": "cd"}))
    calls: list[tuple[str, int, int]] = []

    def tokens(tokenizer: PreTrainedTokenizerFast = tokenizer, **options: Any) -> str:
        (file,) = tokenize_files(
            [path],
            tokenizer,
            cache_dir=tmp_path / "cache",
            progress=lambda what, done, total, measured: calls.append((what, done, total)),
            **options,
        )
        assert file.sha256 == text_module.sha256_file(path)
        return words(file.tokens)

    assert tokens() == "ab|"
    assert calls == [("reading a.jsonl", path.stat().st_size, path.stat().st_size)]
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=3)  # leaves traces in the tokenizer
    with monkeypatch.context() as patch:
        patch.setattr(text_module, "tokenize_documents", None)
        assert tokens() == "ab|"
    assert tokens(text_field="body") == "cd|"
    assert tokens(make_tokenizer(adds_bos=True)) == "^ab|"
    write(path, json.dumps({"text": "ba"}))
    assert tokens() == "ba|"
    assert len(list((tmp_path / "cache" / "tokens").glob("*.npy"))) == 4


@pytest.mark.parametrize("keep", [0, 10, 100, 131])
def test_a_damaged_cache_is_made_again(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, keep: int) -> None:
    path = write(tmp_path / "a.txt", "abcd")
    tokenize_files([path], tokenizer, cache_dir=tmp_path)
    (cached,) = (tmp_path / "tokens").glob("*.npy")
    cached.write_bytes(cached.read_bytes()[:keep])
    assert load_tokens(cached) is None
    assert words(tokenize_files([path], tokenizer, cache_dir=tmp_path)[0].tokens) == "abcd|"


def test_a_cache_that_cannot_be_written(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.txt", "abcd")
    with pytest.raises(LawcatError, match="cannot write"):
        tokenize_files([path], tokenizer, cache_dir=path)


def test_the_environment_names_the_cache(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "here"))
    tokenize_files([write(tmp_path / "a.txt", "a")], tokenizer)
    assert list((tmp_path / "here" / "tokens").glob("*.npy"))


def test_token_dtypes() -> None:
    assert token_dtype(2**16) is np.uint16
    assert token_dtype(2**16 + 1) is np.uint32


def test_tokenizer_fingerprints_differ(tokenizer: PreTrainedTokenizerFast) -> None:
    prints = {tokenizer_fingerprint(t) for t in (tokenizer, make_tokenizer(), make_tokenizer(adds_bos=True))}
    assert len(prints) == 2
