"""A teacher of the Llama family by ONNX Runtime on a CPU, keys and values written in place.

The graph is written down here, not exported: with ONNX Runtime's fused operators for norms and for grouped
attention with rotary embedding, which is what its own tools for generation make of such a model.
"""

from __future__ import annotations

import tempfile
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_OPSET, _IR_VERSION = 21, 10
_FUSED = "com.microsoft"

_LARGEST_GRAPH = 2**31


def unavailable_because(config: Any) -> str | None:
    """Return why a teacher of this configuration cannot run here; None when it can."""
    for package in ("onnxruntime", "onnx"):
        if util.find_spec(package) is None:
            return f"the package {package!r} is not installed"
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        return "is written for Llama without biases only"
    if config.hidden_act != "silu":
        return f"is written for the activation silu only, not {config.hidden_act}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if "dynamic" in rope or rope == "longrope":  # frequencies that depend on the length
        return f"is written for rotary embeddings that do not change with the length, not {rope}"
    parameters = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    parameters += (
        4 * config.num_hidden_layers * config.hidden_size * (config.hidden_size + config.intermediate_size)
    )
    if parameters * 4 > _LARGEST_GRAPH:
        return "is written in one file, which ONNX ends at 2 GB"
    return None


class OnnxLlama:
    """A causal model that reads tokens and gives the logits of the last.

    Args:
        teacher: A ``LlamaForCausalLM`` in float32, without biases.
        max_tokens: Room for keys and values.
        int8: Quantize weights to eight bits, and inputs of matrix products while they run.
        num_threads: Of ONNX Runtime; those of PyTorch when None.
    """

    def __init__(
        self, teacher: Any, max_tokens: int, *, int8: bool = False, num_threads: int | None = None
    ) -> None:
        onnxruntime = import_module("onnxruntime")
        config = teacher.config
        self.max_tokens = max_tokens
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or torch.get_num_threads()
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(_graph(teacher, max_tokens))
            if int8:
                path = _quantized(path)
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        shape = (1, config.num_key_value_heads, max_tokens, config.head_dim)
        self.caches = {
            f"{kind}.{layer}": torch.zeros(shape)
            for layer in range(config.num_hidden_layers)
            for kind in ("key", "value")
        }

    def __call__(self, tokens: Tensor, past_tokens: int = 0) -> Tensor:
        """Return the logits [1, 1, V] after tokens [1, T], and keep their keys and values.

        Args:
            tokens: What to read.
            past_tokens: How many of those kept come before them.
        """
        total = past_tokens + tokens.shape[1]
        if total > self.max_tokens:
            raise ValueError(f"{total} tokens do not fit into the room for {self.max_tokens}.")
        binding = self.session.io_binding()
        inputs = {
            "tokens": tokens,
            "last": torch.tensor([total - 1], dtype=torch.int32),
            "total": torch.tensor(total, dtype=torch.int32),
        }
        for name, tensor in inputs.items():
            binding.bind_cpu_input(name, tensor.contiguous().numpy())
        for name, tensor in self.caches.items():
            # Read and written at one place: so no step copies what is there.
            place = ("cpu", 0, tensor.numpy().dtype, tuple(tensor.shape), tensor.data_ptr())
            binding.bind_input(f"past.{name}", *place)
            binding.bind_output(f"present.{name}", *place)
        binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(binding)
        return torch.from_numpy(binding.get_outputs()[-1].numpy())  # in the order they were bound


class _Graph:
    """Nodes and weights while a graph is written."""

    def __init__(self) -> None:
        self.helper, self.types = import_module("onnx.helper"), import_module("onnx").TensorProto
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, name: str, tensor: Tensor) -> str:
        """Store a tensor and return its name."""
        numpy_helper = import_module("onnx.numpy_helper")
        self.weights.append(numpy_helper.from_array(tensor.detach().contiguous().numpy(), name))
        return name

    def node(self, kind: str, inputs: list[str], outputs: str | list[str], **attributes: Any) -> Any:
        """Add an operator and return the name of its output, or of all where several were given."""
        names = [outputs] if isinstance(outputs, str) else outputs
        self.nodes.append(self.helper.make_node(kind, inputs, names, name=names[0], **attributes))
        return outputs

    def linear(self, x: str, module: Any, name: str) -> str:
        """Add a matrix product with a linear layer's weights."""
        product: str = self.node("MatMul", [x, self.weight(f"{name}.weight", module.weight.T)], name)
        return product

    def norm(self, x: str, module: Any, name: str) -> str:
        """Add a root-mean-square norm."""
        weight = self.weight(f"{name}.weight", module.weight)
        normed: str = self.node(
            "SimplifiedLayerNormalization", [x, weight], name, axis=-1, epsilon=module.variance_epsilon
        )
        return normed

    def value(self, name: str, kind: int, shape: list[Any]) -> Any:
        """Return the description of an input or output."""
        return self.helper.make_tensor_value_info(name, kind, shape)


