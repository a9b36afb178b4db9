"""`lawcat rank-layers`: which layers of a hybrid to keep as softmax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lawcat import __version__
from lawcat.cli.display import Display
from lawcat.cli.evaluate import parse_dtype
from lawcat.convert.load import check_device, load_model
from lawcat.distill.layer_importance import answer_data, check_rankable, rank_layers
from lawcat.distill.recipe import Recipe
from lawcat.distill.sources import WindowSource
from lawcat.distill.text import find_files, tokenize_files
from lawcat.errors import ConfigurationError
from lawcat.files import write_atomic
from lawcat.model.modeling_lawcat import LawcatForCausalLM
from lawcat.versions import versions


def run_rank_layers(
    student: str,
    text: list[str],
    data: str | None,
    choose: int,
    windows: int | None,
    length: int | None,
    seed: int,
    output: Path | None,
    device: str | None,
    dtype: str,
    base: str | None,
) -> None:
    """See the command's help."""
    place, kind = check_device(device), parse_dtype(dtype)
    on_cpu = place.type == "cpu"
    windows, length = windows or (4 if on_cpu else 16), length or (512 if on_cpu else 1024)
    if not text and data is None:
        raise ConfigurationError("Nothing to read: give --text, or --data with a recipe to rank by answers.")
    files = find_files(text) if text else []
    recipe = None if data is None else Recipe.load(data)
    check_rankable(student)
    with Display() as display:
        loaded = load_model(student, dtype=kind, device=place, base=base, progress=display.message)
        if not isinstance(loaded.model, LawcatForCausalLM):
            raise ConfigurationError(
                f"{student} is a {loaded.kind}; give a student that stage 1 has trained."
            )
        read: dict[str, Any]
        weight = None
        if recipe is None:
            tokenized = tokenize_files(files, loaded.tokenizer, progress=display.update)
            source = WindowSource("text", [file.tokens for file in tokenized], length, seed, {})
            count = min(windows, source.num_windows)
            input_ids = torch.stack([torch.from_numpy(source.sequence(i).input_ids) for i in range(count)])
            read = {"text": [{"name": file.path.name, "sha256": file.sha256} for file in tokenized]}
        else:
            answers = answer_data(
                recipe,
                loaded.tokenizer,
                num_sequences=windows,
                num_tokens=length,
                seed=seed,
                prose=text,
                progress=display.update,
            )
            input_ids, weight = answers.input_ids, answers.weight
            read = {"recipe": recipe.name, "data": answers.record}
        ranking = rank_layers(
            loaded.model,
            input_ids,
            weight=weight,
            num_softmax_layers=choose,
            batch_sequences=1 if on_cpu else 4,
            progress=display.update,
        )
    print(ranking.table())
    if output is not None:
        record = {
            "schema": 1,
            "lawcat": __version__,
            "student": loaded.name,
            **read,
            "seed": seed,
            "device": str(place),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "versions": versions(),
            **ranking.to_json(),
        }
        write_atomic(output, json.dumps(record, indent=1) + "\n")
