"""Which implementation of gated linear attention runs, and why. Legend: see ``shapes.py``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BackendError, did_you_mean
from .chunked import gated_linear_attention_chunked
from .reference import gated_linear_attention_reference

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
)
_forced: ContextVar[str | None] = ContextVar("lawcat_backend", default=None)


def backend_names() -> tuple[str, ...]:
    """Return the names that ``backend=`` accepts.

    >>> backend_names()
    ('auto', 'torch', 'reference')
    """
    return ("auto", *(backend.name for backend in _BACKENDS))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context, ``backend="auto"`` means ``name``.

    Raises:
        BackendError: for a name that does not exist.
    """
    token = _forced.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose_backend(backend: str = "auto") -> str:
    """Return the name of the implementation that a call with this ``backend`` runs.

    An explicit name wins; then ``use_backend``; then the environment variable ``LAWCAT_BACKEND``; then the
    fastest that can run. A compiled function keeps the choice of the time it was compiled.

    Raises:
        BackendError: for a name that does not exist.
    """
    return _choose(backend)[0]


def _choose(backend: str = "auto") -> tuple[str, str | None]:
    """Return the name and who asked for it, None where nobody did."""
    requests = {
        "backend": backend,
        "use_backend": _forced.get(),
        ENVIRONMENT_VARIABLE: os.environ.get(ENVIRONMENT_VARIABLE),
    }
    for source, name in requests.items():
        if name and _checked(name, source) != "auto":
            return name, source
    return "torch", None


def explain() -> str:
    """Return, a line a backend, whether it can run here and which one ``"auto"`` takes and why.

    >>> print(explain().splitlines()[0])
    torch: chunked form in plain PyTorch, on any device, differentiable (available, taken by 'auto')
    """
    chosen, source = _choose()
    lines = []
    for backend in _BACKENDS:
        reason = backend.unavailable_because()
        state = f"not available: {reason}" if reason else "available"
        if backend.name == chosen:
            state += ", taken by 'auto'"
        lines.append(f"{backend.name}: {backend.description} ({state})")
    if source is not None:
        lines.append(f"'auto' means {chosen!r} because of {source}")
    return "\n".join(lines)


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
        v: Values [B, T, N, D].
        log_decay: Natural logarithm of the decay a, at most 0: [B, T, N, F], or [B, T, N, 1] for one a head.
        initial_state: State before the first token [B, N, F, D + 1]; zeros when None.
        normalize: Divide by the decayed sum of weights z, else return n.
        eps: Added to z before dividing, above 0.
        backend: ``"auto"``, ``"torch"`` (chunked PyTorch) or ``"reference"`` (token by token).
        min_log_decay: A bound below which no log_decay lies, where the caller knows one; saves looking it up.

    Returns:
        ``o`` [B, T, H, D] in v's dtype and the state [B, N, F, D + 1] in float32 (float64 when an input is),
        whose last column is the normaliser.

    Raises:
        ValueError: when shapes or devices do not fit together, or a log_decay is above 0 (not looked for
            where ``min_log_decay`` is given).
        BackendError: a ``ValueError``, when the backend does not exist.

    Source: equations 5 and 6 of LAWCAT (arXiv 2509.18467).

    Example:
        >>> import torch
        >>> x = torch.rand(1, 100, 2, 4)
        >>> o, state = gated_linear_attention(x, x, x, torch.full_like(x, -0.1))
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 4]), torch.Size([1, 2, 4, 5]))
    """
    if choose_backend(backend) == "reference":
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
