"""A kernel with its constants, launched again without asking Triton what to compile."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import triton
from torch import Tensor

from ...errors import BackendError

# Asking Triton costs tens of microseconds a launch. Its settings (``triton.knobs``) are then looked at once.
reuse_compiled = True

# Kernels are compiled for tensors that start at a multiple of these bytes, or for any.
_ALIGNMENT = 16
_LARGEST_INT32 = 2**31 - 1

# What `compile_together` collects; launches are noted here instead of run.
_noted: ContextVar[list[Callable[[], object]] | None] = ContextVar("lawcat_noted_launches", default=None)


def compile_together(run: Callable[[], object]) -> None:
    """Compile the kernels that a function launches, several at once and without launching any.

    One after the other they take 5 to 25 seconds. Triton compiles outside Python's global lock.

    Args:
        run: Called once; what its kernels would have written is not there.
    """
    try:
        from triton.runtime._async_compile import AsyncCompileMode, active_mode
    except ImportError:  # then each is compiled when it is first launched
        return
    if active_mode.get() is not None:  # the caller's own
        return
    noted: list[Callable[[], object]] = []
    token = _noted.set(noted)
    try:
        run()
    finally:
        _noted.reset(token)
    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool):
        for compile_ in noted:
            compile_()


class Launch:
    """A kernel with its constants, and what it was compiled to by what else that depends on.

    Triton compiles for the device, the constants and warps, each argument's type (an integer's depends on its
    size) or None, and whether tensors are aligned; for no integer's value, where the kernel says so. Here the
    key is the device and the dtypes. Unaligned tensors and integers of 64 bits go through Triton each time.

    Args:
        kernel: What ``triton.jit`` gave.
        each: Programs of a unit of work, as a call counts them.
        warps: See ``Tuning``.
        stages: See ``Tuning``.
        registers: See ``Tuning``.
        constants: The kernel's ``constexpr`` arguments by name.
    """

    def __init__(
        self,
        kernel: Any,
        each: int,
        *,
        warps: int,
        stages: int = 1,
        registers: int | None = None,
        **constants: Any,
    ) -> None:
        self._kernel = kernel
        self._each = each
        self._constants = constants
        self._options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
        self._compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}

    def __call__(self, units: int, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...]) -> None:
        """Run the kernel on a grid of one dimension.

        Args:
            units: The grid is ``each`` times that.
            tensors: The kernel's first arguments; the first of them is no None.
            numbers: Its next ones.
        """
        noted = _noted.get()
        if noted is not None:
            noted.append(lambda: self._warm_up(units, tensors, numbers))
            return
        if not reuse_compiled:
            self._through_triton(units, tensors, numbers)
            return
        pointers: list[int | None] = []
        key: list[Any] = [tensors[0].device]  # type: ignore[union-attr]
        bits = 0
        for tensor in tensors:
            if tensor is None:
                pointers.append(None)
                key.append(None)
            else:
                pointer = tensor.data_ptr()
                bits |= pointer
                pointers.append(pointer)
                key.append(tensor.dtype)
        if bits % _ALIGNMENT or max(numbers) > _LARGEST_INT32:
            self._through_triton(units, tensors, numbers)
            return
        known = self._compiled.get(tuple(key))
        if known is not None:
            compiled, constants = known
            # Addresses, as asking tensors for theirs a second time would cost as much again.
            compiled[units * self._each, 1, 1](*pointers, *numbers, *constants)
            return
        compiled = self._through_triton(units, tensors, numbers)
        # The interpreter compiles nothing, and in Triton's asynchronous mode it comes later.
        if hasattr(type(compiled), "__getitem__"):
            names = self._kernel.arg_names[len(tensors) + len(numbers) :]
            # Compiled in: what stands in their places is not read.
            self._compiled[tuple(key)] = compiled, [self._constants.get(name) for name in names]

    def _warm_up(self, units: int, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...]) -> None:
        grid = (units * self._each,)
        self._kernel.warmup(*tensors, *numbers, grid=grid, **self._constants, **self._options)

    def _through_triton(
        self, units: int, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...]
    ) -> Any:
        try:
            return self._kernel[(units * self._each,)](*tensors, *numbers, **self._constants, **self._options)
        except triton.runtime.errors.OutOfResources as error:
            raise BackendError(
                f"{self._kernel.fn.__name__} needs more of the GPU than it has: {error}. Use backend='torch' "
                "(for a whole program, the environment variable LAWCAT_BACKEND=torch)."
            ) from error
