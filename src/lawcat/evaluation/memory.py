"""How much of a batch fits in memory: what a model keeps of a sequence, and what it needs while reading."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CPU_BATCH_TOKENS = 16_384
# A model that keeps a state is read as fast in any batch, and its answers come faster in a large one.
_CPU_STATE_BATCH_TOKENS = 65_536
_BATCH_TOKENS = 131_072
_STATE_BATCH_TOKENS = 4_194_304
_MAX_ROWS = 256
# Softmax attention is fastest over a prompt read at once, where it needs no mask.
_CPU_PREFILL_TOKENS = 32_768
# A linear model gains nothing from longer pieces: measured from 256 to 4,096, the best by a little is 2,048.
_CPU_STATE_PREFILL_TOKENS = 2_048
_PREFILL_TOKENS = 131_072

# Shares of the memory that is free once the model is loaded.
_CACHE_SHARE = 0.4
_ACTIVATION_SHARE = 0.25
_MASK_SHARE = 1 / 16

# Lengths to try a model's cache at; on an accelerator, which is fast, beyond the usual sliding windows.
_CPU_PROBE = (24, 48)
_PROBE = (1024, 1536)


@dataclass(frozen=True)
class CacheSize:
    """What a model keeps of one sequence.

    Args:
        fixed_bytes: However long the sequence is.
        token_bytes: For every token more; 0 for a model with a constant state.

    Example:
        >>> CacheSize(fixed_bytes=100, token_bytes=2).bytes_at(50)
        200
    """

    fixed_bytes: float
    token_bytes: float

    def bytes_at(self, tokens: int) -> int:
        """Return the bytes of a sequence of so many tokens."""
        return round(self.fixed_bytes + self.token_bytes * tokens)


@dataclass(frozen=True)
class MemoryPlan:
    """What is put into memory at once.

    Args:
        batch_tokens: Most tokens of a batch, rows times length.
        max_rows: Most rows of a batch.
        cache: What the model keeps of a sequence; None where that is unknown or does not matter.
        cache_bytes: Most bytes of the caches of a batch.
        prefill_chunk_tokens: Tokens of prompts read at once, of all rows together.
        mask_entries: Most entries of an attention mask: rows times tokens read times tokens seen.
    """

    batch_tokens: int
    max_rows: int
    cache: CacheSize | None
    cache_bytes: int
    prefill_chunk_tokens: int
    mask_entries: int

    def rows(self, tokens: int) -> int:
        """Return how many sequences of so many tokens make a batch, at least 1."""
        rows = min(self.max_rows, self.batch_tokens // max(tokens, 1))
        if self.cache is not None:
            rows = min(rows, self.cache_bytes // max(self.cache.bytes_at(tokens), 1))
        return max(rows, 1)


def plan_memory(
    model: PreTrainedModel,
    *,
    batch_tokens: int | None = None,
    prefill_chunk_tokens: int | None = None,
    probe: bool = True,
) -> MemoryPlan:
    """Return what fits on the model's device beside the model.

    Args:
        model: A causal language model, loaded.
        batch_tokens: The user's choice; None finds it. On a CPU 16,384, or 65,536 for a model with a constant
            state. On an accelerator what its memory holds, up to 256 rows.
        prefill_chunk_tokens: The user's choice; None takes what a quarter of the free memory holds, at most
            32,768 on a CPU (2,048 for a model with a constant state) and 131,072 elsewhere.
        probe: Whether the model may be run to see what it keeps.

    Returns:
        The plan.
    """
    device = model.get_input_embeddings().weight.device
    on_cpu = device.type == "cpu"
    free = free_bytes(device)
    lengths = _CPU_PROBE if on_cpu else _PROBE
    cache = measure_cache(model, lengths) if probe else None
    is_constant = cache is not None and cache.token_bytes == 0
    if batch_tokens is not None:
        chosen = batch_tokens
    elif on_cpu:
        chosen = _CPU_STATE_BATCH_TOKENS if is_constant else _CPU_BATCH_TOKENS
    else:
        chosen = _BATCH_TOKENS if cache is None else _STATE_BATCH_TOKENS
    most = _PREFILL_TOKENS
    if on_cpu:
        most = _CPU_STATE_PREFILL_TOKENS if is_constant else _CPU_PREFILL_TOKENS
    fitting = max(256, round(_ACTIVATION_SHARE * free / activation_bytes(model)))
    return MemoryPlan(
        batch_tokens=chosen,
        max_rows=batch_tokens or _MAX_ROWS,
        cache=cache if batch_tokens is None else None,
        cache_bytes=round(_CACHE_SHARE * free),
        prefill_chunk_tokens=prefill_chunk_tokens or min(most, fitting),
        # A mask is made of booleans, and copied into numbers of up to four bytes.
        mask_entries=round(_MASK_SHARE * free / (5 * _score_copies(model))),
    )


def measure_cache(model: PreTrainedModel, lengths: tuple[int, int] = _CPU_PROBE) -> CacheSize | None:
    """Return what a model keeps of a sequence, found by reading two short ones.

    Measured and not computed from the configuration, so that it holds for any architecture.

    Args:
        model: A causal language model.
        lengths: Tokens of the two. A sliding window longer than both looks like a cache that grows for ever,
            which errs on the safe side.

    Returns:
        The size, or None if the model returns no cache that this understands.
    """
    device = model.get_input_embeddings().weight.device
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            sizes = []
            for length in lengths:
                ids = torch.ones(1, length, dtype=torch.long, device=device)
                sizes.append(cache_bytes(model(input_ids=ids, use_cache=True).past_key_values))
    except Exception:
        # Whatever is the matter with it, the samples will tell; one of them at a time can be recorded.
        return None
    finally:
        if training:
            model.train()
    if not all(sizes):
        return None
    slope = max(0.0, (sizes[1] - sizes[0]) / (lengths[1] - lengths[0]))
    return CacheSize(sizes[1] - slope * lengths[1], slope)


def cache_bytes(cache: Any) -> int:
    """Return the bytes of all tensors in a cache of transformers, or of ours; 0 for None.

    Args:
        cache: What a model's `forward` returned as `past_key_values`.
    """
    if hasattr(cache, "state_bytes"):
        return int(cache.state_bytes())
    unique = {id(tensor): tensor for tensor in _tensors(cache)}
    return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        # A layer also keeps scalars, such as its window's width.
        if value.ndim > 1:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif type(value).__module__.startswith(("transformers", "lawcat")):
        yield from _tensors(vars(value))


def activation_bytes(model: PreTrainedModel) -> int:
    """Return an estimate of what reading one token takes beside weights and cache, from the widths."""
    config = model.config.get_text_config()
    hidden = getattr(config, "hidden_size", 1024)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = getattr(config, "num_attention_heads", None) or 1
    width = max(hidden, heads * (getattr(config, "head_dim", None) or hidden // heads))
    # The chunked form of linear attention holds a dozen tensors of the attention's width in float32.
    item = 4 if config.model_type == "lawcat" else next(model.parameters()).element_size()
    return int(item * (16 * width + 4 * inner))


def _score_copies(model: PreTrainedModel) -> int:
    """Return how many entries of scores there are to an entry of the mask, at once."""
    config = model.config.get_text_config()
    if getattr(config, "_attn_implementation", None) != "eager":
        return 1
    return 2 * int(getattr(config, "num_attention_heads", None) or 1)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the allocator holds and does not use is free as well.
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return min(_free_on_machine(), _free_in_container())


def _free_on_machine() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            fields = dict(line.split(":", 1) for line in stream)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (OSError, ValueError, AttributeError):
        return 8 * 2**30


def _free_in_container() -> int:
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as stream:
            limit = int(stream.read())
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as stream:
            return max(limit - int(stream.read()), 2**28)
    except (OSError, ValueError):  # no such group, or "max": no limit
        return sys.maxsize


def reset_peak(device: torch.device) -> None:
    """Begin anew to watch the peak of memory, where the system lets us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as stream:
            stream.write("5")
    except OSError:
        pass


def peak_bytes(device: torch.device) -> int:
    """Return the peak of memory since `reset_peak`: the GPU's, or for a CPU the process's resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        with open("/proc/self/status", encoding="ascii") as stream:
            fields = dict(line.split(":", 1) for line in stream)
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
