"""The operator alone: forward, forward and backward, and one token of decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lawcat.bench.limits import Limits, check_arguments
from lawcat.bench.mixers import REFERENCES, Mixer, MixerInputs, mixer_inputs, mixers, random_context
from lawcat.bench.record import Record, records_of
from lawcat.bench.shapes import MixerShape
from lawcat.bench.timing import failure_reason, time_by_turns
from lawcat.memory import free_memory
from lawcat.ops.backend import watch_calls

Measurement = Literal["forward", "forward and backward", "decode"]
MEASUREMENTS: tuple[Measurement, ...] = ("forward", "forward and backward", "decode")

Progress = Callable[[str, int, int], None]

# Odd, and more than one chunk of any kernel.
_CHECK_TOKENS = 131
# Relative errors, of the norm of the difference, that a right kernel stays well below.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float64: 1e-6}


@dataclass(frozen=True)
class _Candidate:
    mixer: Mixer
    error: float | None
    reason: str | None


def measure(
    shape: MixerShape,
    *,
    lengths: Sequence[int],
    device: torch.device | str,
    dtype: torch.dtype,
    batch: int = 1,
    decode_batch: int | None = None,
    measurements: Sequence[Measurement] = MEASUREMENTS,
    backends: tuple[str, ...] | None = None,
    seconds: float = 0.5,
    cuda_graphs: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Record]:
    """Return what the mixer of a layer takes, ours and others', on the same inputs, by turns.

    Each contender is first compared with its definition in float64 at 131 tokens (outputs, and gradients
    where those are timed); one that is wrong gets no figure. Softmax attention is timed without its rotary
    embedding, ours with convolution, feature map and gate activation.

    Args:
        shape: Heads and widths.
        lengths: Tokens of a sequence; for decoding of the context.
        device: Where.
        dtype: Of q, k and v.
        batch: Sequences.
        decode_batch: Sequences in decoding; ``batch`` when None.
        measurements: What to time.
        backends: Which of our backends; all when None.
        seconds: About how long a contender may be repeated at one length.
        cuda_graphs: Time replays of CUDA graphs, for all contenders.
        seed: Of the inputs.
        progress: Called with what is done, how much of it, and of how much.

    Returns:
        A record for each measurement, length and contender; one that could not run says why.

    Raises:
        ConfigurationError: for CUDA graphs without a GPU, or a length below 1.

    Example:
        >>> shape = MixerShape("small", num_heads=2, num_kv_heads=1, head_dim=8, feature_dim=8)
        >>> records = measure(shape, lengths=[64], device="cpu", dtype=torch.float32, seconds=0.01)
        >>> [record.measurement for record in records if record.is_ours and record.backend == "torch"]
        ['operator forward', 'operator forward and backward', 'operator decode']
    """
    place = torch.device(device)
    check_arguments(place, lengths, cuda_graphs)
    contenders = mixers(backends)
    total = len(measurements) * (len(lengths) + 1)
    records: list[Record] = []
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(f"operator, {shape.name}", done, total)

    for measurement in measurements:
        candidates = [_check(mixer, shape, measurement, place, dtype, seed) for mixer in contenders]
        step()
        limits = Limits(seconds)
        for tokens in sorted(lengths):
            size = (decode_batch or batch) if measurement == "decode" else batch
            records += _one_length(
                candidates, limits, shape, measurement, tokens, size, place, dtype, seconds, cuda_graphs, seed
            )
            step()
    return records


def _check(
    mixer: Mixer,
    shape: MixerShape,
    measurement: Measurement,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> _Candidate:
    """Compare a contender with its definition in float64 on the inputs it would be timed on, but shorter."""
    reason = mixer.unavailable_because(device, dtype)
    if reason is None and measurement == "decode" and mixer.decode is None:
        reason = "has no form for one token here"
    if reason is None and measurement == "forward and backward" and not mixer.has_backward:
        reason = "has no gradient"
    if reason is not None:
        return _Candidate(mixer, None, reason)
    is_decode = measurement == "decode"
    inputs = mixer_inputs(
        shape,
        batch=2 if is_decode else 1,
        tokens=1 if is_decode else _CHECK_TOKENS,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    context = random_context(inputs, _CHECK_TOKENS, seed=seed) if is_decode else None
    exact = inputs.map(Tensor.double)
    exact_context = None if context is None else context.double()
    reference = REFERENCES[mixer.kind]
    with_gradient = measurement == "forward and backward"
    try:
        with watch_calls() as ran:
            if context is None:
                actual = _results(mixer.forward, inputs, with_gradient)
            else:
                assert mixer.decode is not None
                actual = {"output": without_gradient(mixer.decode(inputs, context))()}
        expected = _results(lambda exact: reference(exact, exact_context), exact, with_gradient)
    except Exception as error:
        free_memory()
        return _Candidate(mixer, None, failure_reason(error))
    # The figure would be that of another than the one named.
    if mixer.backend is not None and (text := ran.not_by(mixer.backend)):
        return _Candidate(mixer, None, text)
    return _judged(mixer, actual, expected, dtype)


def _results(
    function: Callable[[MixerInputs], Tensor], inputs: MixerInputs, with_gradient: bool
) -> dict[str, Tensor]:
    if not with_gradient:
        with torch.no_grad():
            return {"output": function(inputs)}
    leaves = inputs.map(lambda t: t.detach().requires_grad_())
    output = function(leaves)
    names = list(leaves.tensors())
    gradients = torch.autograd.grad(
        output, list(leaves.tensors().values()), output_gradient(output), allow_unused=True
    )
    found = {"output": output.detach()}
    found |= {f"gradient of {n}": g for n, g in zip(names, gradients, strict=True) if g is not None}
    return found


def output_gradient(output: Tensor) -> Tensor:
    """Return what the output's gradient is taken to be: the same values in every dtype."""
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(output.shape, generator=generator).bfloat16()
    return gradient.to(output)


