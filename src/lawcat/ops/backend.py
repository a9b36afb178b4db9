"""Which implementation of gated linear attention runs, and why. Legend: see ``shapes.py``."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import BackendError, did_you_mean
from .chunked import gated_linear_attention_chunked
from .precision import at_one_dtype
from .reference import gated_linear_attention_reference
from .shapes import check_attention_inputs, check_log_decay, check_log_decay_range, repeat_heads
from .triton import support

ENVIRONMENT_VARIABLE = "LAWCAT_BACKEND"


@dataclass(frozen=True)
class Backend:
    """One implementation: its name, what it is, and why it cannot run here (``None`` when it can)."""

    name: str
    description: str
    unavailable_because: Callable[[], str | None]


_BACKENDS = (
    Backend("torch", "chunked form in plain PyTorch, on any device, differentiable", lambda: None),
    Backend("reference", "the definition token by token, on any device; slow, for tests", lambda: None),
    Backend("triton", "fused kernels for NVIDIA GPUs, differentiable", support.missing),
)
# Of the process, not of a thread: autograd runs a backward, and what checkpointing repeats, in another one.
_forced: str | None = None
# Why PyTorch has run where kernels were asked for, or are what "auto" takes; each reason is told once.
_fallbacks: dict[str, None] = {}
# Calls by what was computed and by which backend.
_calls: Counter[tuple[str, str]] = Counter()


@dataclass
class WhatRan:
    """What the calls of a while ran by.

    Attributes:
        backends: Which implementations; none where no call was counted.
        reasons: Why it was PyTorch and not the kernels, whether that was told before or not.
    """

    backends: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)

    def label(self) -> str:
        """Return the names of those that ran as one; empty where nothing was counted."""
        return " and ".join(sorted(self.backends))

    def not_by(self, name: str) -> str | None:
        """Return what ran instead of a backend, and why; None where that did, or nothing was counted."""
        if not self.backends or name in self.backends:
            return None
        text = f"{self.label()} runs, not {name}"
        return text + (f": {'; '.join(self.reasons)}" if self.reasons else "")


_watchers: list[WhatRan] = []


@contextlib.contextmanager
def watch_calls() -> Iterator[WhatRan]:
    """Yield what the calls within this context, of any thread, run by: what ``count_call`` is told."""
    ran = WhatRan()
    _watchers.append(ran)
    try:
        yield ran
    finally:
        # By identity: two that saw the same are equal.
        _watchers[:] = [watcher for watcher in _watchers if watcher is not ran]


def count_call(operation: str, backend: str) -> None:
    """Note for ``explain`` what runs. Compiled code and replays of CUDA graphs are not counted."""
    if not torch.compiler.is_compiling():
        _calls[operation, backend] += 1
        for watcher in _watchers:
            watcher.backends.add(backend)


def backend_names() -> tuple[str, ...]:
    """Return the names that ``backend=`` accepts.

    >>> backend_names()
    ('auto', 'torch', 'reference', 'triton')
    """
    return ("auto", *(backend.name for backend in _BACKENDS))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context, ``backend="auto"`` means ``name``, in every thread of the process.

    Threads must not enter different ones at the same time: the last to enter has its way in all of them.

    Raises:
        BackendError: for a name that does not exist.
    """
    global _forced
    before, _forced = _forced, _checked(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose_backend(backend: str = "auto", device: str = "cpu") -> str:
    """Return the name of the implementation that a call with this ``backend`` runs.

    An explicit name wins; then ``use_backend``; then the environment variable ``LAWCAT_BACKEND``; then the
    fastest that can run on this type of device; that kernels are missing on a GPU is said once, as a warning.
    A compiled function keeps the choice of the time it was compiled.

    Raises:
        BackendError: for a name that does not exist.
    """
    name, source = _choose(backend, device)
    if device == "cuda" and source is None and (reason := support.missing()):
        _say_once(reason)
    return name


def _choose(backend: str = "auto", device: str = "cpu") -> tuple[str, str | None]:
    """Return the name and who asked for it, None where nobody did."""
    requests = {
        "backend": backend,
        "use_backend": _forced,
        ENVIRONMENT_VARIABLE: os.environ.get(ENVIRONMENT_VARIABLE),
    }
    for source, name in requests.items():
        if name and _checked(name, source) != "auto":
            return name, source
    takes_kernels = device == "cuda" and support.missing() is None
    return "triton" if takes_kernels else "torch", None


def explain() -> str:
    """Return, a line a backend, whether it can run here and which one ``"auto"`` takes and why, and what ran.

    >>> print(explain().splitlines()[1])
    reference: the definition token by token, on any device; slow, for tests (available)
    """
    chosen, source = _choose(device="cuda" if torch.cuda.is_available() else "cpu")
    lines = []
    for backend in _BACKENDS:
        reason = backend.unavailable_because()
        state = f"not available: {reason}" if reason else "available"
        if backend.name == chosen:
            state += ", taken by 'auto'"
        lines.append(f"{backend.name}: {backend.description} ({state})")
    lines += [f"fell back to torch: {reason}" for reason in _fallbacks]
    for (operation, backend_name), count in sorted(_calls.items()):
        lines.append(f"ran: {operation} by {backend_name}, {count:,} {'call' if count == 1 else 'calls'}")
    if source is not None:
        lines.append(f"'auto' means {chosen!r} because of {source}")
    return "\n".join(lines)


# Constant in what is compiled, as above: the warning comes while compiling.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def kernels_or_torch(backend: str, device: str, unsupported: str | None) -> bool:
    """Return whether the kernels run a call for which ``choose_backend`` says ``"triton"``.

    Args:
        backend: What the caller asked for.
        device: Type of the tensors' device.
        unsupported: Why the kernels cannot run these tensors, or None.

    Raises:
        BackendError: where they cannot and were asked for; else it is said once, as a warning.
    """
    if unsupported is None:
        return True
    _, source = _choose(backend, device)
    if source is not None:
        raise BackendError(f"{source}='triton' cannot run: {unsupported}. Use backend='torch'.")
    _say_once(unsupported)
    return False


# Constant in what is compiled, as above.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def no_kernel(device: str, computation: str) -> None:
    """Say once, as a warning, that there is no kernel for what PyTorch computes next.

    Nothing where kernels would not run either: who asked for PyTorch, or has no GPU, need not know. Those who
    asked for the kernels are told and not refused, since a model's other work runs on them.

    Args:
        device: Type of the tensors' device.
        computation: For what there is none.
    """
    if _choose("auto", device)[0] == "triton":
        _say_once(f"there is no kernel for {computation}")


def _say_once(reason: str) -> None:
    """Warn, as of who called the operator, that PyTorch's operations run instead of the kernels."""
    for watcher in _watchers:
        if reason not in watcher.reasons:
            watcher.reasons.append(reason)
    if reason not in _fallbacks:
        _fallbacks[reason] = None
        warnings.warn(f"lawcat's kernels are not used: {reason}.", stacklevel=_frames_of_operators() + 1)


def _frames_of_operators() -> int:
    """Return how many of the innermost frames, the caller's the first, are this package's."""
    frame, count = sys._getframe(1), 0
    while frame.f_back is not None and frame.f_globals.get("__package__") == __package__:
        frame, count = frame.f_back, count + 1
    return count


def _checked(name: str, source: str) -> str:
    if name not in backend_names():
        raise BackendError(
            f"{source}={name!r} does not exist; use one of {', '.join(backend_names())}."
            + did_you_mean(name, backend_names())
        )
    return name


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    backend: str = "auto",
    min_log_decay: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output and final state of normalised gated linear attention.

    ``S_t = diag(a_t) S_{t-1} + k_t^T [v_t, 1]``, ``[n_t, z_t] = q_t S_t``, ``o_t = n_t / (z_t + eps)``.
    Splitting a sequence anywhere and handing the state on gives the same result. Arithmetic is in float32, or
    float64 when an input is, under autocast too.

    Args:
        q: Query features [B, T, H, F]; query head h reads state head ``h // (H / N)``.
        k: Key features [B, T, N, F].
        v: Values [B, T, G, D]; state head n takes in those of head ``n // (N / G)``.
        log_decay: Natural logarithm of the decay a, at most 0: [B, T, G, F], or [B, T, G, 1] for one a head.
        initial_state: State before the first token [B, N, F, D + 1]; zeros when None.
        normalize: Divide by the decayed sum of weights z, else return n.
        eps: Added to z before dividing, above 0.
        backend: ``"auto"``, ``"torch"`` (chunked PyTorch), ``"triton"`` (kernels) or ``"reference"`` (token
            by token).
        min_log_decay: A bound below which no log_decay lies, where the caller knows one: the same for all
            calls makes them alike, and a CUDA graph cannot look it up.

    Returns:
        ``o`` [B, T, H, D] in v's dtype and the state [B, N, F, D + 1] in float32 (float64 when an input is),
        whose last column is the normaliser.

    Raises:
        ValueError: when shapes or devices do not fit together, or a log_decay is above 0 or below
            ``min_log_decay`` (with a bound not looked for while a CUDA graph is captured, or compiled).
        BackendError: a ``ValueError``, when the backend does not exist.

    Source: equations 5 and 6 of LAWCAT (arXiv 2509.18467).

    Example:
        >>> import torch
        >>> x = torch.rand(1, 100, 2, 4)
        >>> o, state = gated_linear_attention(x, x, x, torch.full_like(x, -0.1))
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 4]), torch.Size([1, 2, 4, 5]))
    """
    if min_log_decay is not None:
        check_attention_inputs(q, k, v, log_decay, initial_state, eps)
        check_log_decay_range(log_decay, min_log_decay)
    return run_recurrence(
        q,
        k,
        v,
        log_decay,
        initial_state=initial_state,
        normalize=normalize,
        eps=eps,
        backend=backend,
        min_log_decay=min_log_decay,
    )


def run_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None,
    normalize: bool,
    eps: float,
    backend: str,
    min_log_decay: float | None,
) -> tuple[Tensor, Tensor]:
    """Return what ``gated_linear_attention`` does; it has the arguments.

    A bound is believed, which saves waiting for a GPU: for a caller that has made the log-decays by it.
    """
    name = choose_backend(backend, q.device.type)
    if name == "triton":
        check_attention_inputs(q, k, v, log_decay, initial_state, eps)
        operands = at_one_dtype(q, k, v)
        unsupported = support.unsupported_because(
            *operands, log_decay, initial_state, feature_dim=q.shape[3], value_dim=v.shape[3]
        )
        if q.numel() and kernels_or_torch(backend, q.device.type, unsupported):
            count_call("recurrence", "triton")
            output, state = _run_kernels(*operands, log_decay, initial_state, normalize, eps, min_log_decay)
            return output.to(v.dtype), state
    count_call("recurrence", "reference" if name == "reference" else "torch")
    if name == "reference":
        return gated_linear_attention_reference(
            q, k, v, log_decay, initial_state=initial_state, normalize=normalize, eps=eps
        )
    return gated_linear_attention_chunked(
        q,
        k,
        v,
        log_decay,
        initial_state=initial_state,
        normalize=normalize,
        eps=eps,
        min_log_decay=min_log_decay,
    )


def _run_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    normalize: bool,
    eps: float,
    min_log_decay: float | None,
) -> tuple[Tensor, Tensor]:
    from .triton.function import run
    from .triton.mixer import MixerInputs, MixerOptions

    if min_log_decay is None:
        lowest, highest = (bound.item() for bound in torch.aminmax(log_decay.detach()))
        check_log_decay(highest)
        min_log_decay = lowest
    # The kernels share values and decays only where they make the features themselves.
    v, log_decay = (repeat_heads(t, k.shape[2]) for t in (v, log_decay))
    inputs = MixerInputs(
        q=q, k=k, v=v, gate=log_decay, initial_state=initial_state, num_state_heads=k.shape[2]
    )  # fmt: skip
    options = MixerOptions(min_log_decay=float(min_log_decay), normalize=normalize, eps=float(eps))
    output, state = run(inputs, options)
    return output, state
