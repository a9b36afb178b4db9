"""Whether the kernels can run: on this machine, and for these tensors. Does not import triton."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor

_OLDEST_TRITON = (3, 6)
# Ampere: the first with bfloat16 products.
_OLDEST_CAPABILITY = (8, 0)
# What fits into a multiprocessor: by whether it is float32, and whether there are gradients.
_WIDEST = {(False, False): 256, (False, True): 128, (True, False): 128, (True, True): 64}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def is_interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def missing() -> str | None:
    """Return why no kernel can run on this machine, or None where they can."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "the package triton is not installed (it comes with PyTorch for CUDA)"
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TRITON:
        return f"triton is {version}; 3.6 or newer is needed"
    if is_interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


@functools.cache
def too_old(device: torch.device) -> str | None:
    """Return why no kernel can run on a CUDA device, or None where they can."""
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"the GPU's compute capability is {found}; 8.0 or newer is needed"
    return None


# A compiler cannot follow how this is found out.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cannot_run_on(device: torch.device) -> str | None:
    """Return why no kernel can run on tensors of this device, or None where they can."""
    if reason := missing():
        return reason
    if is_interpreted():
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}; the kernels run on cuda"
    return too_old(device)


def unsupported_because(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *others: Tensor | None,
    feature_dim: int,
    value_dim: int,
) -> str | None:
    """Return why the kernels cannot run these tensors, or None where they can.

    ``others`` count where they require a gradient.
    """
    reason: str | None = _cannot_run_on(q.device)
    if reason is not None:
        return reason
    for name, tensor in (("q", q), ("k", k), ("v", v), ("gate", gate)):
        if tensor.dtype not in _DTYPES:
            return f"{name} is {tensor.dtype}; the kernels take bfloat16, float16 and float32"
    needs_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (q, k, v, gate, *others)
    )
    widest = max(q.shape[3], value_dim, feature_dim)
    limit = _WIDEST[torch.float32 in (q.dtype, k.dtype, v.dtype), needs_gradient]
    if widest > limit:
        what = f"{q.dtype} with gradients" if needs_gradient else str(q.dtype)
        return f"a width is {widest}; for {what} the kernels take up to {limit}"
    if feature_dim % 2:
        return f"feature_dim={feature_dim} is odd; the kernels take even ones"
    return None


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which Triton launches on the tensor's device, at which it does not look."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
