"""Whole models: prefill of a prompt, and decoding after a context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lawcat.bench.limits import Limits, check_arguments
from lawcat.bench.models import Pair, Subject
from lawcat.bench.operators import Progress, relative_error
from lawcat.bench.record import Record, records_of
from lawcat.bench.timing import failure_reason, time_by_turns
from lawcat.evaluation.memory import cache_bytes
from lawcat.memory import free_memory
from lawcat.ops import use_backend
from lawcat.ops.backend import WhatRan, watch_calls

# mypy is told to leave transformers out.
# mypy: disallow-subclassing-any=False

Measurement = Literal["prefill", "decode"]
MEASUREMENTS: tuple[Measurement, ...] = ("prefill", "decode")

_CHECK_TOKENS = 97
# Of the last token's logits; a model of many layers in half precision adds rounding up.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
# A linear state is as large after these as after any more.
_PROMPT_TOKENS = 16


class FilledLayer(CacheLayerMixin):
    """Keys and values of a context, with room for one more token: the softmax cache at its best.

    transformers' own growing cache copies everything at each token, and its static one needs a mask, which
    keeps FlashAttention from running. This one writes one row and hands out exactly what is to be read; each
    token is written to the same row, so that a CUDA graph can be replayed.

    Args:
        keys: [B, G, T + 1, D].
        values: The same.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: all is there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the last row and return all."""
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the tokens of the context."""
        return int(self.keys.shape[2]) - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of the mask."""
        return int(self.keys.shape[2]), 0

    def get_max_length(self) -> int:
        """Return -1: there is no longest sequence."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return the same, by the name that older versions of transformers ask for."""
        return -1


def measure(
    pair: Pair,
    *,
    lengths: Sequence[int],
    batch: int = 1,
    decode_batch: int | None = None,
    measurements: Sequence[Measurement] = MEASUREMENTS,
    backends: tuple[str, ...] | None = None,
    seconds: float = 1.0,
    cuda_graphs: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Record]:
    """Return what a student and its teacher take, on the same tokens, by turns.

    Prefill reads a prompt, keeps what decoding needs and computes the last token's logits. Decoding computes
    one token after a context of so many: the teacher's keys and values of it are random, and lie as well as
    they can. Each subject is first checked: prefill and a step must give what one pass over all tokens
    gives (ours: by the definition).

    Args:
        pair: The models.
        lengths: Tokens of the prompt, and of the context.
        batch: Sequences in prefill.
        decode_batch: Sequences in decoding; ``batch`` when None.
        measurements: What to time.
        backends: Which of our backends; all when None.
        seconds: About how long a subject may be repeated at one length.
        cuda_graphs: Time replays of CUDA graphs, for all subjects.
        seed: Of the tokens.
        progress: Called with what is done, how much of it, and of how much.

    Returns:
        A record for each measurement, length and subject; one that could not run says why.

    Raises:
        ConfigurationError: for CUDA graphs without a GPU, or a length below 1.

    Example:
        >>> from lawcat.bench.models import random_pair
        >>> pair = random_pair("tiny", dtype=torch.float32, device=torch.device("cpu"))
        >>> records = measure(pair, lengths=[32], seconds=0.01)
        >>> [record.measurement for record in records if record.is_ours and record.median_s]
        ['model prefill', 'model decode']
    """
    device = next(pair.student.parameters()).device
    check_arguments(device, lengths, cuda_graphs)
    total, done = len(measurements) * len(lengths), 0
    if progress is not None:  # checks of a large model take minutes on a CPU
        progress(f"model, {pair.name}", done, total)
    subjects = pair.subjects(backends)
    checks = {subject.name: _check(subject, device, seed) for subject in subjects}
    errors = {name: check.error for name, check in checks.items()}
    records: list[Record] = []
    for measurement in measurements:
        limits = Limits(seconds)
        for tokens in sorted(lengths):
            size = (decode_batch or batch) if measurement == "decode" else batch
            reasons = {
                name: check.reason_of(measurement) or limits.reason(name, tokens)
                for name, check in checks.items()
            }
            runs: dict[str, Callable[[], object]] = {}
            kept: dict[str, int] = {}
            contexts: dict[int, FilledLayer] = {}
            for subject in subjects:
                if reasons[subject.name] is None:
                    try:
                        runs[subject.name] = (
                            decoding(
                                subject,
                                tokens,
                                size,
                                device,
                                is_chained=cuda_graphs,
                                contexts=contexts,
                                kept=kept,
                            )
                            if measurement == "decode"
                            else prefill(subject, random_tokens(subject, size, tokens, device, seed), kept)
                        )
                    except Exception as error:
                        reasons[subject.name] = failure_reason(error)
                        free_memory()
            timings = time_by_turns(runs, device, seconds=seconds, cuda_graphs=cuda_graphs)
            runs.clear()
            contexts.clear()
            free_memory()
            records += records_of(
                [checks[subject.name].labelled(measurement) for subject in subjects],
                timings,
                reasons,
                errors,
                limits,
                tokens=tokens,
                num_tokens_done=size * (1 if measurement == "decode" else tokens),
                state_bytes=kept,
                measurement=f"model {measurement}",
                shape=pair.name,
                batch=size,
            )
            done += 1
            if progress is not None:
                progress(f"model, {pair.name}", done, total)
    return records


