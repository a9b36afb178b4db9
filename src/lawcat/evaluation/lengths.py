"""Lengths as users write them."""

from __future__ import annotations

import re

from lawcat.errors import ConfigurationError


def parse_length(text: str | int, *, least: int = 1) -> int:
    """Return a number of tokens from `1024`, `"1024"`, `"1k"`, `"8K"` or `"1.5k"`; k means 1,024.

    Args:
        text: What the user wrote.
        least: The smallest that may be; 0 where a task has samples of no nominal length.

    Returns:
        Tokens.

    Raises:
        ConfigurationError: for anything else.

    Example:
        >>> parse_length("8K"), parse_length("1_000"), parse_length(256)
        (8192, 1000, 256)
    """
    match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)\s*(k?)\s*", str(text), re.IGNORECASE)
    tokens = float(match.group(1).replace("_", "")) * (1024 if match.group(2) else 1) if match else -1.0
    if tokens < least or tokens != int(tokens):
        raise ConfigurationError(
            f"{text!r} is not a length. Write whole tokens such as 1024, or 1k, 8K, 16k; k is 1,024."
            f"{_meant(text)}"
        )
    return int(tokens)


def _meant(text: object) -> str:
    # "8kb", "8 kilo", "16K tokens": the unit is clear; "1m" is not meant as 1k, but it can be written so.
    match = re.fullmatch(r"\s*(\d+)\s*(k|m)[\s\w]*", str(text), re.IGNORECASE)
    if match is None:
        return ""
    number, unit = int(match.group(1)), match.group(2).lower()
    return f" Did you mean {f'{number}k' if unit == 'k' else f'{1024 * number}k'!r}?"


def parse_lengths(text: str, *, least: int = 1) -> list[int]:
    """Return the lengths of a comma-separated list, in its order, each once.

    Args:
        text: Such as `"1024,2k,8K"`.
        least: As in `parse_length`.

    Returns:
        Tokens.

    Raises:
        ConfigurationError: if the list is empty or holds something else.

    Example:
        >>> parse_lengths("1024, 2k,1k")
        [1024, 2048]
    """
    parts = [part for part in text.split(",") if part.strip()]
    if not parts:
        raise ConfigurationError(f"{text!r} holds no length. Write for example 1024,2k,8k.")
    return list(dict.fromkeys(parse_length(part, least=least) for part in parts))


def format_length(tokens: int) -> str:
    """Return the short form of a length.

    Example:
        >>> format_length(8192), format_length(1000)
        ('8K', '1000')
    """
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
