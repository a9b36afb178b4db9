"""Results as of a real run: several models, tasks and lengths, with crashes, rules and failed samples."""

import random

from lawcat.evaluation.scoring import wilson_interval

TASKS = (
    "passkey",
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "babilong_qa1",
    "babilong_qa2",
    "babilong_qa3",
)
MODELS = ("teacher", "teacher, window 512 + 4 sinks", "LoLCATs student", "LAWCAT student")
HOSTILE = "</dd><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> \u202eabc\x00\ud800"


def payload(model, number, tasks=TASKS, lengths=(1024, 2048, 4096, 8192, 16384), samples=100, seed=0):
    rng = random.Random(f"{model}-{seed}")
    cells = [_cell(rng, model, number, task, length, samples) for task in tasks for length in lengths]
    return {
        "schema": 1,
        "model": model,
        "versions": {"python": "3.11.7", "platform": "linux-x86_64", "lawcat": "0.1.0", "torch": "2.13.0"},
        "command": "lawcat eval " + " ".join(f"out/{name.split()[0]}" for name in MODELS) + " --samples 100",
        "seed": seed,
        "model_fingerprint": f"{number:x}" * 32,
        "settings": {"device": "cuda:0", "dtype": "bfloat16", "batch_tokens": 131072},
        "peak_memory_bytes": 4_000_000_000 + number * 1_700_000_000,
        "results": cells,
        "perplexity": [_perplexity(number, length) for length in lengths],
        "kind": ("teacher", "baseline", "baseline", "student")[number % 4],
    }


def payloads(models=MODELS, **options):
    return [payload(model, number, **options) for number, model in enumerate(models)]


def _cell(rng, model, number, task, length, samples):
    octave = length.bit_length() - 11
    hardness = 0.06 * TASKS.index(task) if task in TASKS else 0
    share = [1.0 - 0.25 * (octave > 3), 0.75 - 0.2 * octave, 0.85 - 0.16 * octave, 0.96 - 0.06 * octave][
        number % 4
    ]
    right = round(samples * min(max(share - hardness + rng.uniform(-0.04, 0.04), 0), 1))
    errors = 2 if (number, task, length) == (2, "passkey", 8192) else 0
    right = min(right, samples - errors)
    finished = samples - errors
    failures = [
        {
            "index": index,
            "depth": (index % 11) / 10,
            "num_tokens": length - 7,
            "prompt_head": "A special magic number is hidden within the following text. Make sure to "
            "memorize it. I will quiz you about the number afterwards.\nThe grass is green. The sky is blue.",
            "prompt_tail": " The sun is yellow. Here we go. There and back again.\nWhat is the special magic "
            "number for furtive-apple mentioned in the provided text?",
            "wanted": [str(rng.randrange(10**6, 10**7))],
            "given": HOSTILE if index == right else rng.choice(["", " 1234567", " The grass is green. " * 6]),
            "score": 0.0,
            "error": "RuntimeError: out of memory" if index >= finished else None,
        }
        for index in range(right, samples)
    ]
    state = 4_700_160 if number >= 2 else 46_080 * (length if number == 0 else 516)
    cell = {
        "task": task,
        "length": length,
        "samples": finished,
        "accuracy": right / finished,
        "ci95": list(wilson_interval(right, finished)),
        "mean_tokens": length - 7.0,
        "min_tokens": length - 20,
        "max_tokens": length,
        "metric": "accuracy",
        "metrics": {"accuracy": right / finished},
        "errors": errors,
        "beyond_window": number == 0 and length > 8192,
        "haystack_repeats": 0,
        "seconds": samples * (0.02 + length / (20_000 if number else 20_000 / (1 + length / 6000))),
        "haystack": {"name": "prose.txt", "sha256": "ab" * 32} if task == "niah_single_2" else None,
        "options": {"depth": "grid"},
        "depths": [
            {
                "depth": step / 10,
                "samples": samples // 11,
                "accuracy": min(max(right / finished + rng.uniform(-0.2, 0.2), 0), 1),
            }
            for step in range(11)
        ],
        "state_bytes": state,
        "failures": failures,
    }
    if task.startswith("babilong"):
        cell["rules"] = {"last place named": {"1": 0.546, "2": 0.396, "3": 0.342}[task[-1]]}
    return cell


def _perplexity(number, length):
    ends = [64]
    while ends[-1] < length:
        ends.append(min(2 * ends[-1], length))
    starts = [1, *ends[:-1]]
    positions = [
        {
            "start": start,
            "end": end,
            "tokens": end - start,
            "nll": 3.0,
            "perplexity": 14 + 2 * number + 400 / end,
        }
        for start, end in zip(starts, ends, strict=True)
    ]
    return {
        "length": length,
        "windows": 4,
        "tokens": 4 * length,
        "nll": 3.0,
        "perplexity": 15 + 2 * number + 3000 / length,
        "source": {"name": "prose.txt", "sha256": "ab" * 32},
        "positions": positions,
    }
