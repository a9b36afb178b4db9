"""What a figure depends on beside the code: device, versions, threads."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lawcat.versions import versions


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what is known of the place where figures are taken.

    Args:
        device: Where things run.
        dtype: What in.

    Example:
        >>> environment(torch.device("cpu"), torch.float32)["dtype"]
        'float32'
    """
    found: dict[str, Any] = {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions() | _versions_of_contenders(),
        "system": f"{platform.system()} {platform.release()}",
    }
    if device.type == "cpu":
        found["torch_threads"] = torch.get_num_threads()
        found["cores"] = os.cpu_count()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["cuda"] = torch.version.cuda
        found["memory_bytes"] = properties.total_memory
        found["multiprocessors"] = properties.multi_processor_count
        found |= _driver(device)
    return found


def _versions_of_contenders() -> dict[str, str]:
    found = {}
    for package in ("flash-attn", "flash-linear-attention", "fla-core", "onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _driver(device: torch.device) -> dict[str, Any]:
    """Return the driver's version and the clocks as they are now, where nvidia-smi tells."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    uuid = torch.cuda.get_device_properties(device).uuid  # its place in nvidia-smi's list may be another
    query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id=GPU-{uuid}"]
    try:
        done = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=False))
