"""The text around a needle: a noise sentence, files, a hub data set, or an excerpt that ships with us."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import IO, Any

from lawcat.errors import DataError, MissingDependencyError

NOISE_SENTENCE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The filler of passkey retrieval and of RULER's `noise` haystack."""

BUILTIN_NAME = "emerson-excerpt"
HUB_PREFIX = "hf:"
MAX_HUB_CHARS = 64_000_000
"""Where reading a data set stops: more text than any haystack takes."""

_SUFFIXES = (".txt", ".md", ".jsonl")
_COMPRESSED = (".gz", ".xz")


@dataclass(frozen=True, eq=False)
class TextSource:
    """A text with a name and a hash, so that results can say what the needle lay in.

    Args:
        name: What results call it: `"noise"`, `"emerson-excerpt"` or the names of the files.
        text: All of it.

    Example:
        >>> noise_source().words(3)
        (['The', 'grass', 'is'], 0)
    """

    name: str
    text: str

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the text as UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def describe(self) -> dict[str, str]:
        """Return what results record of this source: its name and hash."""
        return {"name": self.name, "sha256": self.sha256}

    def words(self, count: int) -> tuple[list[str], int]:
        """Return the first `count` words, and how often the text had to start over for them.

        Args:
            count: How many words, split at white space as RULER does.

        Returns:
            The words, and 0 if the text was long enough.

        Raises:
            DataError: if the text holds no word.
        """
        words = list(islice(self._iterate_words(), count))
        if count and not words:
            raise DataError(f"The text {self.name!r} holds no words, so nothing can be hidden in it.")
        own = len(words)
        while len(words) < count:
            words.extend(words[: min(own, count - len(words))])
        return words, (count - 1) // own if own else 0

    def _iterate_words(self) -> Iterator[str]:
        # Lazily: splitting a corpus of tens of megabytes for the sake of its first page costs half a
        # gigabyte.
        return (match.group() for match in re.finditer(r"\S+", self.text))


@lru_cache(maxsize=1)
def noise_source() -> TextSource:
    """Return the noise sentence as a source."""
    return TextSource("noise", NOISE_SENTENCE)


@lru_cache(maxsize=1)
def builtin_source() -> TextSource:
    """Return the prose that ships with lawcat: about 120 KB of Emerson's essays, in the public domain.

    It is for evaluation alone. Training data must come from other text.

    Example:
        >>> builtin_source().name
        'emerson-excerpt'
    """
    text = files("lawcat.tasks").joinpath("data/emerson_excerpt.txt").read_text(encoding="utf-8")
    return TextSource(BUILTIN_NAME, text)


def file_source(pattern: str | os.PathLike[str]) -> TextSource:
    """Return the text of one file, or of all files of a glob in order of their names.

    Args:
        pattern: A path or a glob. `.txt` and `.md` are read as they are, `.jsonl` holds an object with a
            `"text"` a line; any of them may be compressed as `.gz` or `.xz`. A file with another ending is
            read as text.

    Returns:
        The source, named after the files without their folders. Texts are joined by an empty line.

    Raises:
        DataError: if nothing is found, or a file is empty, unreadable, not UTF-8 or not JSONL with a
            `"text"`.
    """
    pattern = os.fspath(pattern)
    if os.path.isdir(pattern):
        raise DataError(
            f"{pattern!r} is a folder. Name the files in it, for example '{Path(pattern) / '*.txt'}'."
        )
    paths = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
    paths = [path for path in paths if os.path.isfile(path)]
    if not paths:
        raise DataError(
            f"No file found for {pattern!r}. Give a text file or a quoted glob such as 'essays/*.txt'."
        )
    text = "\n\n".join("\n\n".join(read_texts(path)) for path in paths)
    name = os.path.basename(pattern) + (f" ({len(paths)} files)" if len(paths) > 1 else "")
    return TextSource(name, text)


