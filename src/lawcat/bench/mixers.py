"""Who computes what lies between a layer's projections and ``W_o``: ours by backend, and what it replaces.

Legend: B batch, T tokens, H query heads, G kv heads, N state heads, D head width, F feature width, K taps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module, util
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lawcat.bench import onnx_attention
from lawcat.bench.autotuning import compile_candidates_together
from lawcat.bench.limits import timed_backends
from lawcat.bench.shapes import MixerShape
from lawcat.ops import gated_linear_attention_reference, gated_linear_attention_step
from lawcat.ops.convolution import causal_conv1d_of_heads
from lawcat.ops.decay import log_decay_of
from lawcat.ops.feature_map import hedgehog_feature_map
from lawcat.ops.fused import linear_attention_mixer
from lawcat.ops.shapes import repeat_heads

Kind = Literal["linear", "softmax"]
Unavailable: TypeAlias = Callable[[torch.device, torch.dtype], str | None]

_ANY_SDPA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class MixerInputs:
    """What the mixer of one layer reads: the projections' outputs and its own parameters.

    Attributes:
        shape: Heads and widths.
        q: [B, T, H, D].
        k: [B, T, G, D].
        v: [B, T, G, D].
        gate_logits: Before the activation [B, T, G, F], float32.
        q_conv: Filters [H * D, K], float32; None without convolution.
        k_conv: Filters [N * D, K], float32.
        feature_weight: Matrices of the feature map [N, D, F / 2], float32.
    """

    shape: MixerShape
    q: Tensor
    k: Tensor
    v: Tensor
    gate_logits: Tensor
    q_conv: Tensor | None
    k_conv: Tensor | None
    feature_weight: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are there, by name."""
        found = {name: getattr(self, name) for name in _TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> MixerInputs:
        """Return the same with a function applied to every tensor."""
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)


_TENSORS = ("q", "k", "v", "gate_logits", "q_conv", "k_conv", "feature_weight")


