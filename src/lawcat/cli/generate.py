"""`lawcat generate`: continue a prompt, streaming."""

from __future__ import annotations

import sys
from pathlib import Path

from lawcat.cli.display import Display
from lawcat.cli.evaluate import parse_dtype
from lawcat.convert.load import load_model
from lawcat.errors import ConfigurationError, DataError
from lawcat.inference.generation import stream_text
from lawcat.inference.int8_weights import use_int8_weights


def run_generate(
    model: str,
    prompt: str | None,
    prompt_file: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    chat: bool,
    device: str | None,
    dtype: str,
    int8: bool,
    base: str | None,
) -> None:
    """See the command's help."""
    text = _read_prompt(prompt, prompt_file)
    with Display() as display:
        loaded = load_model(
            model, dtype=parse_dtype(dtype), device=device, base=base, progress=display.message
        )
        if int8:
            use_int8_weights(loaded.model)
    pieces = stream_text(
        loaded.model,
        loaded.tokenizer,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
    )
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
        print()
        raise
    print()


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise ConfigurationError("give --prompt or --prompt-file, not both.")
    if prompt_file is not None:
        try:
            text = prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{prompt_file} is not UTF-8 text: {error}.") from error
    elif prompt is not None:
        text = prompt
    else:
        if sys.stdin.isatty():
            print("type a prompt, then Ctrl-D", file=sys.stderr)
        text = sys.stdin.read()
    if not text.strip():
        raise DataError("the prompt is empty; give some text with --prompt, --prompt-file or standard input.")
    return text
