"""Generation with a prompt of any length in bounded memory, piece by piece of text."""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import Any

import torch

from lawcat.errors import ConfigurationError
from lawcat.inference.decode_graph import decoding_by_graph

# A prompt is read in pieces of so many tokens: what is in memory at once does not grow with its length.
_PREFILL_TOKENS = 2048
# How long a reader who leaves waits for the token under way: a process that ends beneath PyTorch aborts.
_LEAVING_SECONDS = 5.0


def stream_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 0.95,
    seed: int = 0,
    chat: bool = False,
) -> Generator[str, None, None]:
    """Yield the continuation of a prompt as it is made, until the generator is closed.

    Args:
        model: A causal language model of transformers, ours or any other.
        tokenizer: Its tokenizer.
        prompt: Text, not empty.
        max_new_tokens: Tokens at most; an end token stops earlier.
        temperature: 0 is greedy.
        top_p: Probability mass to sample from, where the temperature is above 0.
        seed: Of sampling.
        chat: Put the prompt into the tokenizer's chat template, as a user's turn.

    Yields:
        Text, whole words as soon as they are known.

    Raises:
        ConfigurationError: for ``chat`` without a template.
    """
    from transformers import TextIteratorStreamer

    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigurationError("the tokenizer has no chat template; leave out --chat.")
        turns = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature
        else {"do_sample": False}
    )
    is_left = threading.Event()

    class Streamer(TextIteratorStreamer):  # type: ignore[misc]
        def put(self, value: torch.Tensor) -> None:
            if is_left.is_set():
                raise InterruptedError("nobody reads on")
            super().put(value)

    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with torch.inference_mode(), decoding_by_graph(model):
                model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    streamer=streamer,
                    prefill_chunk_size=_PREFILL_TOKENS,
                    pad_token_id=tokenizer.pad_token_id,
                    **sampling,
                )
        except BaseException as error:  # handed to the reader of the stream
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        is_left.set()
        thread.join(_LEAVING_SECONDS)
    if failure:
        raise failure[0]
