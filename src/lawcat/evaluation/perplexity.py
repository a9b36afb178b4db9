"""Perplexity by position: whether a model still uses what it read long ago, and whether it falls apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lawcat.errors import ConfigurationError, DataError
from lawcat.evaluation.answering import reads_in_pieces
from lawcat.tasks import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FIRST_BUCKET = 64
_TOKENS_AT_ONCE = 16_384
_LOGITS_BYTES = 2**30


@dataclass(frozen=True)
class PositionBucket:
    """The tokens predicted at positions `start` to `end` (exclusive) of their windows.

    Args:
        start: First position; the first token of a window, at 0, is given and not predicted.
        end: One past the last.
        num_tokens: How many were predicted.
        nll: Mean negative log-likelihood in nats.
    """

    start: int
    end: int
    num_tokens: int
    nll: float

    @property
    def perplexity(self) -> float:
        """`exp(nll)`, infinite where that is beyond a float."""
        return _exp(self.nll)


@dataclass(frozen=True)
class PerplexityResult:
    """What `perplexity_by_position` found.

    Args:
        length: Tokens of a window.
        num_windows: How many windows were read.
        buckets: By position, each as long as all before it together.
        source: Name and hash of the text.
    """

    length: int
    num_windows: int
    buckets: list[PositionBucket]
    source: dict[str, str]

    @property
    def num_tokens(self) -> int:
        """How many tokens were predicted."""
        return sum(bucket.num_tokens for bucket in self.buckets)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of all of them, in nats."""
        return sum(bucket.nll * bucket.num_tokens for bucket in self.buckets) / self.num_tokens

    @property
    def perplexity(self) -> float:
        """`exp(nll)`, infinite where that is beyond a float."""
        return _exp(self.nll)

    def to_json(self) -> dict[str, Any]:
        """Return what a results file holds of it; a perplexity beyond a float becomes null."""
        return {
            "length": self.length,
            "windows": self.num_windows,
            "tokens": self.num_tokens,
            "nll": _finite(self.nll),
            "perplexity": _finite(self.perplexity),
            "source": self.source,
            "positions": [
                {
                    "start": bucket.start,
                    "end": bucket.end,
                    "tokens": bucket.num_tokens,
                    "nll": _finite(bucket.nll),
                    "perplexity": _finite(bucket.perplexity),
                }
                for bucket in self.buckets
            ],
        }