@lru_cache(maxsize=4)
def hub_source(dataset: str) -> TextSource:
    """Return the texts of a data set of the hub, in its order, up to 64 million characters.

    Args:
        dataset: `"owner/name"`, then if need be `":subset"`, `"@revision"` and `"#split"`, in this order,
            such as `"deepmind/pg19#test"`. Without a split it is `"train"`. A commit as revision makes the
            text reproducible. Rows hold it in a field `"text"`.

    Returns:
        The source, named `"hf:..."`. Texts are joined by an empty line.

    Raises:
        MissingDependencyError: if the package `datasets` is not installed.
        DataError: if the name is malformed, the data set cannot be opened or read, or has no text.

    Example:
        >>> hub_source("baber/paul_graham_essays").words(3)  # doctest: +SKIP
    """
    match = re.fullmatch(
        r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<subset>[^@#]+))?(?:@(?P<revision>[^#]+))?(?:#(?P<split>.+))?",
        dataset,
    )
    if match is None:
        raise DataError(
            f"{HUB_PREFIX}{dataset} is not the name of a data set. Write {HUB_PREFIX}owner/name, and after "
            "it if need be :subset, @revision and #split."
        )
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("datasets", "distill", f"Reading the data set {dataset!r}") from error
    texts: list[str] = []
    num_chars = 0
    try:
        rows = datasets.load_dataset(
            match["name"],
            match["subset"],
            split=match["split"] or "train",
            revision=match["revision"],
            streaming=True,
        )
        for row in rows:
            texts.append(_text_of_row(row, dataset))
            num_chars += len(texts[-1])
            if num_chars > MAX_HUB_CHARS:
                break
    except DataError:
        raise
    except Exception as error:  # whatever the hub, the network or the data set's own code raises
        raise DataError(
            f"The data set {dataset!r} cannot be read: {error}. It takes a network, and a name, subset, "
            "revision and split that exist. Without a network, give a text file or a glob, or no haystack at "
            "all for the text that ships with lawcat."
        ) from error
    if not num_chars:
        raise DataError(f"The data set {dataset!r} holds no text.")
    return TextSource(f"{HUB_PREFIX}{dataset}", "\n\n".join(texts))


def resolve_source(spec: str | os.PathLike[str] | TextSource | None) -> TextSource:
    """Return the source that an option's value stands for.

    Args:
        spec: None or `"emerson-excerpt"` for the built-in prose, `"noise"` for the noise sentence,
            `"hf:owner/name"` for `hub_source`, else a path or glob for `file_source`. A source is returned as
            it is.

    Returns:
        The source.

    Raises:
        DataError: as `file_source` and `hub_source`.

    Example:
        >>> resolve_source("noise").name
        'noise'
    """
    if isinstance(spec, TextSource):
        return spec
    if spec is None or spec == BUILTIN_NAME:
        return builtin_source()
    if spec == "noise":
        return noise_source()
    if isinstance(spec, str) and spec.startswith(HUB_PREFIX):
        return hub_source(spec.removeprefix(HUB_PREFIX))
    return file_source(spec)


def read_texts(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the texts of one file: the file itself, or for JSONL the `"text"` of each line.

    Args:
        path: A file as `file_source` takes it.

    Yields:
        Text without a byte order mark.

    Raises:
        DataError: if the file is missing, empty, unreadable, not UTF-8 or not JSONL with a `"text"`.
    """
    path = os.fspath(path)
    stem, compression = os.path.splitext(path)
    suffix = os.path.splitext(stem)[1] if compression in _COMPRESSED else compression
    found = False
    try:
        with _open(path, compression) as stream:
            if suffix == ".jsonl":
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        found = True
                        yield _text_of_line(line, path, number)
            else:
                text = stream.read()
                found = bool(text.strip())
                yield text
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (it holds the byte 0x{error.object[error.start]:02x}). "
            f"Give a plain text file; one in Latin-1 is converted by 'iconv -f LATIN1 -t UTF-8'."
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}.") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Check that it is whole and that you may read it."
        ) from error
    if not found:
        raise DataError(f"{path} is empty. Give a file that holds text.")


def _open(path: str, compression: str) -> IO[str]:
    # utf-8-sig drops the mark that some editors put in front, which would become part of the first word.
    if compression == ".gz":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig")
    if compression == ".xz":
        return io.TextIOWrapper(lzma.open(path, "rb"), encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


def _text_of_row(row: dict[str, Any], dataset: str) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        fields = [str(field) for field in row]
        raise DataError(
            f"The data set {dataset!r} has no text in a field 'text'; it has "
            f"{', '.join(map(repr, fields))}. Save its text to a file, and give that."
        )
    return text


def _text_of_line(line: str, path: str, number: int) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {number}: not JSON ({error.msg}). Each line must be an object."
        ) from error
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(map(repr, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise DataError(f"{path}, line {number}: no text under the key 'text' (found: {keys}).")
    return text
