"""Generation on a CPU: student, teacher by SDPA and teacher by ONNX Runtime, by turns in one run.

`OMP_NUM_THREADS=2 python benchmarks/cpu_generation.py --prefill 512,2k,8k --decode 512,4k,16k`

Each contender is checked first: prefill and a step must give the logits of one pass over all tokens in
float32. ONNX Runtime is left out where `onnxruntime` and `onnx` are not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lawcat.bench.environment import environment
from lawcat.bench.generation import decoding
from lawcat.bench.models import Subject
from lawcat.bench.onnx_llama import OnnxLlama, unavailable_because
from lawcat.bench.timing import Timing, time_by_turns
from lawcat.convert.load import load_model
from lawcat.evaluation.lengths import parse_lengths
from lawcat.inference.int8_weights import use_int8_weights
from lawcat.memory import free_memory

CPU = torch.device("cpu")
# Of logits, relative: bfloat16 adds rounding in 30 layers, and inputs of eight bits in all of them.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1, "int8": 0.15}


class ByTorch:
    """A model of transformers, ours or the teacher."""

    def __init__(self, model: Any, is_ours: bool) -> None:
        self.model = model
        self.subject = Subject("", is_ours, model, contextlib.nullcontext)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Return the last token's logits, having kept what decoding needs."""
        logits: Tensor = self.model(tokens, use_cache=True, logits_to_keep=1).logits
        return logits

    @torch.inference_mode()
    def both(self, tokens: Tensor) -> Tensor:
        """Return the same by a prefill of all tokens but one, and a step."""
        cache = self.model(tokens[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        logits: Tensor = self.model(tokens[:, -1:], past_key_values=cache, logits_to_keep=1).logits
        return logits

    def step(self, context: int) -> Callable[[], object]:
        """Return what computes one token after a context."""
        with torch.inference_mode():
            run = decoding(self.subject, context, 1, CPU)

        @torch.inference_mode()
        def step() -> object:
            return run()

        return step

    def weight_bytes(self) -> int:
        """Return the size of all weights, those that are shared once."""
        tensors = {t.data_ptr(): t for t in [*self.model.parameters(), *self.model.buffers()]}
        return sum(tensor.nbytes for tensor in tensors.values())

    def cache_bytes(self, context: int) -> int:
        """Return the size of what is kept of a context."""
        with torch.inference_mode():
            cache = self.model(torch.full((1, 16), 5), use_cache=True, logits_to_keep=1).past_key_values
        if hasattr(cache, "state_bytes"):
            return int(cache.state_bytes())
        return sum(layer.keys[:, :, :1].nbytes * 2 * context for layer in cache.layers)


class ByOnnxRuntime:
    """The teacher in ONNX Runtime."""

    def __init__(self, teacher: Any, int8: bool, max_tokens: int) -> None:
        self.model = OnnxLlama(teacher, max_tokens, int8=int8)
        config = teacher.config
        linear = sum(m.weight.numel() for m in teacher.modules() if isinstance(m, torch.nn.Linear))
        self._weights = linear * (1 if int8 else 4) + config.vocab_size * config.hidden_size * 4
        self._token_bytes = 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        for tensor in self.model.caches.values():
            tensor.normal_()

    def prefill(self, tokens: Tensor) -> Tensor:
        """Return the last token's logits."""
        return self.model(tokens)

    def both(self, tokens: Tensor) -> Tensor:
        """Return the same by a prefill and a step."""
        self.model(tokens[:, :-1])
        return self.model(tokens[:, -1:], tokens.shape[1] - 1)

    def step(self, context: int) -> Callable[[], object]:
        """Return what computes one token after a context."""
        token = torch.tensor([[5]])
        return lambda: self.model(token, context)

    def weight_bytes(self) -> int:
        """Return the size of all weights: the embedding is there twice."""
        return self._weights

    def cache_bytes(self, context: int) -> int:
        """Return the size of what is kept of a context."""
        return self._token_bytes * context


def contenders(student: str, teacher: str, max_tokens: int) -> dict[str, tuple[Any, str]]:
    """Return models by name, each with the format that its check allows for."""
    found: dict[str, tuple[Any, str]] = {}
    for name, is_ours in ((student, True), (teacher, False)):
        who = "student" if is_ours else "teacher, SDPA"
        for kind in ("float32", "bfloat16"):
            model = load_model(name, dtype=getattr(torch, kind), device=CPU).model
            found[f"{who}, {kind}"] = (ByTorch(model, is_ours), kind)
        if is_ours:
            model = load_model(name, dtype=torch.bfloat16, device=CPU).model
            use_int8_weights(model)
            found[f"{who}, int8 weights"] = (ByTorch(model, is_ours), "int8")
    original = found["teacher, SDPA, float32"][0].model
    if reason := unavailable_because(original.config):
        print(f"teacher, ONNX Runtime: {reason}")
    else:
        for kind in ("float32", "int8"):
            model = ByOnnxRuntime(original, kind == "int8", max_tokens)
            found[f"teacher, ONNX Runtime, {kind}"] = (model, kind)
    return found


def check(models: dict[str, tuple[Any, str]]) -> None:
    """Raise where a contender does not give its model's logits."""
    tokens = torch.randint(3, 40000, (1, 98), generator=torch.Generator().manual_seed(1))
    for name, (model, kind) in models.items():
        expected = models[f"{'student' if 'student' in name else 'teacher, SDPA'}, float32"][0].prefill(
            tokens
        )
        for what, actual in (("prefill", model.prefill(tokens)), ("step", model.both(tokens))):
            error = float((actual.float() - expected).norm() / expected.norm())
            print(f"{name}, {what}: relative error of the logits {error:.1g}", flush=True)
            if not error <= TOLERANCES[kind]:
                raise SystemExit(f"{name}: wrong, {TOLERANCES[kind]} is allowed")


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--student", default="smollm2-135m-longcontext")
    parser.add_argument("--teacher", default="smollm2-135m-instruct")
    parser.add_argument("--prefill", default="512,2k,8k")
    parser.add_argument("--decode", default="512,4k,16k")
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="about how long one may take at one length"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    prompts, contexts = parse_lengths(options.prefill), parse_lengths(options.decode)
    models = contenders(options.student, options.teacher, max([*prompts, *contexts]) + 1)
    check(models)
    records = []
    for measurement, lengths in (("prefill", prompts), ("decode", contexts)):
        rows: dict[str, list[float]] = {name: [] for name in models}
        for length in lengths:
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(3, 40000, (1, length), generator=generator)
            runs = {
                name: model.step(length)
                if measurement == "decode"
                else (lambda model=model, tokens=tokens: model.prefill(tokens))
                for name, (model, _) in models.items()
            }
            for name, timing in time_by_turns(runs, CPU, seconds=options.seconds).items():
                if not isinstance(timing, Timing):
                    raise SystemExit(f"{name}, {measurement} at {length}: {timing.reason}")
                done = 1 if measurement == "decode" else length
                rows[name].append(done / timing.median_s)
                records.append(
                    {
                        "contender": name,
                        "measurement": measurement,
                        "tokens": length,
                        "seconds": timing.seconds,
                        "tokens_per_s": done / timing.median_s,
                        "peak_memory_bytes": timing.peak_memory_bytes,
                        "weight_bytes": models[name][0].weight_bytes(),
                        "cache_bytes": models[name][0].cache_bytes(length),
                    }
                )
                spread = statistics.quantiles(timing.seconds, n=4) if len(timing.seconds) > 1 else []
                print(measurement, length, name, f"{done / timing.median_s:.1f} tokens/s", spread, flush=True)
            runs.clear()
            free_memory()
        print(f"\n| {measurement}, tokens a second | " + " | ".join(map(str, lengths)) + " |")
        print("| --- |" + " ---: |" * len(lengths))
        for name, rates in rows.items():
            print(f"| {name} | " + " | ".join(f"{rate:,.1f}" for rate in rates) + " |")
    print("\n| memory | weights | kept of " + " | kept of ".join(map(str, contexts)) + " |")
    print("| --- |" + " ---: |" * (len(contexts) + 1))
    for name, (model, _) in models.items():
        sizes = [model.weight_bytes(), *map(model.cache_bytes, contexts)]
        print(f"| {name} | " + " | ".join(f"{size / 1e6:,.1f} MB" for size in sizes) + " |")
    if options.output is not None:
        result = {"environment": environment(CPU, torch.float32), "records": records}
        options.output.write_text(json.dumps(result, indent=1, default=vars), encoding="utf-8")


if __name__ == "__main__":
    main()
