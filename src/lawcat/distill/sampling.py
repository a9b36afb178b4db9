"""Text that the teacher writes itself: training data when there is no other."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from lawcat.convert.cache_dir import cache_dir as cache_root
from lawcat.convert.cache_dir import cache_lock
from lawcat.distill.precision import resolve_precision
from lawcat.distill.recipe import Precision
from lawcat.distill.text import Progress, require_eos
from lawcat.distill.token_cache import fingerprint_of, load_tokens, save_tokens, token_dtype
from lawcat.errors import TeacherError
from lawcat.files import write_atomic
from lawcat.memory import free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Teacher = nn.Module | Callable[[], nn.Module]
"""A causal language model of transformers, or a function that returns one and is called only if it is
needed."""

# The nucleus is looked for among this many of the likeliest tokens: sorting a whole vocabulary takes longer
# than the model of 135 M parameters that made it.
_MAX_CANDIDATES = 1024
_FORMAT = 1


def model_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a model's parameters: their names, types, shapes and bytes."""
    import hashlib

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}\0{parameter.dtype}\0{tuple(parameter.shape)}\0".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sample_teacher_text(
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: int,
    seed: int,
    sequence_tokens: int,
    batch: int | None = None,
    temperature: float = 1.0,
    top_p: float = 0.95,
    precision: Precision = "auto",
    fingerprint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> NDArray[Any]:
    """Return text sampled from the teacher, from the cache as far as it was sampled before.

    Each sequence begins with the tokenizer's BOS (its EOS, if it has none). An EOS on the way does not end
    it: the teacher goes on after it, as it saw documents follow one another in pretraining.

    Batches are sampled and kept one by one, each from a seed of its own: an interrupted call goes on where it
    was, and a later one for more tokens takes what is there, if its batches are as large. On another device,
    with another number of threads, or where memory runs short and a batch is sampled in parts, the same seed
    can give other text.

    Args:
        teacher: The model, or a function that returns it.
        tokenizer: The teacher's.
        num_tokens: Tokens wanted; rounded up to whole sequences.
        seed: Seed of the sampling.
        sequence_tokens: Tokens of a sequence, at least 2.
        batch: Sequences sampled at once. None means 512 on a machine with a GPU, where a step of many takes
            as long as one of 64, and 64 without.
        temperature: Divides the logits.
        top_p: Least probability mass of the tokens that are sampled from, in (0, 1]; at most 1,024 tokens
            are.
        precision: Of a float32 model while it samples, see `resolve_precision`; bfloat16 is a copy.
        fingerprint: SHA-256 that stands for the teacher. Without it the teacher is needed even if the cache
            has everything.
        cache_dir: Root of the cache; see `lawcat.convert.cache_dir.cache_dir`.
        progress: Called with the tokens sampled so far.

    Returns:
        [num_tokens, rounded up], uint16 or uint32: the sequences one after the other.

    Raises:
        ConfigurationError: if the tokenizer has no EOS.
        TeacherError: if the teacher's logits are not finite.
        LawcatError: if the cache cannot be written.
    """
    eos = require_eos(tokenizer)
    start = tokenizer.bos_token_id if isinstance(tokenizer.bos_token_id, int) else eos
    num_sequences = max(1, math.ceil(num_tokens / sequence_tokens))
    batch = min(batch or (512 if torch.cuda.is_available() else 64), num_sequences)
    model: nn.Module | None = teacher if isinstance(teacher, nn.Module) else None
    if fingerprint is None:
        model = model if model is not None else teacher()
        fingerprint = model_fingerprint(model)
    key = fingerprint_of(
        format=_FORMAT,
        teacher=fingerprint,
        start=start,
        seed=seed,
        sequence_tokens=sequence_tokens,
        batch=batch,
        temperature=temperature,
        top_p=top_p,
        precision=precision,
    )
    root = cache_root(cache_dir)
    folder = root / "teacher-text" / key
    dtype = token_dtype(len(tokenizer))
    chunk_tokens = batch * sequence_tokens
    num_chunks = math.ceil(num_sequences / batch)
    sampler: nn.Module | None = None
    chunks: list[NDArray[Any]] = []
    # Another process that wants the same text waits for it instead of sampling it too.
    with cache_lock(root, f"teacher-text-{key}"):
        for i in range(num_chunks):
            path = folder / f"{i:06d}.npy"
            chunk = load_tokens(path)
            if chunk is None or chunk.shape != (chunk_tokens,):
                if sampler is None:
                    model = model if model is not None else teacher()
                    sampler = _in_precision(model, precision, folder)
                report = _reporter(progress, i, num_chunks, batch, sequence_tokens)

                def sample(
                    size: int, own_seed: int, sampler: nn.Module = sampler, report: Any = report
                ) -> NDArray[np.int64]:
                    return _sample_batch(
                        sampler, start, size, sequence_tokens, own_seed, temperature, top_p, report
                    )

                chunk = _sample_in_parts(sample, batch, _seed_of(seed=seed, chunk=i)).astype(dtype)
                save_tokens(path, chunk)
            chunks.append(chunk)
    return np.concatenate(chunks)[: num_sequences * sequence_tokens]


