"""Where tests run the kernels: a GPU, else Triton's interpreter; modules that import this skip without."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and not triton.knobs.runtime.interpret:
    pytest.skip("triton was imported without its interpreter", allow_module_level=True)

DEVICE = "cuda" if HAS_GPU else "cpu"
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
