"""Letting a model answer prompts: greedy, in left-padded batches, the prompt read piece by piece."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from lawcat.evaluation.memory import cache_bytes
from lawcat.inference.decode_graph import DecodeGraphs, decoding_by_graph
from lawcat.model.configuration_lawcat import FULL

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Args:
        text: Without special tokens.
        num_tokens: How many tokens that took.
        state_bytes: What the model kept of this sequence after its prompt, the padding of its batch included;
            None where the model does not show it.
    """

    text: str
    num_tokens: int
    state_bytes: int | None = field(default=None, compare=False)


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    is_answered: Callable[[int, str], bool] | None = None,
    prefill_chunk_tokens: int = 16_384,
    mask_entries: int = 2**28,
) -> list[Answer]:
    """Return the model's greedy continuation of each prompt: the tokens that `generate` gives.

    Everything goes through `forward`, so any causal language model of transformers will do. The prompts are
    read in pieces that hand on the model's cache, which gives the same as reading them at once in much less
    memory, and a row whose answer is out leaves the batch. Models that cannot go on from their cache over
    several tokens are left to `generate`.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts of about the same length, or their tokens, read as one batch.
        max_new_tokens: Most tokens to generate.
        is_answered: Called with the number of a prompt and what was said so far, after every token; True ends
            that answer.
        prefill_chunk_tokens: Tokens read at once, of all prompts together.
        mask_entries: Most entries of an attention mask (rows x tokens read x tokens seen), which bounds the
            pieces further where softmax attention needs one: after the first piece, and with padding.

    Returns:
        An answer for each prompt.
    """
    rows = [
        tokenizer(prompt, verbose=False).input_ids if isinstance(prompt, str) else list(prompt)
        for prompt in prompts
    ]
    if not all(rows):
        raise ValueError("a prompt has no tokens, so there is nothing to continue")
    end_ids = _end_ids(model, tokenizer)

    def is_out(row: int, tokens: list[int]) -> bool:
        if tokens[-1] in end_ids:
            return True
        return is_answered is not None and is_answered(row, _decode(tokenizer, tokens))

    state_bytes: int | None
    with _reading(model), torch.no_grad():
        if _goes_on_from_cache(model):
            limits = (prefill_chunk_tokens, mask_entries)
            with decoding_by_graph(model) as graphs:
                said, state_bytes = _continue_greedily(model, rows, max_new_tokens, is_out, limits, graphs)
        else:
            longest = max(map(len, rows))
            if len(rows) * longest > prefill_chunk_tokens:
                reads_in_pieces(model)  # says what that means
            said, state_bytes = _generate(model, rows, max_new_tokens, is_out, end_ids)
    answers = []
    for tokens in said:
        end = next((place for place, token in enumerate(tokens) if token in end_ids), len(tokens))
        answers.append(Answer(_decode(tokenizer, tokens[:end]), end, state_bytes))
    return answers


_IsOut = Callable[[int, "list[int]"], bool]


def _continue_greedily(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    is_out: _IsOut,
    limits: tuple[int, int],
    graphs: DecodeGraphs,
) -> tuple[list[list[int]], int]:
    """Return what was said to each row, as tokens, and the bytes kept of a row after its prompt."""
    input_ids, attention_mask = _left_padded(rows, _device(model))  # [B, T]
    mask = None if bool(attention_mask.all()) else attention_mask
    lengths = attention_mask.sum(-1)  # [B]: places of the tokens to come
    logits, cache = _prefill(model, input_ids, mask, *limits)
    state_bytes = cache_bytes(cache) // len(rows)
    # A graph is of one batch size: to decode a finished row costs less than to capture another.
    can_drop = _can_drop_rows(cache) and not (max_new_tokens > 1 and graphs.takes(cache))

    said: list[list[int]] = [[] for _ in rows]
    batch = list(range(len(rows)))  # the prompts in the rows of the cache
    open_rows = set(batch)
    for step in range(1, max_new_tokens + 1):
        chosen = logits[:, -1].float().argmax(-1)  # [B]
        for row, token in zip(batch, chosen.tolist(), strict=True):
            if row in open_rows:
                said[row].append(token)
                if is_out(row, said[row]):
                    open_rows.remove(row)
        if not open_rows or step == max_new_tokens:
            break
        # Each time a copy of the cache, so not for every row that ends.
        if can_drop and len(open_rows) <= 0.75 * len(batch):
            kept = torch.tensor([place for place, row in enumerate(batch) if row in open_rows])
            kept = kept.to(chosen.device)
            batch = [row for row in batch if row in open_rows]
            cache.batch_select_indices(kept)
            chosen, lengths = chosen[kept], lengths[kept]
            mask = None if mask is None else mask[kept]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
        logits, cache = _forward(model, chosen[:, None], mask, lengths[:, None] + (step - 1), cache)
    return said, state_bytes


def _can_drop_rows(cache: Any) -> bool:
    layers = getattr(cache, "layers", None) or []
    return bool(layers) and all(hasattr(layer, "batch_select_indices") for layer in layers)


