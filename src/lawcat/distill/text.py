"""Text files as training data: found, read, tokenized once and kept."""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from lawcat.convert.cache_dir import cache_dir as cache_root
from lawcat.distill.token_cache import (
    fingerprint_of,
    load_tokens,
    save_tokens,
    token_dtype,
    tokenizer_fingerprint,
)
from lawcat.errors import ConfigurationError, DataError, did_you_mean
from lawcat.files import sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called with what is being done, how much of it is done, how much there is in all, and measurements."""

SUFFIXES = (".txt", ".md", ".jsonl")
COMPRESSED = (".gz", ".xz")

# A tokenizer's memory is some ten times its text's, so a book or corpus in one file goes through it in
# pieces.
_PIECE_CHARS = 1 << 20
_BATCH_CHARS = 1 << 20
# Goes up when the same file would give other tokens.
_FORMAT = 1


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that paths and globs stand for, each once, in the order given and by name within a
    glob.

    Args:
        patterns: Paths and globs; `~` is the home folder and `**` any depth of folders.

    Returns:
        At least one path.

    Raises:
        DataError: if a pattern matches no file, or a file's ending is not one that can be read.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        if os.path.isdir(expanded):
            raise DataError(
                f"{pattern} is a folder. Name the files in it, such as '{os.path.join(pattern, '*.txt')}'."
            )
        matches = [expanded] if os.path.isfile(expanded) else sorted(glob.glob(expanded, recursive=True))
        files = [Path(match) for match in matches if os.path.isfile(match)]
        if not files:
            raise DataError(
                f"There is no file {pattern}. Give a text file, or a glob such as 'corpus/*.txt'."
            )
        for file in files:
            _format_of(file)
            found[file] = None
    return list(found)


def read_documents(
    path: str | os.PathLike[str], text_field: str = "text", progress: Progress | None = None
) -> Iterator[str]:
    """Yield the documents of one file: all of a `.txt` or `.md`, or the text of each line of a `.jsonl`.

    Args:
        path: A file with one of these endings, or one of them and `.gz` or `.xz`.
        text_field: The key of a JSONL line's object that holds the text.
        progress: Called as the file is read, in bytes on disk.

    Yields:
        Text that is not blank, without a byte order mark.

    Raises:
        DataError: if the file is missing, empty, damaged, not UTF-8 or not such JSONL; with the byte's offset
            in the decompressed file, or the line.
    """
    path = Path(path)
    suffix, compression = _format_of(path)
    found = False
    try:
        size = path.stat().st_size
        with open(path, "rb") as raw, _decompressed(raw, compression) as stream:
            documents = _lines(stream, path, text_field) if suffix == ".jsonl" else _whole(stream, path)
            for document in documents:
                if progress is not None:
                    progress(f"reading {path.name}", raw.tell(), size, {})
                if document.strip():
                    found = True
                    yield document
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}. Give a text file that exists.") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. Check that it is whole and readable.") from error
    if not found:
        raise DataError(f"{path} is empty. Give a file that holds text.")


def _format_of(path: Path) -> tuple[str, str]:
    """Return a file's ending and that of its compression, which may be none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    if not suffixes or suffixes[-1] not in SUFFIXES:
        raise DataError(
            f"{path} has an ending that is not known here. Give {', '.join(SUFFIXES)}, plain or with "
            f"{' or '.join(COMPRESSED)} after it."
        )
    return suffixes[-1], compression


def _decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    if compression == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if compression == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(raw))
    return raw


def _whole(stream: BinaryIO, path: Path) -> Iterator[str]:
    yield _decode(stream.read(), path, 0)


def _lines(stream: BinaryIO, path: Path, text_field: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        text = _decode(line, path, offset)
        offset += len(line)
        if text.strip():
            yield _field(text, text_field, f"{path}, line {number}")


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {offset + error.start}. "
            "Convert it, for example with: iconv -f LATIN1 -t UTF-8"
        ) from error
    # Some editors put a byte order mark in front, which would become part of the first word.
    return text.removeprefix("\ufeff") if offset == 0 else text


