"""Seconds and memory that making samples takes: `python benchmarks/generate_samples.py niah_single_2 8k 500`.

A process of its own makes the samples, so that its peak memory is theirs: with a tokenizer loaded from a
folder, PyTorch is not even imported. `--tokenizer` names such a folder; without one the tokenizer of
smollm2-135m-instruct is taken.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time


def measure(arguments: argparse.Namespace) -> None:
    """Make the samples and print a line."""
    from transformers import PreTrainedTokenizerFast

    from lawcat.evaluation.lengths import parse_length
    from lawcat.tasks import get_task

    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.tokenizer)
    task, length = get_task(arguments.task), parse_length(arguments.length)
    options = dict(option.split("=", 1) for option in arguments.option)
    start, cpu_start = time.perf_counter(), time.process_time()
    tokens = 0
    for index in range(arguments.samples):
        tokens += task.generate(tokenizer, length, index, 0, **options).num_tokens
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{task.name} at {length}: {arguments.samples} samples of {tokens / arguments.samples:.0f} tokens in "
        f"{seconds:.1f} s ({cpu_seconds:.1f} s of CPU), {arguments.samples / seconds:.0f} samples/s, "
        f"{peak:.0f} MB at most{', PyTorch imported' if 'torch' in sys.modules else ''}",
        flush=True,
    )


def main() -> None:
    """Find the tokenizer, then measure in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("length")
    parser.add_argument("samples", type=int, nargs="?", default=500)
    parser.add_argument("--tokenizer", help="folder of a fast tokenizer")
    parser.add_argument("--option", action="append", default=[], help="of the task, such as fit=linear")
    arguments = parser.parse_args()
    if arguments.tokenizer is not None:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        save = (
            "import sys; from lawcat.convert.teacher import load_tokenizer; "
            "load_tokenizer('smollm2-135m-instruct').save_pretrained(sys.argv[1])"
        )
        subprocess.run([sys.executable, "-c", save, folder], check=True)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--tokenizer", folder], check=True)


main()