def perplexity_by_position(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource | str,
    *,
    length: int = 1024,
    max_windows: int | None = None,
    batch_windows: int | None = None,
    chunk_tokens: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> PerplexityResult:
    """Return how well a model predicts a text, by how much of it the model has seen.

    The text is cut into windows of `length` tokens one after another; a last, shorter one is left out. Each
    starts anew, with the special tokens that the tokenizer puts in front, and each is read in pieces that
    hand on the model's cache, so that only `chunk_tokens` rows of logits exist at a time.

    Args:
        model: Any causal language model of transformers.
        tokenizer: Its tokenizer.
        text: What to predict.
        length: Tokens of a window, special tokens included, at least 2.
        max_windows: Most windows to read; None reads all.
        batch_windows: Windows read at once. None is one on a CPU, and elsewhere those of 16,384 tokens.
        chunk_tokens: Tokens of a window read at once. None is 512 on a CPU, 2,048 elsewhere, and less where
            several windows are read at once or their logits would take more than a gigabyte.
        progress: Called with windows read and windows in all.

    Returns:
        Perplexity overall and by position.

    Raises:
        ConfigurationError: for impossible numbers.
        DataError: if the text is shorter than one window.
    """
    for value, least, what in (
        (length, 2, "length"),
        (max_windows, 1, "max_windows"),
        (batch_windows, 1, "batch_windows"),
        (chunk_tokens, 1, "chunk_tokens"),
    ):
        _check_least(value, least, what)
    on_cpu = model.get_input_embeddings().weight.device.type == "cpu"
    batch_windows = batch_windows or (1 if on_cpu else max(1, _TOKENS_AT_ONCE // length))
    chunk_tokens = chunk_tokens or _chunk_tokens(model, batch_windows, 512 if on_cpu else 2048)
    source = text if isinstance(text, TextSource) else TextSource("text", text)
    windows = _windows(tokenizer, source, length, max_windows)  # [W, T]
    sums = torch.zeros(length, dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(windows), batch_windows):
                batch = windows[start : start + batch_windows]
                sums[1:] += _nll(model, batch, chunk_tokens).sum(dim=0)
                if progress is not None:
                    progress(start + len(batch), len(windows))
    finally:
        if training:
            model.train()
    return PerplexityResult(length, len(windows), _buckets(sums, len(windows)), source.describe())


def check_windows(tokenizer: PreTrainedTokenizerBase, source: TextSource, lengths: Sequence[int]) -> None:
    """Raise what `perplexity_by_position` would for these lengths, without a model.

    Args:
        tokenizer: The model's.
        source: What is to be predicted.
        lengths: Tokens of windows.

    Raises:
        ConfigurationError: for a length that holds nothing to predict.
        DataError: if the text is shorter than one window.
    """
    for length in {min(lengths), max(lengths)}:
        _check_least(length, 2, "length")
        _windows(tokenizer, source, length, max_windows=1)


def _check_least(value: int | None, least: int, what: str) -> None:
    if value is not None and value < least:
        raise ConfigurationError(f"{what} is {value}; it must be at least {least}.")


def _chunk_tokens(model: PreTrainedModel, batch_windows: int, most: int) -> int:
    logits_bytes = 8 * model.get_input_embeddings().weight.shape[0]
    fitting = min(_LOGITS_BYTES // logits_bytes, _TOKENS_AT_ONCE)
    return int(max(1, min(most, fitting // batch_windows)))


def _windows(
    tokenizer: PreTrainedTokenizerBase, source: TextSource, length: int, max_windows: int | None
) -> Tensor:
    """Return token ids [W, T]."""
    front = _front_ids(tokenizer)
    step = length - len(front)
    if step < 1:
        raise ConfigurationError(f"length is {length}, which the tokenizer's special tokens fill already.")

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    # A corpus is not tokenized for the sake of its first pages; prose has four to five characters a token.
    enough = len(source.text) if max_windows is None else 8 * step * max_windows
    ids = tokenize(source.text[:enough])
    if enough < len(source.text) and max_windows is not None and len(ids) <= step * max_windows:
        ids = tokenize(source.text)
    rows = [front + ids[start : start + step] for start in range(0, len(ids) - step + 1, step)][:max_windows]
    if not rows:
        raise DataError(
            f"The text {source.name!r} has {len(ids)} tokens, less than one window of {step}. Give a longer "
            "text, or a smaller length."
        )
    return torch.tensor(rows, dtype=torch.long)


def _front_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts in front of a text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return [int(token) for token in full[:start]]
    return []


def _nll(model: PreTrainedModel, windows: Tensor, chunk_tokens: int) -> Tensor:
    """Return the negative log-likelihood of every token but the first [W, T - 1], float64."""
    device = model.get_input_embeddings().weight.device
    windows = windows.to(device)
    inputs, wanted = windows[:, :-1], windows[:, 1:]
    in_pieces = inputs.shape[1] > chunk_tokens and reads_in_pieces(model)
    size = chunk_tokens if in_pieces else inputs.shape[1]
    cache = None
    pieces = []
    for start in range(0, inputs.shape[1], size):
        extra = {"past_key_values": cache, "use_cache": True} if in_pieces else {"use_cache": False}
        output = model(input_ids=inputs[:, start : start + size], **extra)
        cache = output.past_key_values if in_pieces else None
        targets = wanted[:, start : start + size]
        # Row by row of the batch: the float32 copy of the logits is the largest thing here.
        pieces.append(
            torch.stack(
                [
                    torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")
                    for logits, target in zip(output.logits, targets, strict=True)
                ]
            )
        )
    return torch.cat(pieces, dim=1).double().cpu()


def _buckets(sums: Tensor, num_windows: int) -> list[PositionBucket]:
    length = len(sums)
    edges = [0]
    end = _FIRST_BUCKET
    while end < length:
        edges.append(end)
        end *= 2
    edges.append(length)
    buckets = []
    for start, stop in itertools.pairwise(edges):
        first = max(start, 1)
        num_tokens = (stop - first) * num_windows
        if num_tokens:
            buckets.append(
                PositionBucket(start, stop, num_tokens, float(sums[first:stop].sum()) / num_tokens)
            )
    return buckets


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