def _field(line: str, text_field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}). Each line must be one object.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: holds {type(row).__name__}. Each line must be one object.")
    if text_field not in row:
        keys = [str(key) for key in row]
        raise DataError(
            f"{where}: has no field {text_field!r} but {', '.join(map(repr, keys)) or 'none'}. "
            f"Set text_field.{did_you_mean(text_field, keys)}"
        )
    if not isinstance(row[text_field], str):
        kind = type(row[text_field]).__name__
        raise DataError(
            f"{where}: the field {text_field!r} holds {kind}, not text. Set text_field to one that does."
        )
    text: str = row[text_field]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can escape half of a surrogate pair, which no tokenizer takes.
        raise DataError(
            f"{where}: the field {text_field!r} holds an escape that is not a character."
        ) from error
    return text


def require_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the end-of-sequence token, which stands between documents.

    Raises:
        ConfigurationError: if the tokenizer has none.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ConfigurationError(
            "The tokenizer has no end-of-sequence token, which lawcat puts between documents. "
            "Set its eos_token."
        )
    return eos


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer itself puts in front of a text: its BOS, or none."""
    front = tokenizer("", verbose=False).input_ids
    return [int(front[0])] if front and front[0] == tokenizer.bos_token_id else []


def tokenize_documents(tokenizer: PreTrainedTokenizerBase, documents: Iterator[str]) -> NDArray[Any]:
    """Return the tokens of all documents in a row, an EOS after each.

    Args:
        tokenizer: Any tokenizer of transformers that has an EOS. If it puts a BOS in front of a text, each
            document begins with one.
        documents: Texts.

    Returns:
        [tokens], uint16 or uint32.
    """
    eos, front = require_eos(tokenizer), leading_tokens(tokenizer)
    dtype = token_dtype(len(tokenizer))
    arrays: list[NDArray[Any]] = []

    def flush(batch: list[tuple[str, bool, bool]]) -> None:
        pieces = [piece for piece, _, _ in batch]
        encoded = tokenizer(pieces, add_special_tokens=False, verbose=False).input_ids if pieces else []
        for ids, (_, first, last) in zip(encoded, batch, strict=True):
            arrays.append(np.array([*(front if first else []), *ids, *([eos] if last else [])], dtype=dtype))

    batch: list[tuple[str, bool, bool]] = []
    chars = 0
    for document in documents:
        pieces = _pieces(document)
        for i, piece in enumerate(pieces):
            batch.append((piece, i == 0, i == len(pieces) - 1))
            chars += len(piece)
            if chars >= _BATCH_CHARS:
                flush(batch)
                batch, chars = [], 0
    flush(batch)
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def _pieces(document: str) -> list[str]:
    """Cut a long document at ends of lines; what a cut changes is a token or two a million."""
    pieces = []
    start = 0
    while len(document) - start > _PIECE_CHARS:
        end = document.rfind("\n", start, start + _PIECE_CHARS) + 1 or start + _PIECE_CHARS
        pieces.append(document[start:end])
        start = end
    return [*pieces, document[start:]]


@dataclass(frozen=True)
class TokenizedFile:
    """A file's tokens.

    Args:
        path: Where the text lies.
        sha256: Of the file as it lies there.
        tokens: [tokens], uint16 or uint32, mapped from the cache.
    """

    path: Path
    sha256: str
    tokens: NDArray[Any]


def tokenize_files(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_field: str = "text",
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> list[TokenizedFile]:
    """Return the tokens of files, from the cache for those that went through this tokenizer before.

    Args:
        paths: As `find_files` returns them.
        tokenizer: As for `tokenize_documents`.
        text_field: As for `read_documents`.
        cache_dir: Root of the cache; see `lawcat.convert.cache_dir.cache_dir`.
        progress: As for `read_documents`; not called for files in the cache.

    Returns:
        One entry a file.

    Raises:
        DataError: as `read_documents`.
        LawcatError: if the cache cannot be written.
    """
    tokenizer_key = tokenizer_fingerprint(tokenizer)
    folder = cache_root(cache_dir) / "tokens"
    tokenized = []
    for path in paths:
        try:
            sha256 = sha256_file(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
        suffix, compression = _format_of(path)
        # The ending belongs to the key, since it decides how the same bytes are read.
        reader = [suffix, compression, text_field if suffix == ".jsonl" else None]
        key = fingerprint_of(format=_FORMAT, file=sha256, tokenizer=tokenizer_key, reader=reader)
        cached = folder / f"{key}.npy"
        tokens = load_tokens(cached)
        if tokens is None:
            tokens = tokenize_documents(tokenizer, read_documents(path, text_field, progress))
            save_tokens(cached, tokens)
            tokens = load_tokens(cached)
            assert tokens is not None
        tokenized.append(TokenizedFile(path, sha256, tokens))
    return tokenized