def random_tokens(subject: Subject, batch: int, tokens: int, device: torch.device, seed: int) -> Tensor:
    """Return token ids [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = subject.model.config.vocab_size
    return torch.randint(3, vocabulary, (batch, tokens), generator=generator).to(device)


def prefill(subject: Subject, tokens: Tensor, kept: dict[str, int] | None = None) -> Callable[[], Tensor]:
    """Return what reads a prompt and computes the last token's logits [B, 1, V].

    Args:
        subject: The model.
        tokens: The prompt [B, T].
        kept: Where the first call notes, by the subject's name, the bytes kept for the next token.
    """
    kept = {} if kept is None else kept

    @torch.no_grad()
    def run() -> Tensor:
        with subject.running():
            output = subject.model(tokens, use_cache=True, logits_to_keep=1)
        if subject.name not in kept:
            kept[subject.name] = cache_bytes(output.past_key_values)
        logits: Tensor = output.logits
        return logits

    return run


def decoding(
    subject: Subject,
    context_tokens: int,
    batch: int,
    device: torch.device,
    *,
    is_chained: bool = False,
    contexts: dict[int, FilledLayer] | None = None,
    kept: dict[str, int] | None = None,
    seed: int = 0,
) -> Callable[[], Tensor]:
    """Return what computes one token after a context of so many.

    Args:
        subject: The model.
        context_tokens: Tokens before.
        batch: Sequences.
        device: Where.
        is_chained: Keep the state at the same addresses, as replays of a CUDA graph need.
        contexts: Keys and values by layer, which several subjects share: they may fill half of a GPU.
        kept: Where the bytes of the state, or of keys and values, are noted by the subject's name.
        seed: Of the tokens.
    """
    contexts = {} if contexts is None else contexts
    prompt = random_tokens(subject, batch, min(_PROMPT_TOKENS, context_tokens), device, seed)
    with torch.no_grad(), subject.running():
        cache = subject.model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "keys", None) is not None:
            if index not in contexts:
                size = (*layer.keys.shape[:2], context_tokens + 1, layer.keys.shape[3])
                keys, values = (torch.randn(size, dtype=layer.keys.dtype, device=device) for _ in range(2))
                contexts[index] = FilledLayer(keys, values)
            cache.layers[index] = contexts[index]
        else:
            layer.num_tokens = context_tokens
    if kept is not None:
        kept[subject.name] = cache_bytes(cache)
    return _stepping(subject, cache, prompt[:, -1:], is_chained)


def _stepping(subject: Subject, cache: Cache, token: Tensor, is_chained: bool) -> Callable[[], Tensor]:
    states = [layer for layer in cache.layers if not isinstance(layer, FilledLayer)]
    fixed = [layer.tensors() for layer in states] if is_chained else []

    @torch.no_grad()
    def run() -> Tensor:
        counts = [layer.num_tokens for layer in states]
        with subject.running():
            logits: Tensor = subject.model(
                token, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
        for layer, count in zip(states, counts, strict=True):
            layer.num_tokens = count
        for layer, tensors in zip(states, fixed, strict=is_chained):
            for name, tensor in tensors.items():
                if getattr(layer, name) is not tensor:
                    tensor.copy_(getattr(layer, name))
                    setattr(layer, name, tensor)
        return logits

    return run


@dataclass(frozen=True)
class _Check:
    """A subject whose results were looked at.

    Attributes:
        subject: It.
        error: Of its logits, where there are any.
        reason: Why it has no figure at all.
        ran: What prefill and a step ran by.
    """

    subject: Subject
    error: float | None = None
    reason: str | None = None
    ran: Mapping[Measurement, WhatRan] = field(default_factory=dict)

    def reason_of(self, measurement: Measurement) -> str | None:
        """Return why it has no figure for a measurement: it would be that of another than the one named."""
        if self.reason is None and self.subject.backend is not None:
            return self.ran[measurement].not_by(self.subject.backend)
        return self.reason

    def labelled(self, measurement: Measurement) -> Subject:
        """Return the subject with what really ran as its backend."""
        if self.subject.backend is None or measurement not in self.ran:
            return self.subject
        label = self.ran[measurement].label()
        return replace(self.subject, backend=label or self.subject.backend)


def _check(subject: Subject, device: torch.device, seed: int) -> _Check:
    """Compare prefill and a step with one pass over all tokens."""
    if subject.reason is not None:
        return _Check(subject, reason=subject.reason)
    tokens = random_tokens(subject, 2, _CHECK_TOKENS + 1, device, seed + 1)
    try:
        with torch.no_grad():
            with subject.running(), watch_calls() as prefill_ran:
                cache = subject.model(tokens[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
            for index, layer in enumerate(cache.layers):
                if getattr(layer, "keys", None) is not None:
                    room = torch.full_like(layer.keys[:, :, :1], torch.nan)
                    keys, values = (torch.cat([t, room], dim=2) for t in (layer.keys, layer.values))
                    cache.layers[index] = FilledLayer(keys, values)
            with watch_calls() as step_ran:
                actual = _stepping(subject, cache, tokens[:, -1:], is_chained=True)()
            with subject.running(), use_backend("reference"):
                expected = subject.model(tokens, use_cache=False, logits_to_keep=1).logits
    except Exception as error:
        free_memory()
        return _Check(subject, reason=failure_reason(error))
    found = _Check(
        subject, relative_error(actual, expected), ran={"prefill": prefill_ran, "decode": step_ran}
    )
    tolerance = _TOLERANCES.get(expected.dtype, 1e-6)
    assert found.error is not None
    if not found.error <= tolerance:
        text = f"wrong: relative error of the logits {found.error:.2g}, allowed {tolerance:.2g}"
        return replace(found, reason=text)
    return found
