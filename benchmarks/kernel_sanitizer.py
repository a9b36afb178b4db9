"""Every kernel once, at small odd sizes, for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/kernel_sanitizer.py

    compute-sanitizer --tool racecheck python benchmarks/kernel_sanitizer.py --designs prepared --widths 128

Without the caching allocator each tensor is an allocation of its own, so that one element too far is seen.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch import Tensor

from lawcat.ops.fused import linear_attention_mixer
from lawcat.ops.triton import mixer
from lawcat.ops.triton.configurations import Configuration, choose_configuration
from lawcat.ops.triton.decode_step import decode_step

HEADS, KV_HEADS, TAPS = 4, 2, 4


def inputs(batch: int, tokens: int, width: int, features: int, gate_scale: float) -> dict[str, Tensor]:
    """Return the tensors of a call; strong decays take the slower path."""

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, device="cuda").to(dtype)

    return {
        "q": normal(batch, tokens, HEADS, width, dtype=torch.bfloat16),
        "k": normal(batch, tokens, KV_HEADS, width, dtype=torch.bfloat16),
        "v": normal(batch, tokens, KV_HEADS, width, dtype=torch.bfloat16),
        "gate": gate_scale * normal(batch, tokens, KV_HEADS, features),
        "map_weight": normal(HEADS, width, features // 2),
        "q_taps": normal(HEADS * width, TAPS),
        "k_taps": normal(HEADS * width, TAPS),
    }


def with_design(table: Configuration, is_prepared: bool) -> Configuration:
    """Return the configuration in one design or the other, in short segments."""
    # Where the scan completes what the chunks of a segment read, there are several.
    segment = 128 if is_prepared and table.scan_with_queries else 64
    chunk = 64 if is_prepared else table.chunk
    values = table.value_block if is_prepared else min(64, table.value_block)
    return replace(table, is_prepared=is_prepared, chunk=chunk, segment=segment, value_block=values)


def parse_widths(text: str) -> list[tuple[int, int]]:
    """Return the widths that an option names: "64,80x48" for D = F = 64, and D = 80 with F = 48."""
    found = []
    for part in text.split(","):
        width, _, features = part.partition("x")
        found.append((int(width), int(features or width)))
    return found


def main() -> None:
    """Run forward, backward and decode."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--designs", default="fused,prepared", help="of the forward kernels")
    parser.add_argument(
        "--widths",
        type=parse_widths,
        help="D, or DxF: 64,80x48 of the fused design, 64,80x48,128 of the prepared one",
    )
    arguments = parser.parse_args()
    designs = [design == "prepared" for design in arguments.designs.split(",")]
    # Apart, so that what is written beside one is not in another.
    mixer.workspace = lambda sizes, dtype, device: [
        torch.empty(size, dtype=dtype, device=device) for size in sizes
    ]
    cases = [
        (is_prepared, *widths, strong)
        for is_prepared in designs
        for widths in arguments.widths or parse_widths("64,80x48,128" if is_prepared else "64,80x48")
        for strong in (False, True)
    ]
    for is_prepared, width, features, strong in cases:
        mixer.choose_configuration = lambda *a, p=is_prepared: with_design(choose_configuration(*a), p)
        tensors = inputs(2, 133, width, features, 100.0 if strong else 1.0)
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        mask = torch.arange(133, device="cuda") >= torch.tensor([[5], [0]], device="cuda")
        packed: dict[str, Any] = {"boundaries": (0, 1, 70, 133)}
        for name, options in (("plain", {}), ("padded", {"mask": mask}), ("packed", packed)):
            part = {
                n: t[:1] if name == "packed" and n in ("q", "k", "v", "gate") else t
                for n, t in leaves.items()
            }
            output, state, *_ = linear_attention_mixer(**part, backend="triton", **options)
            torch.autograd.grad(output.float().sum() + state.sum(), list(leaves.values()))
            torch.cuda.synchronize()
            print(
                f"prepared {is_prepared}, D={width} F={features}, strong {strong}, {name}: done", flush=True
            )
    width = features = 64
    with torch.no_grad():
        for batch in (1, 3):
            t = inputs(batch, 1, width, features, 1.0)
            state = torch.zeros(batch, HEADS, features, width + 1, device="cuda")
            before = [
                torch.zeros(batch, HEADS * width, TAPS - 1, device="cuda", dtype=torch.bfloat16)
                for _ in range(2)
            ]
            weights = t["q_taps"], t["k_taps"], t["map_weight"]
            decode_step(t["q"], t["k"], t["v"], t["gate"], state, *before, *weights)
            torch.cuda.synchronize()
    print("decode: done")


if __name__ == "__main__":
    main()
