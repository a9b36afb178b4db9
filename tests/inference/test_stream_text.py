"""Text as it is made: who leaves leaves nothing running."""

from __future__ import annotations

import threading

from lawcat import LawcatForCausalLM
from lawcat.inference.generation import stream_text
from small_models import make_config
from tiny_teachers import spelling_tokenizer


def test_a_reader_who_leaves_ends_the_work() -> None:
    tokenizer = spelling_tokenizer()
    model = LawcatForCausalLM(make_config(vocab_size=len(tokenizer))).eval()
    model.generation_config.eos_token_id = None
    before = set(threading.enumerate())
    text = stream_text(model, tokenizer, "It was", max_new_tokens=1_000_000)
    next(text)
    (worker,) = set(threading.enumerate()) - before
    text.close()
    assert not worker.is_alive()