def mixer_inputs(
    shape: MixerShape,
    *,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
) -> MixerInputs:
    """Return random inputs of a mixer; parameters lie around where they start in a model.

    Args:
        shape: Heads and widths.
        batch: Sequences B.
        tokens: Tokens T.
        dtype: Of q, k and v; all else is float32 (float64 where this is).
        device: Where the tensors are.
        seed: The same gives the same.

    Example:
        >>> shape = MixerShape("small", num_heads=4, num_kv_heads=2, head_dim=8, feature_dim=8)
        >>> mixer_inputs(shape, batch=1, tokens=5, dtype=torch.float32, device="cpu").k.shape
        torch.Size([1, 5, 2, 8])
    """
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def random(*size: int, dtype: torch.dtype = wide, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * scale).to(dtype)

    heads, kv_heads, width, features = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.feature_dim
    state_heads, taps = shape.num_state_heads, shape.conv_kernel_size
    q_conv = k_conv = None
    if taps is not None:
        q_conv, k_conv = random(heads * width, taps, scale=0.1), random(state_heads * width, taps, scale=0.1)
        q_conv[:, -1] += 1.0
        k_conv[:, -1] += 1.0
    identity = torch.eye(width, features // 2, dtype=wide, device=device)
    return MixerInputs(
        shape,
        q=random(batch, tokens, heads, width, dtype=dtype),
        k=random(batch, tokens, kv_heads, width, dtype=dtype),
        v=random(batch, tokens, kv_heads, width, dtype=dtype),
        gate_logits=random(batch, tokens, kv_heads, features) + 4.0,
        q_conv=q_conv,
        k_conv=k_conv,
        feature_weight=identity + random(state_heads, width, features // 2, scale=0.1),
    )


@dataclass(frozen=True)
class Context:
    """What decoding knows of the tokens before.

    Attributes:
        k: Their keys [B, T, G, D], the token to decode included.
        v: Their values.
        state: What linear attention keeps of them instead [B, N, F, D + 1], float32.
        q_inputs: The inputs of q's convolution before the token [B, H * D, K - 1]; None without convolution.
        k_inputs: The same for k [B, N * D, K - 1].
    """

    k: Tensor
    v: Tensor
    state: Tensor
    q_inputs: Tensor | None
    k_inputs: Tensor | None

    def double(self) -> Context:
        """Return the same in float64."""
        return Context(*(None if t is None else t.double() for t in vars(self).values()))  # type: ignore[arg-type]

    def num_bytes(self, kind: Kind) -> int:
        """Return the bytes of what attention of a kind keeps of these tokens."""
        kept = (self.k, self.v) if kind == "softmax" else (self.state, self.q_inputs, self.k_inputs)
        return sum(tensor.nbytes for tensor in kept if tensor is not None)


def random_context(inputs: MixerInputs, tokens: int, *, seed: int = 0) -> Context:
    """Return what a random context of so many tokens leaves for the one token of ``inputs``."""
    shape, (batch, _, kv_heads, width) = inputs.shape, inputs.k.shape
    device, dtype = inputs.q.device, inputs.q.dtype
    generator = torch.Generator(device).manual_seed(seed + 1)

    def random(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    # A head's keys lie together, as a cache has them.
    k, v = (random(batch, kv_heads, tokens, width).transpose(1, 2) for _ in range(2))
    wide = inputs.feature_weight.dtype
    state = random(batch, shape.num_state_heads, shape.feature_dim, width + 1, dtype=wide)
    state[..., -1] = state[..., -1].abs() + 1.0
    q_inputs = k_inputs = None
    if shape.conv_kernel_size is not None:
        before = shape.conv_kernel_size - 1
        q_inputs = random(batch, shape.num_heads * width, before)
        k_inputs = random(batch, shape.num_state_heads * width, before)
    return Context(k, v, state, q_inputs, k_inputs)


def operator_inputs(
    inputs: MixerInputs, context: Context | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return all that precedes the recurrence, in plain PyTorch: q and k as features, v and log-decays, each
    of k's and v's heads repeated to the state heads."""
    shape = inputs.shape
    q = inputs.q
    decay = log_decay_of(inputs.gate_logits, shape.gate_divisor, shape.min_log_decay)
    k, v, decay = (repeat_heads(t, shape.num_state_heads) for t in (inputs.k, inputs.v, decay))
    if inputs.q_conv is not None and inputs.k_conv is not None:
        q_before, k_before = (None, None) if context is None else (context.q_inputs, context.k_inputs)
        q, _ = causal_conv1d_of_heads(q, inputs.q_conv, q_before)
        k, _ = causal_conv1d_of_heads(k, inputs.k_conv, k_before)
    q, k = (hedgehog_feature_map(t, inputs.feature_weight) for t in (q, k))
    return q, k, v, decay


def linear_reference(inputs: MixerInputs, context: Context | None = None) -> Tensor:
    """Return the mixer's output [B, T, H, D] by the definition, in the dtype of the inputs."""
    output, _ = gated_linear_attention_reference(
        *operator_inputs(inputs, context),
        initial_state=None if context is None else context.state,
        eps=inputs.shape.eps,
    )
    return output


def softmax_reference(inputs: MixerInputs, context: Context | None = None) -> Tensor:
    """Return causal softmax attention [B, T, H, D] by its definition."""
    group = inputs.shape.num_heads // inputs.shape.num_kv_heads
    k, v = (inputs.k, inputs.v) if context is None else (context.k, context.v)
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", inputs.q, k) / math.sqrt(inputs.shape.head_dim)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    later = later.triu(1 + scores.shape[-1] - scores.shape[-2])
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(later, -torch.inf).softmax(-1), v)


class Reference(Protocol):
    """The definition that a contender is checked against."""

    def __call__(self, inputs: MixerInputs, context: Context | None = None) -> Tensor:
        """Return the output [B, T, H, D]; of one token where there is a context."""


REFERENCES: dict[Kind, Reference] = {"linear": linear_reference, "softmax": softmax_reference}


@dataclass(frozen=True)
class Mixer:
    """One contender.

    Attributes:
        name: In tables.
        kind: What it computes, which says the definition it is checked against.
        is_ours: Whether it is lawcat.
        forward: Inputs to output [B, T, H, D].
        unavailable_because: Why it cannot run on a device and dtype; None when it can.
        backend: Which of our backends it runs.
        decode: Of inputs of one token and what came before, what computes that token; None where there is no
            such form.
        has_backward: Whether ``forward`` is differentiable.
    """

    name: str
    kind: Kind
    is_ours: bool
    forward: Callable[[MixerInputs], Tensor]
    unavailable_because: Unavailable
    backend: str | None = None
    decode: Callable[[MixerInputs, Context], Callable[[], Tensor]] | None = None
    has_backward: bool = True


def mixers(backends: tuple[str, ...] | None = None) -> list[Mixer]:
    """Return every contender that this version knows, whether it can run here or not.

    Args:
        backends: Which of our backends; all but the slow definition when None.

    Example:
        >>> [mixer.name for mixer in mixers() if mixer.is_ours][0]
        'lawcat (torch)'
    """
    names = backends or timed_backends()
    return [
        *(_ours(name) for name in names),
        _sdpa("FlashAttention-2 (torch SDPA)", [SDPBackend.FLASH_ATTENTION], _needs_half_precision_gpu),
        _sdpa("cuDNN attention (torch SDPA)", [SDPBackend.CUDNN_ATTENTION], _needs_half_precision_gpu),
        _sdpa("softmax attention (torch SDPA)", _ANY_SDPA, _is_measured_by_name),
        Mixer(
            "softmax attention (ONNX Runtime)",
            "softmax",
            False,
            lambda inputs: onnx_attention.attention(inputs.q, inputs.k, inputs.v),
            onnx_attention.unavailable_because,
            has_backward=False,
        ),
        Mixer("flash-attn", "softmax", False, _flash_attn, _needs_gpu_package("flash_attn")),
        Mixer("chunk_gla (fla) + torch maps", "linear", False, chunk_gla, _needs_gpu_package("fla")),
    ]


def _ours(backend: str) -> Mixer:
    def forward(inputs: MixerInputs) -> Tensor:
        shape = inputs.shape
        output, *_ = linear_attention_mixer(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.gate_logits,
            inputs.feature_weight,
            q_taps=inputs.q_conv,
            k_taps=inputs.k_conv,
            gate_divisor=shape.gate_divisor,
            min_log_decay=shape.min_log_decay,
            eps=shape.eps,
            keep_inputs=False,  # of no use to who reads the output alone
            backend=backend,
        )
        return output

    def available(device: torch.device, dtype: torch.dtype) -> str | None:
        return None  # the call itself says what it cannot run

    decode = step_by_triton if backend == "triton" else step_by_torch
    return Mixer(f"lawcat ({backend})", "linear", True, forward, available, backend, decode)


def _sdpa(name: str, backends: list[SDPBackend], reason: Unavailable) -> Mixer:
    def attend(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        with sdpa_kernel(backends):
            output = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
        return output.transpose(1, 2)

    def forward(inputs: MixerInputs) -> Tensor:
        return attend(inputs.q, inputs.k, inputs.v, is_causal=True)

    def decode(inputs: MixerInputs, context: Context) -> Callable[[], Tensor]:
        return lambda: attend(inputs.q, context.k, context.v, is_causal=False)

    return Mixer(name, "softmax", False, forward, reason, decode=decode)


def _flash_attn(inputs: MixerInputs) -> Tensor:
    output: Tensor = import_module("flash_attn").flash_attn_func(inputs.q, inputs.k, inputs.v, causal=True)
    return output


def chunk_gla(inputs: MixerInputs) -> Tensor:
    """Return the mixer's output [B, T, H, D] by fla's kernels and PyTorch's convolution and maps.

    fla has no normaliser that is gated: it is a column of ones beside v.
    """
    compile_candidates_together()
    q, k, v, decay = operator_inputs(inputs)
    values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    recurrence = import_module("fla.ops.gla").chunk_gla
    read, _ = recurrence(q.to(v.dtype), k.to(v.dtype), values, g=decay, scale=1.0)
    return (read[..., :-1] / (read[..., -1:] + inputs.shape.eps)).to(v.dtype)  # type: ignore[no-any-return]


def step_by_torch(inputs: MixerInputs, context: Context) -> Callable[[], Tensor]:
    """Return what computes one token in plain PyTorch; it leaves the context as it is."""

    def run() -> Tensor:
        q, k, v, decay = operator_inputs(inputs, context)
        return gated_linear_attention_step(q, k, v, decay, context.state, eps=inputs.shape.eps)[0]

    return run


def step_by_triton(inputs: MixerInputs, context: Context) -> Callable[[], Tensor]:
    """Return what computes one token by the fused kernel; it moves the context's state on."""
    decode_step = import_module("lawcat.ops.triton.decode_step").decode_step
    output = torch.full_like(inputs.q, torch.nan)

    def run() -> Tensor:
        found: Tensor = decode_step(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.gate_logits,
            context.state,
            context.q_inputs,
            context.k_inputs,
            inputs.q_conv,
            inputs.k_conv,
            inputs.feature_weight,
            gate_divisor=inputs.shape.gate_divisor,
            min_log_decay=inputs.shape.min_log_decay,
            eps=inputs.shape.eps,
            out=output,
        )
        return found

    return run


def _needs_half_precision_gpu(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "runs on a GPU only"
    return None if dtype in (torch.bfloat16, torch.float16) else "runs in bfloat16 and float16 only"


def _is_measured_by_name(device: torch.device, dtype: torch.dtype) -> str | None:
    return "on a GPU its implementations are measured by name" if device.type == "cuda" else None


def _needs_gpu_package(package: str) -> Unavailable:
    def reason(device: torch.device, dtype: torch.dtype) -> str | None:
        if util.find_spec(package) is None:
            return f"the package {package!r} is not installed"
        return _needs_half_precision_gpu(device, dtype)

    return reason
