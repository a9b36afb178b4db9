"""Prefill on a CPU, student against teacher by SDPA, by turns in one run, with random weights.

`OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python benchmarks/cpu_prefill.py 512,2k`

What is computed does not depend on the weights: SmolLM2-135M's layers, ten of its thirty, and few words.
`--processor-time`, with one thread, is steadier than the clock where other work runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lawcat.evaluation.lengths import parse_lengths
from lawcat.model.configuration_lawcat import LawcatConfig
from lawcat.model.modeling_lawcat import LawcatForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 16384,
}


@torch.inference_mode()
def main() -> None:
    """Print a line for each dtype and length."""
    parser = argparse.ArgumentParser()
    parser.add_argument("lengths")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processor-time", action="store_true")
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    for dtype in (torch.float32, torch.bfloat16):
        student = LawcatForCausalLM(LawcatConfig(**SHAPE)).eval()
        new = {id(p) for layer in student.model.layers for p in _new_parameters(layer.self_attn)}
        for parameter in student.parameters():
            if id(parameter) not in new:  # these stay in float32 when a student is loaded, too
                parameter.data = parameter.data.to(dtype)
        config = LlamaConfig(**SHAPE, _attn_implementation="sdpa")
        models = {"student": student, "teacher": LlamaForCausalLM(config).eval().to(dtype)}
        for length in parse_lengths(options.lengths):
            tokens = torch.randint(SHAPE["vocab_size"], (1, length))
            seconds: dict[str, list[float]] = {name: [] for name in models}
            for turn in range(options.rounds + 2):
                for name, model in models.items():
                    started = clock()
                    model(tokens, use_cache=True, logits_to_keep=1)
                    if turn >= 2:
                        seconds[name].append(clock() - started)
            median = {name: statistics.median(times) for name, times in seconds.items()}
            pairs = zip(seconds["student"], seconds["teacher"], strict=True)
            ratio = statistics.median(student / teacher for student, teacher in pairs)
            print(
                f"{dtype}, {length} tokens, threads: {torch.get_num_threads()}; student "
                f"{median['student'] * 1e3:.0f} ms, teacher {median['teacher'] * 1e3:.0f}, ratio {ratio:.2f}",
                flush=True,
            )


def _new_parameters(attention: Any) -> list[torch.nn.Parameter]:
    return [p for name in attention.new_modules() for p in getattr(attention, name).parameters()]


main()
