"""`lawcat eval`: models on the same samples."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch

from lawcat.cli.display import Display
from lawcat.convert.load import load_model
from lawcat.errors import ConfigurationError
from lawcat.evaluation.lengths import parse_lengths
from lawcat.evaluation.measure import Measurement, measure
from lawcat.evaluation.report import markdown_report, write_report, write_results

_PERPLEXITY = "perplexity"
_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_dtype(text: str) -> torch.dtype | None:
    """Return the dtype of an option.

    >>> parse_dtype("bfloat16")
    torch.bfloat16
    """
    if text not in _DTYPES:
        raise ConfigurationError(f"--dtype {text!r} is not a choice; use {', '.join(_DTYPES)}.")
    return _DTYPES[text]
