"""Whether a tokenizer gives back what a task hides: where it does not, no model can say the answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lawcat.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPHABETS = {
    "numbers": ("1234567", "9080706"),
    "words": ("abcdefghijklm-nopqrstuvwxyz",),
    "uuids": ("01234567-89ab-4cde-8f01-23456789abcd",),
    "capitals": ("ABCDEFGHIJKLM", "NOPQRSTUVWXYZ"),
}
"""Texts that between them hold every character of a kind of value (but for a handful of foreign words)."""

# By tokenizer: the kinds that came back whole.
_known: WeakKeyDictionary[PreTrainedTokenizerBase, set[str]] = WeakKeyDictionary()


def require_round_trip(tokenizer: PreTrainedTokenizerBase, kinds: Iterable[str]) -> None:
    """Check, once for each tokenizer and kind of value, that values survive being encoded and decoded.

    Upper and lower case count alike, as in the metrics.

    Args:
        tokenizer: Any tokenizer of transformers.
        kinds: Keys of `ALPHABETS`.

    Raises:
        DataError: if a value comes back changed, for example with its digits as unknown tokens.

    Example:
        >>> require_round_trip(tokenizer, ["numbers", "uuids"])  # doctest: +SKIP
    """
    known = _known.setdefault(tokenizer, set())
    for kind in kinds:
        if kind in known:
            continue
        for value in ALPHABETS[kind]:
            tokens = tokenizer(f"is {value}.", add_special_tokens=False, verbose=False).input_ids
            # Decoded as answers are: an unknown token is a special one, and vanishes.
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if value.lower() not in text.lower():
                raise DataError(
                    f"The tokenizer cannot hold the {kind} that this task hides: {value!r} comes back as "
                    f"{tokenizer.decode(tokens).strip()!r}, so no model could give the answer. Use the "
                    "tokenizer that the model was trained with, or a task that hides something else."
                )
        known.add(kind)