def _reporter(
    progress: Progress | None, chunk: int, num_chunks: int, batch: int, sequence_tokens: int
) -> Callable[[int], None]:
    began = time.perf_counter()

    def report(tokens_a_sequence: int) -> None:
        if progress is not None:
            done = batch * tokens_a_sequence
            speed = {"tokens/s": done / max(time.perf_counter() - began, 1e-9)}
            before, total = chunk * batch * sequence_tokens, num_chunks * batch * sequence_tokens
            progress("sampling text from the teacher", before + done, total, speed)

    return report


def _in_precision(model: nn.Module, precision: str, folder: Any) -> nn.Module:
    """Return the model, or a copy of it in bfloat16, as `precision` says."""
    is_float32 = next(model.parameters()).dtype == torch.float32
    if precision == "float32" or not is_float32:
        return model
    # What the trial found is kept, so that all batches of one text come from the same arithmetic.
    note = folder / "precision.json"
    try:
        chosen = json.loads(note.read_text(encoding="utf-8"))["precision"]
    except (OSError, ValueError, KeyError, TypeError):
        chosen = precision
        if precision == "auto":
            device = next(model.parameters()).device
            chosen = str(resolve_precision("auto", device)).removeprefix("torch.")
        write_atomic(note, json.dumps({"precision": chosen}) + "\n")
    return _bfloat16_copy(model) if chosen == "bfloat16" else model


def _bfloat16_copy(model: nn.Module) -> nn.Module:
    # Parameters alone: buffers such as rotary frequencies lose their meaning in bfloat16. A shared parameter
    # is one entry of the memo, so what is tied stays tied.
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


class _PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of keys and values in memory taken once. Appending by `cat` took two thirds of the sampling
    time."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.used = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory."""
        super().lazy_initialization(key_states, value_states)
        batch, heads, _, width = key_states.shape
        self.key_memory = key_states.new_empty(batch, heads, self.capacity, width)
        self.value_memory = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.used + key_states.shape[-2]
        self.key_memory[:, :, self.used : end] = key_states
        self.value_memory[:, :, self.used : end] = value_states
        self.used = end
        self.keys, self.values = self.key_memory[:, :, :end], self.value_memory[:, :, :end]
        return self.keys, self.values


def _sample_in_parts(
    sample: Callable[[int, int], NDArray[np.int64]], batch: int, seed: int
) -> NDArray[np.int64]:
    """Return ``sample(batch, seed)``, in two halves where the keys and values of all find no room."""
    try:
        return sample(batch, seed)
    except torch.OutOfMemoryError:
        if batch == 1:
            raise
    # Not while the error is handled, which holds on to what was allocated.
    free_memory()
    first = batch // 2
    sizes = first, batch - first
    return np.concatenate(
        [_sample_in_parts(sample, size, _seed_of(seed=seed, half=half)) for half, size in enumerate(sizes)]
    )


def _seed_of(**parts: int) -> int:
    return int(fingerprint_of(**parts)[:15], 16)


def _sample_batch(
    model: nn.Module,
    start: int,
    batch: int,
    sequence_tokens: int,
    seed: int,
    temperature: float,
    top_p: float,
    report: Callable[[int], None],
) -> NDArray[np.int64]:
    """Return sampled sequences, flat: [batch * sequence_tokens]."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    config: Any = model.config
    cache = Cache(layers=[_PreallocatedLayer(sequence_tokens) for _ in range(config.num_hidden_layers)])
    tokens = torch.full((batch, sequence_tokens), start, device=device)  # [B, T]
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode: a tensor that the model keeps from here could not be trained through later.
        with torch.no_grad():
            for t in range(1, sequence_tokens):
                out = model(input_ids=tokens[:, t - 1 : t], past_key_values=cache, use_cache=True)
                logits = out.logits[:, -1].float() / temperature  # [B, V]
                tokens[:, t] = _sample_nucleus(logits, top_p, generator)
                if t % 16 == 0 or t == sequence_tokens - 1:
                    report(t + 1)
    finally:
        model.train(was_training)
    return tokens.flatten().cpu().numpy()


def _sample_nucleus(logits: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    """Return a token [B] a row of `logits` [B, V], out of the likeliest that hold `top_p` of the mass."""
    log_total = torch.logsumexp(logits, -1, keepdim=True)  # [B, 1]
    if not torch.isfinite(log_total).all():
        raise TeacherError("The teacher's logits are not finite, so it cannot write text. Check its weights.")
    best, candidates = logits.topk(min(_MAX_CANDIDATES, logits.shape[-1]), dim=-1)  # [B, K], falling
    probabilities = (best - log_total).exp()
    before = probabilities.cumsum(-1) - probabilities
    # The likeliest token has nothing before it and so is always kept.
    kept = torch.where(before < top_p, probabilities, 0.0)
    return candidates.gather(1, torch.multinomial(kept, 1, generator=generator))[:, 0]
