"""The dtype of arithmetic: float32, or float64 where a tensor is float64, whatever autocast says."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype of arithmetic and state: float64 if any tensor is float64, else float32."""
    is_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a float16 or bfloat16 tensor in float32, and others as they are.

    >>> at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    if tensor.dtype in (torch.float32, torch.float64):  # asked for at each token, many times a layer
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def at_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v in the dtype that holds all of theirs: float32 for float16 beside bfloat16.

    Beside a float64 they stay as they are, for a message to name the one that is.

    >>> half = torch.ones(1).half()
    >>> at_one_dtype(half, half.bfloat16(), half)[2].dtype
    torch.float32
    """
    dtypes = q.dtype, k.dtype, v.dtype
    if dtypes[0] == dtypes[1] == dtypes[2] or torch.float64 in dtypes:
        return q, k, v
    dtype = torch.promote_types(torch.promote_types(dtypes[0], dtypes[1]), dtypes[2])
    return q.to(dtype), k.to(dtype), v.to(dtype)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which no operation on the tensor's device is cast down.

    Where autocast is off it does nothing at all, so that it leaves no trace in an exported graph.
    """
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
