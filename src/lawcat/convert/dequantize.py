"""A GGUF file -> a folder of float32 safetensors, made once and kept in the cache."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lawcat.convert.cache_dir import cache_lock
from lawcat.convert.families import FAMILIES
from lawcat.convert.gguf_file import (
    GgufFile,
    head_dim,
    read_gguf,
    refuse_unsupported,
    rope_parameters,
)
from lawcat.convert.pretrained import (
    check_loading,
    checked_tokenizer,
    complete_generation_config,
    reading,
)
from lawcat.convert.safetensors_file import fingerprint, read_entries, weight_files
from lawcat.errors import CheckpointError, TeacherError
from lawcat.files import (
    check_free_space,
    human_bytes,
    remove_leftovers,
    verify_manifest,
    write_atomic,
    write_directory_atomic,
    write_manifest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# Part of the folder's name: raise it when the conversion gives something else than before.
_CONVERSION = 1
_RECORD_NAME = "teacher.json"

# How text is cut before byte-pair encoding, by llama.cpp's name for it (llama-vocab.cpp): whether every digit
# stands alone, and the pattern for the rest.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "default": (False, _GPT2),
    "gpt-2": (False, _GPT2),
    "smollm": (True, _GPT2),
    "llama3": (False, _LLAMA3),
    "llama-v3": (False, _LLAMA3),
    "llama-bpe": (False, _LLAMA3),
    "tekken": (False, _TEKKEN),
    "qwen2": (False, _QWEN2),
    "deepseek-r1-qwen": (False, _QWEN2),
}


def dequantized_folder(root: Path, sha256: str) -> Path:
    """Return where the float32 copy of the GGUF file with this SHA-256 is, or will be."""
    return root / "teachers" / f"gguf-{sha256[:32]}-v{_CONVERSION}"


def dequantized(
    root: Path,
    sha256: str,
    find: Callable[[], Path],
    *,
    tell: Callable[[str], object],
    check_config: Callable[[Any], object] | None,
) -> tuple[Path, str]:
    """Return the float32 copy of a GGUF file; make it if it is not there or damaged.

    Args:
        root: Root of the cache.
        sha256: Of the GGUF file.
        find: Returns the file; called only when the copy has to be made.
        tell: Called with a line of text before what takes long.
        check_config: Called with the configuration before anything is converted.

    Returns:
        The folder, and the fingerprint of the tensors in it.

    Raises:
        TeacherError: where the file is damaged or not supported.
        LawcatError: where the copy could not be written, as on a full disk.
    """
    folder = dequantized_folder(root, sha256)
    if folder.exists():
        try:
            return folder, _verified_fingerprint(folder)
        except CheckpointError as error:
            tell(f"dequantizing again, because the copy in the cache cannot be used: {error}")
    file = read_gguf(find())
    with cache_lock(root, folder.name):
        remove_leftovers(folder.parent)
        try:  # another process may have made it while this one waited
            return folder, _verified_fingerprint(folder)
        except CheckpointError:
            return folder, _dequantize(file, folder, tell, check_config)


def _verified_fingerprint(folder: Path) -> str:
    verify_manifest(folder, remedy="It is made again from the GGUF file.")
    try:
        return str(json.loads((folder / _RECORD_NAME).read_bytes())["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / _RECORD_NAME} is damaged ({error})") from error


def _dequantize(
    file: GgufFile,
    folder: Path,
    tell: Callable[[str], object],
    check_config: Callable[[Any], object] | None,
) -> str:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GgufConfig

    config = gguf_config(file)
    if check_config is not None:
        check_config(config)
    num_bytes = 4 * file.num_parameters
    check_free_space(folder, num_bytes + 50_000_000)
    seconds = 7 + file.num_parameters // 10_000_000
    tell(
        f"dequantizing {file.path.name}, about {seconds} s, once: the result is kept in the cache "
        f"({human_bytes(num_bytes)})"
    )
    with reading(str(file.path)):
        model, info = AutoModelForCausalLM.from_pretrained(
            file.path.parent,
            gguf_file=file.path.name,
            config=config,
            # Where the package `kernels` is installed, transformers would keep the weights packed.
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            output_loading_info=True,
        )
    check_loading(info, str(file.path))
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise TeacherError(
                f"{file.path} is damaged: {name} holds numbers that are not finite. Fetch it again."
            )
    # Else the folder would say that its weights are still quantized.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    tokenizer = gguf_tokenizer(file)
    complete_generation_config(model, tokenizer)
    record = {
        "fingerprint": "",
        "gguf": file.path.name,
        "conversion": _CONVERSION,
        "transformers": transformers.__version__,
    }

    def write(place: Path) -> None:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        entries = [entry for part in weight_files(place) for entry in read_entries(part)]
        record["fingerprint"] = fingerprint(entries)
        write_atomic(place / _RECORD_NAME, json.dumps(record, indent=1) + "\n")
        write_manifest(place)

    write_directory_atomic(folder, write, replace=True)
    return str(record["fingerprint"])


def gguf_config(file: GgufFile) -> PreTrainedConfig:
    """Return the configuration that a GGUF file describes, with the scaling of its rotary embedding.

    Raises:
        TeacherError: for what cannot be taken over; it is named.
    """
    from transformers import AutoConfig

    refuse_unsupported(file)
    with reading(str(file.path)):
        config = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)
    if config.model_type in FAMILIES:
        config.head_dim = head_dim(file)
        config.rope_parameters = rope_parameters(file, float(config.rope_parameters["rope_theta"]))
    return config


def gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a GGUF file describes, chat template and all.

    Raises:
        TeacherError: where it has none that transformers can build.
    """
    from transformers import AutoTokenizer

    if "tokenizer.ggml.tokens" not in file.metadata:
        raise TeacherError(f"{file.path} has no tokenizer. Use a file that has, or the model's safetensors.")
    with reading(str(file.path)):
        tokenizer = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
        # transformers 5.17 takes the first token for the end token.
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
            token = None if index is None else tokenizer.convert_ids_to_tokens(int(index))
            setattr(tokenizer, f"{role}_token", token)
        # 5.17 sets it, and it would eat the spaces before punctuation.
        tokenizer.clean_up_tokenization_spaces = False
        if file.metadata.get("tokenizer.ggml.model") == "gpt2":
            _split_as_trained(tokenizer, file)
    return checked_tokenizer(tokenizer, str(file.path))


def _split_as_trained(tokenizer: PreTrainedTokenizerBase, file: GgufFile) -> None:
    """Cut text before byte-pair encoding as the model was trained on it.

    transformers 5.23 does not know "smollm" and cuts as GPT-2 does, and 5.17 does so for every model: then
    two line feeds before a digit become two tokens, and not the one that SmolLM knows.
    """
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    name = file.metadata.get("tokenizer.ggml.pre", "default")
    if name not in _SPLITS:
        warnings.warn(
            f"{file.path} cuts text in the way {name!r}, which lawcat does not know: some text may become "
            "other tokens than those the model was trained on. The model's safetensors come with the right "
            "tokenizer.",
            stacklevel=3,
        )
        return
    single_digits, pattern = _SPLITS[name]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    steps += [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    if pattern is _QWEN2:  # and as transformers reads it again from where it is saved
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()


__all__ = ["dequantized", "dequantized_folder", "gguf_config", "gguf_tokenizer"]