def _prefill(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None, chunk_tokens: int, mask_entries: int
) -> tuple[Tensor, Any]:
    """Return the last token's logits [B, 1, vocabulary] and the cache after reading `input_ids` in pieces."""
    num_rows, num_columns = input_ids.shape
    # As `generate` counts them: padding has no place of its own.
    position_ids = None if mask is None else (mask.long().cumsum(-1) - 1).clamp_min(0)
    cache, logits = None, None
    start = 0
    while start < num_columns:
        columns = max(1, chunk_tokens // num_rows)
        # Attention over a first piece without padding is causal by itself, and needs no mask.
        if (start > 0 or mask is not None) and _makes_masks(model):
            columns = min(columns, max(1, mask_entries // (num_rows * num_columns)))
        stop = min(start + columns, num_columns)
        logits, cache = _forward(
            model,
            input_ids[:, start:stop],
            None if mask is None else mask[:, :stop],
            None if position_ids is None else position_ids[:, start:stop],
            cache,
        )
        start = stop
    assert logits is not None
    return logits, cache


def _makes_masks(model: PreTrainedModel) -> bool:
    """Return whether a mask of tokens by tokens may be made: in models of ours by softmax layers only."""
    config = model.config
    return config.model_type != "lawcat" or FULL in config.layer_types


def _forward(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Any
) -> tuple[Tensor, Any]:
    accepted = forward_parameters(model)
    extra: dict[str, Any] = {}
    # Without padding a model counts its tokens itself.
    if mask is not None:
        extra["attention_mask"] = mask
        if "position_ids" in accepted:
            extra["position_ids"] = position_ids
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = 1
    output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, **extra)
    return output.logits[:, -1:], output.past_key_values


def _generate(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    is_out: _IsOut,
    end_ids: frozenset[int],
) -> tuple[list[list[int]], int | None]:
    """Do what `_continue_greedily` does by `generate`, which knows how each model wants to be called."""
    input_ids, attention_mask = _left_padded(rows, _device(model))
    start = input_ids.shape[1]
    stop = _AnswerIsOut(start, is_out)
    output = model.generate(
        input_ids,
        attention_mask=attention_mask,
        generation_config=GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=sorted(end_ids) or None,
            pad_token_id=0,  # never read: what follows an answer's end is cut off below
            return_dict_in_generate=True,
        ),
        stopping_criteria=StoppingCriteriaList([stop]),
    )
    said = [tokens[: stop.ends.get(row)] for row, tokens in enumerate(output.sequences[:, start:].tolist())]
    kept = cache_bytes(getattr(output, "past_key_values", None)) // len(rows)
    return said, kept or None


class _AnswerIsOut(StoppingCriteria):  # type: ignore[misc]
    """Ends a row of the batch as soon as nothing it says can matter any more."""

    def __init__(self, num_prompt_tokens: int, is_out: _IsOut) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.is_out = is_out
        self.ends: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        for row, tokens in enumerate(input_ids[:, self.num_prompt_tokens :].tolist()):
            if row not in self.ends and self.is_out(row, tokens):
                self.ends[row] = len(tokens)
        ended = [row in self.ends for row in range(input_ids.shape[0])]
        return torch.tensor(ended, device=input_ids.device)


def reads_in_pieces(model: PreTrainedModel) -> bool:
    """Return whether a model, given its cache and several more tokens, goes on where it was.

    Not every model does: some recurrent ones start anew unless the tokens come one by one, and say nothing.
    So it is tried, once for each model, with a dozen tokens at once and in three pieces.

    Args:
        model: A causal language model.

    Returns:
        True if both gave the same logits but for rounding; else there is a warning, once a model.
    """
    goes_on = _goes_on_from_cache(model)
    if not goes_on and model not in _warned:
        _warned.add(model)
        warnings.warn(
            f"{type(model).__name__} does not go on from its cache over several tokens, so texts are "
            "read at once. That takes more memory.",
            stacklevel=2,
        )
    return goes_on


_tried: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
_warned: WeakSet[PreTrainedModel] = WeakSet()


def _goes_on_from_cache(model: PreTrainedModel) -> bool:
    if model not in _tried:
        _tried[model] = _try_pieces(model)
    return _tried[model]


def _try_pieces(model: PreTrainedModel) -> bool:
    if "past_key_values" not in forward_parameters(model):
        return False
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(1, 13, device=_device(model)) * 7919 % vocabulary).unsqueeze(0)
    cache = None
    pieces = []
    with _reading(model), torch.no_grad():
        whole = model(input_ids=ids, use_cache=True)
        for piece in ids.split([5, 4, 3], dim=1):
            output = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            if cache is None:
                return False
            pieces.append(output.logits)
    difference = (torch.cat(pieces, dim=1) - whole.logits).float().norm()
    # bfloat16 rounds to a hundredth; forgetting what was read changes everything.
    return bool(difference <= 0.05 * whole.logits.float().norm())


def forward_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the arguments that a model's `forward` takes, behind a PEFT wrapper too."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(inner.forward).parameters)


@contextmanager
def _reading(model: PreTrainedModel) -> Iterator[None]:
    """Put the model in evaluation mode, with none of the generation settings it came with, then restore both.

    Whatever a call leaves open, `generate` takes from the model's own configuration, where a repetition
    penalty would forbid the very thing a passkey asks for.
    """
    training, settings = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings
        if training:
            model.train()


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask [B, T] with the padding in front. The id of the padding is 0 and is never read."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return ids.to(device), mask.to(device)


def _device(model: PreTrainedModel) -> torch.device:
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
