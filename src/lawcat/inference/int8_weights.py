"""Weights of eight bits for a CPU, where a token takes the time that its weights take to read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lawcat.errors import ConfigurationError

# Up to so many rows the product is taken with the int8 weights themselves; for more it pays to widen them.
_MAX_ROWS = 16
# PyTorch's product reads past the end of a row that its vectors do not divide: sizes are not checked there.
_VECTOR = 32


class Int8Linear(nn.Module):
    """A linear layer whose weights are whole numbers of eight bits, with one scale a row.

    Inputs are not quantized, so that a token's result depends on no other token. A few rows are multiplied in
    bfloat16 with sums in float32; many in the dtype of x, by weights made wide for the call.

    Args:
        weight: [out, in], any floating dtype.
        bias: [out] or None.

    Example:
        >>> linear = Int8Linear(torch.eye(4))
        >>> linear(torch.ones(1, 4)).tolist(), linear.weight.dtype
        ([[1.0, 1.0, 1.0, 1.0]], torch.int8)
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        integers, scale = _rounded(weight.detach())
        self.register_buffer("weight", integers)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., in] times the weights [..., out], in x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] <= _MAX_ROWS and rows.shape[1] % _VECTOR == 0:
            output = torch._weight_int8pack_mm(
                rows.to(torch.bfloat16).contiguous(), self.weight, self.scale
            ).to(x.dtype)
        else:
            output = F.linear(rows, self.wide(x.dtype))
        if self.bias is not None:
            output = output + self.bias.to(x.dtype)
        return output.view(*x.shape[:-1], self.weight.shape[0])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # What is saved under a linear layer's name would be read as its weights.
        raise ConfigurationError(
            "A model with int8 weights cannot be saved; save it before use_int8_weights."
        )

    def wide(self, dtype: torch.dtype) -> Tensor:
        """Return the weights [out, in] in a floating dtype."""
        return self.weight.to(dtype) * self.scale[:, None].to(dtype)


class Int8Embedding(nn.Module):
    """The embedding that shares an output layer's weights.

    Args:
        linear: The output layer.
        dtype: Of the vectors.
    """

    def __init__(self, linear: Int8Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.dtype = linear, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """Return vectors [..., hidden] of tokens [...]."""
        scale = self.linear.scale[tokens, None].to(self.dtype)
        return self.linear.weight[tokens].to(self.dtype) * scale


def use_int8_weights(model: Any) -> None:
    """Replace the linear layers of a causal model by ``Int8Linear``, in place, and tied embeddings with them.

    What lawcat adds (gates, feature maps, filters), norms and the state stay as they are. The model can then
    generate and be evaluated, and neither be trained nor saved (saving is refused).

    Args:
        model: A causal language model of transformers, on the CPU.

    Raises:
        ConfigurationError: for a model that is not on the CPU, or is being trained.

    Example:
        >>> from lawcat import LawcatConfig, LawcatForCausalLM
        >>> config = LawcatConfig(
        ...     vocab_size=10,
        ...     hidden_size=16,
        ...     intermediate_size=16,
        ...     num_hidden_layers=1,
        ...     num_attention_heads=2,
        ... )
        >>> model = LawcatForCausalLM(config).eval()
        >>> use_int8_weights(model)
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape, model.lm_head.weight.dtype
        (torch.Size([1, 3, 10]), torch.int8)
    """
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices - {"cpu"}:
        raise ConfigurationError(
            f"int8 weights are for the CPU, and the model is on {', '.join(sorted(devices))}. "
            "Take bfloat16 there."
        )
    if model.training:
        raise ConfigurationError("int8 weights cannot be trained; call model.eval() first.")
    embedding = model.get_input_embeddings()
    output = model.get_output_embeddings()
    is_tied = output is not None and output.weight is embedding.weight
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Int8Linear(module.weight, module.bias))
    if is_tied:
        model.set_input_embeddings(Int8Embedding(model.get_output_embeddings(), embedding.weight.dtype))


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers of eight bits [out, in] and scales in bfloat16 [out], symmetric around 0.

    Weights are divided by the scale as it is kept, so that its own rounding adds no error. It is rounded up,
    lest the largest weight be cut off.
    """
    wide = weight.to(torch.float32)
    exact = wide.abs().amax(dim=1) / 127
    scale = exact.to(torch.bfloat16)
    above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    scale = torch.where(scale.to(torch.float32) < exact, above, scale)
    scale = torch.where(exact == 0, torch.ones_like(scale), scale)
    integers = (wide / scale.to(torch.float32)[:, None]).round().clamp(-127, 127)
    return integers.to(torch.int8), scale
