"""Decoding by a CUDA graph: one launch for a token of every row, instead of hundreds.

A small model's token takes the GPU less time than Python takes to launch its kernels. A graph repeats what it
has captured at the same addresses, which the model allows where its layers write their state in place: linear
layers without a window, by the decoding kernel. Everything else is decoded as it was.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from lawcat.model.cache import LawcatCache, LinearAttentionState
from lawcat.model.configuration_lawcat import LINEAR
from lawcat.model.modeling_lawcat import LawcatForCausalLM

# What a capture asks for: libraries make their handles and workspaces in the first calls.
_CALLS_BEFORE_CAPTURE = 3
# What a forward of one token may be given beside its tokens and the cache.
_KNOWN_ARGUMENTS = frozenset(
    {
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "use_cache",
        "logits_to_keep",
        "return_dict",
    }
)


class NotCapturableError(RuntimeError):
    """The model's forward does not leave its state where it is, so that no graph can repeat it."""


class Graph(Protocol):
    """What repeats a function's work; see ``CudaGraph``."""

    def warm_up(self, function: Callable[[], Tensor]) -> None:
        """Run the function until it asks for nothing new."""

    def capture(self, function: Callable[[], Tensor]) -> None:
        """Take note of what the function does; whether that is done now as well is open."""

    def replay(self) -> Tensor:
        """Do it, and return what the function returns: one tensor, the same each time or not."""