def _judged(
    mixer: Mixer, actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype
) -> _Candidate:
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    tolerance = _TOLERANCES[dtype]
    reason = None
    if not errors[worst] <= tolerance:
        reason = f"wrong: relative error of {worst} {errors[worst]:.2g}, allowed {tolerance:.2g}"
    return _Candidate(mixer, errors[worst], reason)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected; infinite for a NaN.

    >>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    0.0
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    error = ((actual - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")


def _one_length(
    candidates: list[_Candidate],
    limits: Limits,
    shape: MixerShape,
    measurement: Measurement,
    tokens: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    cuda_graphs: bool,
    seed: int,
) -> list[Record]:
    reasons = {c.mixer.name: c.reason or limits.reason(c.mixer.name, tokens) for c in candidates}
    runs: dict[str, Callable[[], object]] = {}
    is_decode = measurement == "decode"
    inputs = mixer_inputs(
        shape, batch=batch, tokens=1 if is_decode else tokens, dtype=dtype, device=device, seed=seed
    )
    context = random_context(inputs, tokens, seed=seed) if is_decode else None
    for candidate in candidates:
        mixer = candidate.mixer
        if reasons[mixer.name] is not None:
            continue
        try:
            if context is not None:
                assert mixer.decode is not None
                runs[mixer.name] = without_gradient(mixer.decode(inputs, context))
            elif measurement == "forward":
                runs[mixer.name] = without_gradient(_bound(mixer.forward, inputs))
            else:
                runs[mixer.name] = _forward_and_backward(mixer.forward, inputs)
        except Exception as error:
            reasons[mixer.name] = failure_reason(error)
    timings = time_by_turns(runs, device, seconds=seconds, cuda_graphs=cuda_graphs)
    kept = None
    if context is not None:
        kept = {candidate.mixer.name: context.num_bytes(candidate.mixer.kind) for candidate in candidates}
    runs.clear()
    free_memory()
    return records_of(
        [candidate.mixer for candidate in candidates],
        timings,
        reasons,
        {candidate.mixer.name: candidate.error for candidate in candidates},
        limits,
        tokens=tokens,
        num_tokens_done=batch * (1 if is_decode else tokens),
        state_bytes=kept,
        measurement=f"operator {measurement}",
        shape=shape.name,
        batch=batch,
    )


def _bound(function: Callable[[MixerInputs], Tensor], inputs: MixerInputs) -> Callable[[], Tensor]:
    return lambda: function(inputs)


def without_gradient(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return the function run without gradients."""

    def run() -> Tensor:
        with torch.no_grad():
            return function()

    return run


def _forward_and_backward(
    function: Callable[[MixerInputs], Tensor], inputs: MixerInputs
) -> Callable[[], object]:
    leaves = inputs.map(lambda t: t.detach().requires_grad_())
    wanted = list(leaves.tensors().values())
    gradient = torch.randn_like(inputs.q)

    def run() -> object:
        return torch.autograd.grad(function(leaves), wanted, gradient, allow_unused=True)

    return run
