"""One cell of a benchmark: a figure, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from lawcat.bench.limits import Limits
from lawcat.bench.timing import Failure, Timing


class Contender(Protocol):
    """Who is measured: a form of the operator, or a model."""

    @property
    def name(self) -> str:
        """What results call it."""

    @property
    def is_ours(self) -> bool:
        """Whether it is lawcat."""

    @property
    def backend(self) -> str | None:
        """Which implementation of ours runs, None for others."""


@dataclass(frozen=True)
class Record:
    """What one contender took for one measurement at one length.

    Attributes:
        measurement: What was done, such as ``"operator forward"`` or ``"model prefill"``.
        shape: Name of the heads and widths, or of the model.
        contender: Who did it.
        is_ours: Whether that is lawcat.
        tokens: Tokens of a sequence; for decoding those already in the context.
        batch: Sequences.
        median_s: Median of the repetitions; None where there is no figure.
        quartiles_s: Their first and third quartile.
        repetitions: How many.
        first_call_s: The first timed call. It compiles what the check before it did not, graphs too.
        tokens_per_s: Tokens read (decoding: made) a second, over the batch.
        peak_memory_bytes: The most memory in use during a call, above what was held before it.
        state_bytes: What is kept of the sequences for the next token, state or keys and values, over the
            batch: after the prompt, or as decoding finds it, held before its call. None where that is not
            looked at.
        error: Relative error against the definition in float64 at a small length, by which the contender was
            admitted; None where there is no such check.
        uses_cuda_graph: Whether the call was the replay of a CUDA graph.
        backend: Which implementation of ours ran; both where some of it has no kernel.
        reason: Why there is no figure.
    """

    measurement: str
    shape: str
    contender: str
    is_ours: bool
    tokens: int
    batch: int
    median_s: float | None = None
    quartiles_s: tuple[float, float] | None = None
    repetitions: int = 0
    first_call_s: float | None = None
    tokens_per_s: float | None = None
    peak_memory_bytes: int | None = None
    state_bytes: int | None = None
    error: float | None = None
    uses_cuda_graph: bool = False
    backend: str | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def of(cls, timing: Timing | Failure, *, num_tokens_done: int, **fields: Any) -> Record:
        """Return the record of what was timed.

        Args:
            timing: The time, or why there is none.
            num_tokens_done: Tokens that one repetition reads or makes, over the batch.
            fields: The record's other fields.
        """
        if isinstance(timing, Failure):
            return cls(reason=timing.reason, **fields)
        return cls(
            median_s=timing.median_s,
            quartiles_s=timing.quartiles_s,
            repetitions=len(timing.seconds),
            first_call_s=timing.first_call_s,
            tokens_per_s=num_tokens_done / timing.median_s,
            peak_memory_bytes=timing.peak_memory_bytes,
            uses_cuda_graph=timing.uses_cuda_graph,
            **fields,
        )


def records_of(
    contenders: Iterable[Contender],
    timings: Mapping[str, Timing | Failure],
    reasons: Mapping[str, str | None],
    errors: Mapping[str, float | None],
    limits: Limits,
    *,
    tokens: int,
    num_tokens_done: int,
    state_bytes: Mapping[str, int] | None = None,
    **fields: Any,
) -> list[Record]:
    """Return the records of all contenders at one length, and let the limits know what they took.

    Args:
        contenders: In the order of the records.
        timings: By name, of those that were run.
        reasons: By name, why one was not run.
        errors: By name, the relative error by which one was admitted.
        limits: Of this measurement.
        tokens: Tokens of a sequence.
        num_tokens_done: Tokens that one repetition reads or makes, over the batch.
        state_bytes: By name, what is kept of the sequences, where that is known.
        fields: The records' other fields.
    """
    records = []
    for contender in contenders:
        timing = timings.get(contender.name) or Failure(reasons[contender.name] or "not run")
        if isinstance(timing, Timing):
            limits.saw(contender.name, tokens, timing.median_s)
        records.append(
            Record.of(
                timing,
                contender=contender.name,
                is_ours=contender.is_ours,
                backend=contender.backend,
                error=errors[contender.name],
                tokens=tokens,
                num_tokens_done=num_tokens_done,
                state_bytes=(state_bytes or {}).get(contender.name) if isinstance(timing, Timing) else None,
                **fields,
            )
        )
    return records