def _graph(teacher: Any, max_tokens: int) -> bytes:
    """Return the model as ONNX."""
    config, model = teacher.config, teacher.model
    graph = _Graph()
    floats, cache_shape = graph.types.FLOAT, [1, config.num_key_value_heads, max_tokens, config.head_dim]
    inputs = [
        graph.value("tokens", graph.types.INT64, [1, "length"]),
        graph.value("last", graph.types.INT32, [1]),
        graph.value("total", graph.types.INT32, []),
    ]
    outputs = []
    cos, sin = model.rotary_emb(torch.zeros(1), torch.arange(max_tokens)[None])
    half = config.head_dim // 2
    graph.weight("cos", cos[0, :, :half])
    graph.weight("sin", sin[0, :, :half])
    x: str = graph.node("Gather", [graph.weight("embedding", model.embed_tokens.weight), "tokens"], "x")
    for index, layer in enumerate(model.layers):
        attention, mlp, prefix = layer.self_attn, layer.mlp, f"layer.{index}"
        normed = graph.norm(x, layer.input_layernorm, f"{prefix}.norm")
        q, k, v = (
            graph.linear(normed, getattr(attention, f"{name}_proj"), f"{prefix}.{name}") for name in "qkv"
        )
        caches = [f"{kind}.{index}" for kind in ("key", "value")]
        attended, *_ = graph.node(
            "GroupQueryAttention",
            [q, k, v, *(f"past.{cache}" for cache in caches), "last", "total", "cos", "sin"],
            [f"{prefix}.attention", *(f"present.{cache}" for cache in caches)],
            domain=_FUSED,
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            do_rotary=1,
        )
        inputs += [graph.value(f"past.{cache}", floats, cache_shape) for cache in caches]
        outputs += [graph.value(f"present.{cache}", floats, cache_shape) for cache in caches]
        x = graph.node("Add", [x, graph.linear(attended, attention.o_proj, f"{prefix}.o")], f"{prefix}.mid")
        normed = graph.norm(x, layer.post_attention_layernorm, f"{prefix}.mlp_norm")
        gate = graph.linear(normed, mlp.gate_proj, f"{prefix}.gate")
        gate = graph.node("QuickGelu", [gate], f"{prefix}.silu", domain=_FUSED, alpha=1.0)
        up = graph.linear(normed, mlp.up_proj, f"{prefix}.up")
        inner = graph.node("Mul", [gate, up], f"{prefix}.inner")
        x = graph.node("Add", [x, graph.linear(inner, mlp.down_proj, f"{prefix}.down")], f"{prefix}.out")
    graph.weight("minus_one", torch.tensor([-1]))
    x = graph.node("Gather", [x, "minus_one"], "last_token", axis=1)
    logits = graph.linear(graph.norm(x, model.norm, "norm"), teacher.lm_head, "logits")
    outputs.append(graph.value(logits, floats, [1, 1, config.vocab_size]))
    helper = graph.helper
    whole = helper.make_graph(graph.nodes, "llama", inputs, outputs, initializer=graph.weights)
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_FUSED, 1)]
    made = helper.make_model(whole, opset_imports=opsets, ir_version=_IR_VERSION)
    return bytes(made.SerializeToString())


def _quantized(path: Path) -> Path:
    quantization = import_module("onnxruntime.quantization")
    smaller = path.with_name("int8.onnx")
    quantization.quantize_dynamic(
        path,
        smaller,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        # Of what comes out of the fused operators, which its shape inference does not know.
        extra_options={"DefaultTensorType": import_module("onnx").TensorProto.FLOAT},
    )
    return smaller
