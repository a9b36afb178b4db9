"""What a lawcat model remembers between calls: a state of constant size a linear layer, keys and values a softmax one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .configuration_lawcat import LINEAR, LawcatConfig


class LinearAttentionState(CacheLayerMixin):
    """The memory of one linear layer.

    Attributes:
        recurrent: The state S [B, N, F, D + 1] in float32, or None before the first token.
        q_inputs: The last K - 1 inputs of q's convolution [B, H * D, K - 1], or None.
        k_inputs: The same for k [B, N * D, K - 1].
        num_tokens: Tokens seen, padding included.
    """

    _TENSORS = ("recurrent", "q_inputs", "k_inputs")

    def __init__(self) -> None:
        super().__init__()
        self.recurrent: Tensor | None = None
        self.q_inputs: Tensor | None = None
        self.k_inputs: Tensor | None = None
        self.num_tokens = 0

    def store(
        self, recurrent: Tensor, q_inputs: Tensor | None, k_inputs: Tensor | None, *, num_tokens: int
    ) -> None:
        """Take over the state after ``num_tokens`` more tokens."""
        self.recurrent, self.q_inputs, self.k_inputs = recurrent, q_inputs, k_inputs
        self.num_tokens += num_tokens
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are there, by name."""
        named = {name: getattr(self, name) for name in self._TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _map(self, function: Any) -> None:
        for name, tensor in self.tensors().items():
            setattr(self, name, function(tensor))

    # What transformers asks of a cache layer.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first ``store`` sets everything."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse keys and values: this layer keeps none."""
        raise TypeError("a linear attention layer keeps a state and no keys and values")

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of the mask that covers what was seen and ``query_length`` more."""
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no longest sequence."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1, under the older name of ``get_max_length``."""
        return -1

    def offload(self) -> None:
        """Move the state to the CPU."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Do nothing: a state is small, and is moved back when it is used."""

    def reset(self) -> None:
        """Forget everything."""
        self.recurrent = self.q_inputs = self.k_inputs = None
        self.num_tokens, self.is_initialized = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the given rows, as beam search asks."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self._map(lambda tensor: tensor[indices])


class LawcatCache(Cache):
    """The memory of a whole model; made by ``forward`` when ``use_cache`` is set and none is given.

    Args:
        config: The model's configuration.
        layer_types: What each layer computes; ``config.layer_types`` when None.

    Example:
        >>> from lawcat import LawcatCache, LawcatConfig
        >>> LawcatCache(LawcatConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)).state_bytes()
        0
    """

    def __init__(self, config: LawcatConfig, layer_types: list[str] | None = None) -> None:
        layer_types = layer_types or config.layer_types
        assert layer_types is not None
        layers = [LinearAttentionState() if kind == LINEAR else DynamicLayer() for kind in layer_types]
        super().__init__(layers=layers)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor held, named ``layer.<i>.<what>``."""
        named = {}
        for index, layer in enumerate(self.layers):
            if isinstance(layer, LinearAttentionState):
                held = layer.tensors()
            else:
                held = {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
            named.update({f"layer.{index}.{name}": tensor for name, tensor in held.items()})
        return named

    def state_bytes(self) -> int:
        """Return the bytes held: constant in the number of tokens, but for softmax layers."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def fork(self) -> LawcatCache:
        """Return an independent copy, so that one prompt can be continued in several ways."""
        return copy.deepcopy(self)

    def to(self, device: torch.device | str) -> LawcatCache:
        """Move every tensor to a device, in place, and return the cache."""
        for layer in self.layers:
            if isinstance(layer, LinearAttentionState):
                layer._map(lambda tensor: tensor.to(device))
            elif layer.is_initialized:
                layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
        return self
