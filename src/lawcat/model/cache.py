"""What a lawcat model remembers between calls: a state a linear layer, keys and values a softmax layer, of
which a sliding layer keeps the last and the first only."""

# mypy is told to leave transformers out.
# mypy: disallow-subclassing-any=False

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .configuration_lawcat import LINEAR, SLIDING, LawcatConfig


class SlidingWindowState(CacheLayerMixin):
    """The memory of a layer with a window, of one size. These tensors are replaced and never written to.

    The last w entries of several streams, oldest first and zeros before the first token; and the sinks.

    Attributes:
        window_keys: With their rotary embedding [B, w, G, D]; None before the first token, as all here.
        window_values: [B, w, G, D].
        window_is_visible: Which of these are there, and are neither padding nor sinks [B, w], bool.
        window_features: Of the keys, which a linear layer's state takes in later [B, w, N, F] in float32.
        window_log_decay: Of a linear layer's gate [B, w, G, F or 1] in float32.
        sink_keys: The first tokens, zeros for those still to come [B, S, G, D].
        sink_values: [B, S, G, D].
        num_real: Tokens seen without padding [B], where there are sinks.
        num_tokens: Tokens seen, padding included.
    """

    _TENSORS: ClassVar[tuple[str, ...]] = (
        "window_keys",
        "window_values",
        "window_is_visible",
        "window_features",
        "window_log_decay",
        "sink_keys",
        "sink_values",
        "num_real",
    )

    def __init__(self) -> None:
        super().__init__()
        self.window_keys: Tensor | None = None
        self.window_values: Tensor | None = None
        self.window_is_visible: Tensor | None = None
        self.window_features: Tensor | None = None
        self.window_log_decay: Tensor | None = None
        self.sink_keys: Tensor | None = None
        self.sink_values: Tensor | None = None
        self.num_real: Tensor | None = None
        self.num_tokens = 0

    def count(self, num_tokens: int) -> None:
        """Take note that ``num_tokens`` more were seen."""
        self.num_tokens += num_tokens
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are there, by name."""
        named = {name: getattr(self, name) for name in self._TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        for name, tensor in self.tensors().items():
            setattr(self, name, function(tensor))

    # What transformers asks of a cache layer.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first ``store`` sets everything."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Refuse keys and values: this layer keeps none that another could read."""
        raise TypeError("this layer keeps a state of one size and no keys and values for others to read")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget the last tokens, unless there are none to forget."""
        if tokens_to_remove:
            raise ValueError(
                "the state of this attention cannot be taken back to an earlier token, which assisted "
                "generation needs. Keep a cache.fork() of the place to return to."
            )

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of the mask that covers what was seen and ``query_length`` more."""
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no longest sequence."""
        return -1

    def offload(self) -> None:
        """Do nothing: a state is small, so it stays where it is used."""

    def prefetch(self) -> None:
        """Do nothing: see ``offload``."""

    def reset(self) -> None:
        """Forget everything."""
        for name in self._TENSORS:
            setattr(self, name, None)
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


class LinearAttentionState(SlidingWindowState):
    """The memory of one linear layer, with a window or without.

    The decoding kernel writes a single token into the three tensors below, where a GPU decodes without a
    gradient: a tensor taken from here before a step may hold another state after it. ``LawcatCache.fork``
    keeps one. All else replaces tensors.

    Attributes:
        recurrent: The state S [B, N, F, D + 1] in float32, or None before the first token.
        q_inputs: The last K - 1 inputs of q's convolution [B, H * D, K - 1], or None.
        k_inputs: The same for k [B, N * D, K - 1].
    """

    _TENSORS = ("recurrent", "q_inputs", "k_inputs", *SlidingWindowState._TENSORS)

    def __init__(self) -> None:
        super().__init__()
        self.recurrent: Tensor | None = None
        self.q_inputs: Tensor | None = None
        self.k_inputs: Tensor | None = None

    def store(
        self, recurrent: Tensor, q_inputs: Tensor | None, k_inputs: Tensor | None, *, num_tokens: int
    ) -> None:
        """Take over the state after ``num_tokens`` more tokens."""
        self.recurrent, self.q_inputs, self.k_inputs = recurrent, q_inputs, k_inputs
        self.count(num_tokens)

    def make_contiguous(self) -> None:
        """Lay out the three tensors as a kernel that writes to them needs."""
        for name in ("recurrent", "q_inputs", "k_inputs"):
            tensor = getattr(self, name)
            if tensor is not None and not tensor.is_contiguous():
                setattr(self, name, tensor.contiguous())


class LawcatCache(Cache):
    """The memory of a whole model; made by ``forward`` when ``use_cache`` is set and none is given.

    Args:
        config: The model's configuration.
        layer_types: What each layer computes; ``config.layer_types`` when None.

    Example:
        >>> from lawcat import LawcatCache, LawcatConfig
        >>> config = LawcatConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
        >>> LawcatCache(config).state_bytes()
        0
    """

    def __init__(self, config: LawcatConfig, layer_types: list[str] | None = None) -> None:
        layer_types = layer_types or config.layer_types
        assert layer_types is not None
        self.layer_types = list(layer_types)
        super().__init__(layers=self._new_layers())

    def _new_layers(self) -> list[CacheLayerMixin]:
        kinds = {LINEAR: LinearAttentionState, SLIDING: SlidingWindowState}
        return [kinds.get(kind, DynamicLayer)() for kind in self.layer_types]

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor held, named ``layer.<i>.<what>``."""
        named = {}
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SlidingWindowState):
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
        twin = copy.copy(self)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        twin._map(torch.clone)
        return twin

    def to(self, device: torch.device | str) -> LawcatCache:
        """Move every tensor to a device, in place, and return the cache."""
        self._map(lambda tensor: tensor.to(device))
        return self

    def reset(self) -> None:
        """Forget everything."""
        # New layers: older versions of transformers only fill a softmax layer with zeros.
        self.layers = self._new_layers()

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            if isinstance(layer, SlidingWindowState):
                layer._map(function)
            elif layer.is_initialized:
                layer.keys, layer.values = function(layer.keys), function(layer.values)
                layer.device = layer.keys.device