class CudaGraph:
    """What a function launches on a CUDA device, to be launched again at once.

    Args:
        device: The device.
        pool: Memory that it shares with other graphs, from ``torch.cuda.graph_pool_handle``; its own when
            None. Of those that share, one is replayed at a time.
    """

    def __init__(self, device: torch.device, *, pool: Any = None) -> None:
        self._device, self._pool = device, pool
        self._graph = torch.cuda.CUDAGraph()
        self._output: Any = None

    def warm_up(self, function: Callable[[], Any]) -> None:
        """Run the function a few times beside the present stream."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        present = torch.cuda.current_stream(self._device)
        stream.wait_stream(present)
        with torch.cuda.stream(stream):
            for _ in range(_CALLS_BEFORE_CAPTURE):
                function()
        present.wait_stream(stream)

    def capture(self, function: Callable[[], Any]) -> None:
        """Record what the function launches. Nothing is computed."""
        with (
            torch.cuda.device(self._device),
            # Where the capture fails, its own stream stays the present one.
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            # Other threads may use the GPU meanwhile.
            torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            self._output = function()

    def replay(self) -> Any:
        """Launch it all and return what the function returned, which the next replay writes over."""
        self._graph.replay()
        return self._output


class GraphedDecoder:
    """A model's forward of one token a row, captured for one batch size.

    It has a state of its own, at addresses that stay. A cache that is decoded holds those tensors as long as
    it is the one decoded, so that it can be looked at, copied and reordered as ever.

    Args:
        forward: Of the model.
        cache: Of a batch as those to come: its rows, layers and dtypes count, and it is left as it is.
        graph: Not yet used.

    Raises:
        NotCapturableError: where a forward replaces a tensor of the cache.
    """

    def __init__(self, forward: Callable[..., Any], cache: LawcatCache, graph: Graph) -> None:
        # Not inference tensors, which could not be written to outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self._cache = cache.fork()
            held = self._cache.tensors()
            first = next(iter(held.values()))
            self._input_ids = torch.zeros(first.shape[0], 1, dtype=torch.long, device=first.device)
            self._position_ids = torch.zeros_like(self._input_ids)

            def one_token() -> Tensor:
                logits: Tensor = forward(
                    input_ids=self._input_ids,
                    position_ids=self._position_ids,
                    past_key_values=self._cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits
                return logits

            graph.warm_up(one_token)
            self._check_in_place(held)
            graph.capture(one_token)
            self._check_in_place(held)
        self._graph = graph
        self._decoded: weakref.ref[LawcatCache] | None = None

    def _check_in_place(self, before: dict[str, Tensor]) -> None:
        after = self._cache.tensors()
        if after.keys() != before.keys() or any(after[name] is not t for name, t in before.items()):
            raise NotCapturableError("a forward of one token replaces the state instead of writing to it")

    def fits(self, cache: LawcatCache) -> bool:
        """Return whether this is the decoder of a batch like the cache's."""
        ours, theirs = self._cache.tensors(), cache.tensors()
        return ours.keys() == theirs.keys() and all(
            (ours[name].shape, ours[name].dtype, ours[name].device) == (t.shape, t.dtype, t.device)
            for name, t in theirs.items()
        )

    def step(self, cache: LawcatCache, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Return the logits [B, 1, V] of the tokens that follow, and bring the cache up to date.

        Args:
            cache: Of what came before; one that ``fits``.
            input_ids: A token a row, none of them padding [B, 1].
            position_ids: Their places [B, 1]; the number of tokens in the cache when None.
        """
        with torch.no_grad():
            self._take(cache)
            self._input_ids.copy_(input_ids)
            if position_ids is None:
                self._position_ids.fill_(cache.get_seq_length())
            else:
                self._position_ids.copy_(position_ids)
            logits = self._graph.replay().clone()
        for layer in cache.layers:
            layer.count(1)
        return logits

    def release(self) -> None:
        """Give the cache that is decoded tensors of its own."""
        cache = None if self._decoded is None else self._decoded()
        self._decoded = None
        if cache is None:
            return
        with torch.inference_mode(False), torch.no_grad():
            for layer, name, tensor in self._places(cache):
                if getattr(layer, name) is tensor:
                    setattr(layer, name, tensor.clone())

    def _take(self, cache: LawcatCache) -> None:
        is_same = self._decoded is not None and self._decoded() is cache
        if is_same and all(getattr(layer, name) is tensor for layer, name, tensor in self._places(cache)):
            return
        self.release()
        for layer, name, tensor in self._places(cache):
            tensor.copy_(getattr(layer, name))
            setattr(layer, name, tensor)
        self._decoded = weakref.ref(cache)

    def _places(self, cache: LawcatCache) -> Iterator[tuple[LinearAttentionState, str, Tensor]]:
        """Yield each layer of a cache with the names and our tensors of its state."""
        for layer, ours in zip(cache.layers, self._cache.layers, strict=True):
            for name, tensor in ours.tensors().items():
                yield layer, name, tensor


# One a model: of the batch size that it decoded last.
_decoders: weakref.WeakKeyDictionary[LawcatForCausalLM, tuple[object, GraphedDecoder]] = (
    weakref.WeakKeyDictionary()
)


class DecodeGraphs:
    """What ``decoding_by_graph`` puts in the place of a model's forward."""

    def __init__(
        self, model: Any, forward: Callable[..., Any], make_graph: Callable[[torch.device], Graph] | None
    ) -> None:
        self._model, self._forward, self._make_graph = model, forward, make_graph
        self._decoder: GraphedDecoder | None = None

    def takes(self, cache: Any) -> bool:
        """Return whether one-token steps of this cache are replays from here on; captures where needed."""
        if self._make_graph is None or not isinstance(cache, LawcatCache) or not cache.get_seq_length():
            return False
        if self._decoder is not None and self._decoder.fits(cache):
            return True
        state = _captured_state(self._model)
        kept = _decoders.get(self._model)
        if kept is not None and kept[0] == state and kept[1].fits(cache):
            self._decoder = kept[1]
            return True
        self.release()
        _decoders.pop(self._model, None)  # its memory is free before the next one takes as much
        kept = None
        try:
            graph = self._make_graph(next(self._model.parameters()).device)
            self._decoder = GraphedDecoder(self._forward, cache, graph)
        except RuntimeError as error:  # of CUDA's too: what is captured may not wait, for one
            self._make_graph = None
            if not isinstance(error, NotCapturableError):
                warnings.warn(f"decoding goes on without a CUDA graph: {error}", stacklevel=2)
            return False
        _decoders[self._model] = state, self._decoder
        return True

    def release(self) -> None:
        """Leave the cache that was decoded last on its own."""
        if self._decoder is not None:
            self._decoder.release()
            self._decoder = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Replay where this is one real token a row after others, else run the model's own forward."""
        if len(arguments) == 1 and "input_ids" not in named:
            named = {"input_ids": arguments[0], **named}
            arguments = ()
        given = {name: value for name, value in named.items() if value is not None and value is not False}
        cache: Any = given.get("past_key_values")
        tokens, mask = given.get("input_ids"), given.get("attention_mask")
        if (
            arguments
            or not given.keys() <= _KNOWN_ARGUMENTS
            or tokens is None
            or tokens.shape[1] != 1
            or named.get("use_cache") is False
            or named.get("return_dict") is False
            or torch.is_grad_enabled()
            or not self.takes(cache)
            or (mask is not None and not _ends_with_tokens(mask))
        ):
            return self._forward(*arguments, **named)
        assert self._decoder is not None
        logits = self._decoder.step(cache, tokens, given.get("position_ids"))
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


@contextlib.contextmanager
def decoding_by_graph(
    model: Any, *, make_graph: Callable[[torch.device], Graph] | None = None
) -> Iterator[DecodeGraphs]:
    """Within this context a model's forward of one token a row replays a CUDA graph, where that can be.

    It can on a GPU for a lawcat model whose layers are all linear, without windows, and decoded by the
    kernel; any other model is left alone, and so is every other call. Weights may be written to meanwhile but
    not replaced, and no hooks added.

    Args:
        model: A causal language model of transformers.
        make_graph: Makes an unused graph for a device. When None, ``CudaGraph`` on a GPU, nothing elsewhere.

    Yields:
        The forward in the model's place, to be asked whether it ``takes`` a cache.

    Example:
        >>> from lawcat import LawcatConfig, LawcatForCausalLM
        >>> config = LawcatConfig(vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        >>> model = LawcatForCausalLM(config)
        >>> with decoding_by_graph(model) as graphs:  # nothing to do on a CPU
        ...     graphs.takes(model.new_cache())
        False
    """
    if make_graph is None and next(model.parameters()).device.type == "cuda":
        make_graph = CudaGraph
    if make_graph is None or not _is_repeatable(model):
        yield DecodeGraphs(model, model.forward, None)
        return
    original = model.forward
    graphs = DecodeGraphs(model, original, make_graph)

    @functools.wraps(original)  # transformers looks at the signature
    def forward(*arguments: Any, **named: Any) -> Any:
        return graphs(*arguments, **named)

    model.forward = forward
    try:
        yield graphs
    finally:
        del model.forward
        graphs.release()


def _is_repeatable(model: Any) -> bool:
    """Return whether the model's layers may all leave their state in place, and Python has no say in them."""
    if not isinstance(model, LawcatForCausalLM) or torch.is_autocast_enabled(_device_type(model)):
        return False
    if set(model.present_layer_types()) != {LINEAR} or model.config.sliding_window is not None:
        return False
    if "forward" in vars(model) or len({parameter.device for parameter in model.parameters()}) != 1:
        return False
    # A replay runs no hooks, and does not know which LoRA factors are switched off.
    if any("lora_" in name for name, _ in model.named_parameters()):
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _captured_state(model: LawcatForCausalLM) -> object:
    """Return what a graph has taken from the model: it can be replayed as long as this is the same."""
    places = (*model.parameters(), *model.buffers())
    return model.training, tuple(model.present_layer_types()), [(t.data_ptr(), t.dtype) for t in places]


def _device_type(model: Any) -> str:
    found: str = next(model.parameters()).device.type
    return found


def _ends_with_tokens(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, -1] != 0).all())
