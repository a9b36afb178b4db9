"""Telling one model or tokenizer from another, so that kept answers are never taken for another's."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_VALUES_A_TENSOR = 4096
# What a configuration says of where it came from rather than of what the model computes.
_ORIGIN_FIELDS = frozenset({"_name_or_path", "_commit_hash", "transformers_version", "auto_map"})


def model_fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of what a model computes: its configuration and its weights.

    Of each tensor 4,096 evenly spaced values are read, so that a model of any size takes moments. Training
    moves practically every weight; a change to a few single weights would go unseen.

    Args:
        model: Any transformers model.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    config = {key: value for key, value in model.config.to_dict().items() if key not in _ORIGIN_FIELDS}
    digest.update(_canonical(config))
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // _VALUES_A_TENSOR)].to("cpu").contiguous()
        digest.update(picked.view(torch.uint8).numpy().tobytes() if picked.numel() else b"")
    return digest.hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer: its vocabulary, and how it splits one test sentence.

    Args:
        tokenizer: Any transformers tokenizer.

    Returns:
        32 hexadecimal digits.
    """
    probe = "The pass key is 48291.\nIt's naïve -- co-operate, 3.14!  x = f(y)"
    return json_fingerprint([sorted(tokenizer.get_vocab().items()), list(tokenizer(probe).input_ids)])


def json_fingerprint(value: Any) -> str:
    """Return a hash of a JSON value that does not depend on the order of its keys.

    Example:
        >>> json_fingerprint({"a": 1, "b": 2}) == json_fingerprint({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(_canonical(value)).hexdigest()[:32]


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()
