"""Softmax attention by ONNX Runtime on a CPU: its fused operator with grouped queries, alone in a graph."""

from __future__ import annotations

from importlib import import_module, util
from typing import Any

import torch
from torch import Tensor

_OPSET, _IR_VERSION = 21, 10


def unavailable_because(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why it cannot run on a device and dtype; None when it can."""
    if device.type != "cpu":
        return "is measured on a CPU only"
    for package in ("onnxruntime", "onnx"):
        if util.find_spec(package) is None:
            return f"the package {package!r} is not installed"
    return None if dtype == torch.float32 else "runs in float32 only"


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal softmax attention [B, T, H, D].

    Args:
        q: [B, T, H, D], float32 on the CPU.
        k: [B, T, G, D].
        v: [B, T, G, D].
    """
    import numpy as np

    batch, tokens = q.shape[:2]
    feeds = {name: t.flatten(2).contiguous().numpy() for name, t in (("q", q), ("k", k), ("v", v))}
    feeds["last"] = np.full(batch, tokens - 1, dtype=np.int32)
    feeds["total"] = np.array(tokens, dtype=np.int32)
    (output,) = _session(q.shape[2], k.shape[2]).run(["output"], feeds)
    return torch.from_numpy(output).view(q.shape)


_sessions: dict[tuple[int, int, int], Any] = {}


def _session(num_heads: int, num_kv_heads: int) -> Any:
    key = (num_heads, num_kv_heads, torch.get_num_threads())
    if key not in _sessions:
        onnxruntime = import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = key[2]
        options.log_severity_level = 3
        _sessions[key] = onnxruntime.InferenceSession(
            _graph(num_heads, num_kv_heads), options, providers=["CPUExecutionProvider"]
        )
    return _sessions[key]


def _graph(num_heads: int, num_kv_heads: int) -> bytes:
    helper, types = import_module("onnx.helper"), import_module("onnx").TensorProto
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "", "", "last", "total"],
        ["output", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=num_heads,
        kv_num_heads=num_kv_heads,
    )
    inputs = [helper.make_tensor_value_info(name, types.FLOAT, [None, None, None]) for name in "qkv"]
    inputs.append(helper.make_tensor_value_info("last", types.INT32, [None]))
    inputs.append(helper.make_tensor_value_info("total", types.INT32, []))
    outputs = [helper.make_tensor_value_info("output", types.FLOAT, [None, None, None])]
    outputs += [
        helper.make_tensor_value_info(name, types.FLOAT, [None] * 4)
        for name in ("present_key", "present_value")
    ]
    graph = helper.make_graph([node], "attention", inputs, outputs)
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    return bytes(model.SerializeToString())
