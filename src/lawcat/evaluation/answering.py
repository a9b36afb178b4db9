"""Letting a model answer prompts: greedy, in left-padded batches, the prompt read piece by piece."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Args:
        text: Without special tokens.
        num_tokens: How many tokens that took.
    """

    text: str
    num_tokens: int


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    is_answered: Callable[[int, str], bool] | None = None,
    prefill_chunk_tokens: int = 16_384,
) -> list[Answer]:
    """Return the model's greedy continuation of each prompt.

    Everything goes through `forward` and `generate`, so any causal language model of transformers will do. A
    prompt longer than `prefill_chunk_tokens` is read in pieces that hand on the model's cache, which gives
    the same as reading it at once in much less memory. (`generate` can read in pieces itself, but only with
    the cache it makes; a model that makes its own, as lawcat's, has to be read like this.)

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts of about the same length, read as one batch.
        max_new_tokens: Most tokens to generate.
        is_answered: Called with the number of a prompt and what was said so far; True ends that answer.
        prefill_chunk_tokens: Tokens of a prompt read at once.

    Returns:
        An answer for each prompt.
    """
    # [B, T]
    input_ids, attention_mask = _left_padded(
        [tokenizer(prompt, verbose=False).input_ids for prompt in prompts], _device(model)
    )
    num_prompt_tokens = input_ids.shape[1]
    stop = _AnswerIsOut(tokenizer, num_prompt_tokens, is_answered) if is_answered else None
    end_ids = _end_ids(model, tokenizer)
    with _reading(model), torch.no_grad():
        # The last token is left to `generate`, which needs one to start from.
        cache = None
        if num_prompt_tokens - 1 > prefill_chunk_tokens and reads_in_pieces(model):
            cache = _prefill(model, input_ids[:, :-1], attention_mask[:, :-1], prefill_chunk_tokens)
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
            ),
            stopping_criteria=StoppingCriteriaList([stop] if stop else []),
            **({} if cache is None else {"past_key_values": cache}),
        )
    answers = []
    for row, tokens in enumerate(output[:, num_prompt_tokens:].tolist()):
        said = tokens[: stop.ends.get(row)] if stop else tokens
        end = next((place for place, token in enumerate(said) if token in end_ids), len(said))
        answers.append(Answer(_decode(tokenizer, said[:end]), end))
    return answers


class _AnswerIsOut(StoppingCriteria):  # type: ignore[misc]
    """Ends a row of the batch as soon as nothing it says can matter any more."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_prompt_tokens: int,
        is_answered: Callable[[int, str], bool],
    ) -> None:
        self.tokenizer = tokenizer
        self.num_prompt_tokens = num_prompt_tokens
        self.is_answered = is_answered
        self.ends: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        for row, tokens in enumerate(input_ids[:, self.num_prompt_tokens :].tolist()):
            if row not in self.ends and self.is_answered(row, _decode(self.tokenizer, tokens)):
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
        True if both gave the same logits but for rounding.
    """
    if model not in _reads_in_pieces:
        _reads_in_pieces[model] = _try_pieces(model)
        if not _reads_in_pieces[model]:
            warnings.warn(
                f"{type(model).__name__} does not go on from its cache over several tokens, so texts are "
                "read at once. That takes more memory.",
                stacklevel=2,
            )
    return _reads_in_pieces[model]


_reads_in_pieces: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


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


def _prefill(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, chunk_tokens: int) -> Any:
    """Return the cache after reading `input_ids` in pieces."""
    accepted = forward_parameters(model)
    # As `generate` counts them: padding has no place of its own.
    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    cache = None
    for start in range(0, input_ids.shape[1], chunk_tokens):
        stop = start + chunk_tokens
        extra: dict[str, Any] = {}
        if "position_ids" in accepted:
            extra["position_ids"] = position_ids[:, start:stop]
        if "logits_to_keep" in accepted:
            extra["logits_to_keep"] = 1
        output = model(
            input_ids=input_ids[:, start:stop],
            attention_mask=attention_mask[:, :stop],
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        cache = output.past_key_values
    return cache


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
