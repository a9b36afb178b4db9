"""What is worth keeping between runs: token arrays under a cache folder, named by the hash of what made
them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lawcat.files import write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fingerprint_of(**parts: Any) -> str:
    """Return the SHA-256 of named JSON values, the same on every machine.

    Example:
        >>> fingerprint_of(a=1, b=2) == fingerprint_of(b=2, a=1)
        True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of what decides how a tokenizer cuts text.

    Args:
        tokenizer: Any tokenizer of transformers.

    Returns:
        64 hexadecimal digits.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        rules = json.loads(backend.to_str())
        # A call with padding or truncation leaves these behind in the object.
        rules.pop("padding", None)
        rules.pop("truncation", None)
    return fingerprint_of(rules=rules, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id)


def load_tokens(path: Path) -> NDArray[Any] | None:
    """Return the array that `save_tokens` wrote, mapped from disk, or None if there is none that can be
    read."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    # Truncated to less than its header says, numpy refuses; an array of another kind is not ours.
    return array if array.ndim == 1 and array.dtype.kind == "u" else None


def save_tokens(path: Path, tokens: NDArray[Any]) -> None:
    """Write a token array whole or not at all.

    Raises:
        LawcatError: if it cannot be written, as on a full disk.
    """
    write_atomic(path, lambda file: np.save(file, tokens, allow_pickle=False))


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """Return the smallest type that holds every token of a vocabulary.

    Example:
        >>> token_dtype(49152).__name__
        'uint16'
    """
    return np.uint16 if vocab_size <= 2**16 else np.uint32
