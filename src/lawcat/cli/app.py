"""The command line: one typer app. Each command imports what it needs when it is called."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from lawcat import __version__
from lawcat.errors import LawcatError

app = typer.Typer(
    name="lawcat",
    help="Turn a pretrained transformer into a linear-attention model, and measure it against its teacher.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the GPU if there is one when not given.")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (as saved), float32, bfloat16, or fast: bfloat16 where the device is faster in it."
    ),
]
Base = Annotated[str | None, typer.Option(help="The teacher to apply an adapter to; else the one it names.")]


_Arguments = ParamSpec("_Arguments")


def _with_exit_codes(command: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Exit 2 with one message on a user's error, 130 on Ctrl-C."""

    @functools.wraps(command)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except LawcatError as error:
            _stop(str(error), 2)
        except KeyboardInterrupt:
            saves = command.__name__ == "linearize" or kwargs.get("records") is not None
            rest = "; what was finished is saved, and the same command goes on from there" if saves else ""
            _stop(f"interrupted{rest}", 130)
        except BrokenPipeError:  # the reader of our output has gone, as in `lawcat info x | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            _stop(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)

    return run


def _stop(message: str, code: int) -> None:
    print(f"lawcat: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"lawcat {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
@_with_exit_codes
def linearize(
    teacher: Annotated[
        str, typer.Argument(help="Hub id, local folder, GGUF file, or smollm2-135m-instruct.")
    ],
    out: Annotated[
        Path, typer.Argument(help="Directory for the student; must not exist, unless from this same run.")
    ],
    recipe: Annotated[str, typer.Option(help="A shipped recipe's name, or a YAML file.")] = "quick",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field: --set recovery.steps=100. Repeatable.")
    ] = None,
    evaluate: Annotated[bool, typer.Option(help="Measure teacher and student as the recipe says.")] = True,
    tensorboard: Annotated[bool, typer.Option(help="Also write TensorBoard files.")] = False,
    variant: Annotated[
        str | None, typer.Option(help="Of a recipe with a matrix, only these: no-conv,no-gate.")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="Train with each of these seeds, into OUT/<variant>-seed1 ...: 0,1,2."),
    ] = None,
) -> None:
    """Convert TEACHER and distil it; of a matrix every variant. Ctrl-C saves; the same command goes on.

    "answers right" is the share of task answers' tokens that the model would choose, each after the true ones
    before it. What a step's line of OUT/training_log.jsonl holds is in docs/method.md.
    """
    from lawcat.cli.linearize import run_linearize

    run_linearize(teacher, out, recipe, set_ or [], evaluate, tensorboard, variant, seeds)


@app.command(name="rank-layers")
@_with_exit_codes
def rank_layers(
    student: Annotated[
        str,
        typer.Argument(
            help="Student or adapter after stage 1: linearize with teacher_tuning.steps and recovery.steps 0."
        ),
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(help="Held-out text: a file or glob of .txt, .md, .jsonl. Repeatable."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Rank by answers alone: a recipe, of whose task data samples are made, hidden in --text if "
            "given."
        ),
    ] = None,
    choose: Annotated[int, typer.Option(min=0, help="How many layers to keep as softmax.")] = 4,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Pieces to read; 16 on a GPU and 4 on a CPU else.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of each; 1024 on a GPU and 512 on a CPU else.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of which pieces.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    base: Base = None,
) -> None:
    """Measure what each layer's linear attention costs, and choose those to keep as softmax in a hybrid.

    By --text alone all tokens count, by --data the answers: layers that look things up are others than those
    that prose wants.
    """
    from lawcat.cli.rank_layers import run_rank_layers

    run_rank_layers(student, text or [], data, choose, windows, length, seed, output, device, dtype, base)


@app.command(name="eval")
@_with_exit_codes
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Students, adapters, teachers: one or several.")],
    tasks: Annotated[
        str, typer.Option(help="Comma-separated: passkey, niah_single_1, ..., perplexity.")
    ] = "passkey",
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths in tokens: 1024,2048 or 1k,2k; 0k for BABILong's facts alone.")
    ] = "1k,2k,4k",
    samples: Annotated[int, typer.Option(min=1, help="Samples a task and length.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a report with plots into this directory.")
    ] = None,
    perplexity_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of text for perplexity, a length.")
    ] = 16384,
    records: Annotated[
        Path | None, typer.Option(help="Keep finished samples here, and run none of them again.")
    ] = None,
    haystack: Annotated[
        str | None,
        typer.Option(help="Text for needles, last words, perplexity: file or glob; else a built-in excerpt."),
    ] = None,
    noise: Annotated[
        str | None, typer.Option(help="Text around BABILong's facts: file or glob; else a built-in excerpt.")
    ] = None,
    babi: Annotated[
        str | None, typer.Option(help="Folder of the real bAbI text files; else the simulator's stories.")
    ] = None,
    sliding_window: Annotated[
        str | None,
        typer.Option(
            help="Also measure each softmax model as it attends only to so many last tokens: 64,512."
        ),
    ] = None,
    sinks: Annotated[
        int, typer.Option(min=0, help="First tokens that such a window always keeps in sight.")
    ] = 4,
    attention: Annotated[
        str, typer.Option(help="Of softmax layers: auto, sdpa, flash_attention_2 or eager.")
    ] = "auto",
    tokenizer: Annotated[
        str | None, typer.Option(help="Take the tokenizer from this model, for one that has none.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="A task's option: passkey.length_rule=longlora, passkey.depth=random. Repeatable."),
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    base: Base = None,
) -> None:
    """Measure models on the same samples: accuracy by length, and perplexity by position."""
    from lawcat.cli.evaluate import EvaluationCall, run_evaluate

    run_evaluate(
        EvaluationCall(
            models=models,
            tasks=tasks,
            lengths=lengths,
            samples=samples,
            seed=seed,
            output=output,
            report=report,
            perplexity_tokens=perplexity_tokens,
            records=records,
            haystack=haystack,
            noise=noise,
            babi=babi,
            sliding_window=sliding_window,
            sinks=sinks,
            attention=attention,
            tokenizer=tokenizer,
            options=option or [],
            device=device,
            dtype=dtype,
            base=base,
        )
    )


@app.command()
@_with_exit_codes
def report(
    files: Annotated[list[Path], typer.Argument(help="Results files of one or several runs and models.")],
    output: Annotated[Path, typer.Option(help="Write report.html and report.md into this directory.")],
    names: Annotated[
        str | None, typer.Option(help="What to call the models, comma-separated, one name a file.")
    ] = None,
    image_format: Annotated[str, typer.Option(help="Plots of report.md: svg or png.")] = "svg",
) -> None:
    """Make one report of stored results, models in the order of the files: the teacher's first."""
    from lawcat.cli.report import run_report

    run_report(files, output, names, image_format)


@app.command()
@_with_exit_codes
def generate(
    model: Annotated[str, typer.Argument(help="Student, adapter or teacher.")],
    prompt: Annotated[
        str | None, typer.Option(help="The prompt; from standard input when not given.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Probability mass to sample from.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    int8: Annotated[
        bool, typer.Option("--int8", help="Round weights to eight bits: faster on a CPU, less memory.")
    ] = False,
    base: Base = None,
) -> None:
    """Continue a prompt, token by token on standard output."""
    from lawcat.cli.generate import run_generate

    run_generate(
        model, prompt, prompt_file, max_new_tokens, temperature, top_p, seed, chat, device, dtype, int8, base
    )


@app.command()
@_with_exit_codes
def info(
    model: Annotated[
        str | None, typer.Argument(help="Student, adapter or teacher; versions and backends alone without.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    shipped: Annotated[
        bool, typer.Option("--shipped", help="List the adapters that come with lawcat instead.")
    ] = False,
) -> None:
    """Show what a model is, its memory by context length, and which backends are here and why."""
    from lawcat.cli.info import run_info

    run_info(model, as_json, shipped)


@app.command()
@_with_exit_codes
def pack(
    source: Annotated[Path, typer.Argument(help="An adapter, or a student that was trained here.")],
    destination: Annotated[Path, typer.Argument(help="Directory to write; its name is the adapter's.")],
    dtype: Annotated[str, typer.Option(help="Of LoRA factors: float16, bfloat16 or float32.")] = "float16",
    new_parameters: Annotated[
        str, typer.Option(help="Of convolutions, maps and gates: float16, bfloat16 or float32.")
    ] = "float16",
    base: Annotated[
        str | None,
        typer.Option(
            help="What others load the base by, fetched to compare: a hub id or smollm2-135m-instruct."
        ),
    ] = None,
    card: Annotated[
        Path | None, typer.Option(help="Markdown to put into the model card: what was measured.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Say what rounding does to the logits.")] = True,
) -> None:
    """Write an adapter to give away: rounded, with a model card and sums, without this machine's paths."""
    from lawcat.cli.pack import run_pack

    run_pack(source, destination, dtype, new_parameters, base, card, check)


@app.command(
    name="lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
@_with_exit_codes
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness, which then knows `--model lawcat`; arguments are those of `lm_eval`."""
    from lawcat.cli.lm_eval import run_lm_eval

    run_lm_eval(context.args)


@app.command(name="lm-eval-tasks")
@_with_exit_codes
def lm_eval_tasks(
    folder: Annotated[Path, typer.Argument(help="Directory for the task files.")],
    model: Annotated[str, typer.Argument(help="Whose tokenizer measures the prompts.")],
    tasks: Annotated[str, typer.Option(help="Comma-separated, as of `lawcat eval`.")] = "passkey",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens: 1024,2048 or 1k,2k.")] = "1k,2k,4k",
    samples: Annotated[int, typer.Option(min=1, help="Samples a task and length.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    option: Annotated[list[str] | None, typer.Option(help="A task's option, as of `lawcat eval`.")] = None,
) -> None:
    """Write lawcat's samples as tasks for `lm_eval --include_path FOLDER`, and print their names."""
    from lawcat.cli.lm_eval import run_lm_eval_tasks

    run_lm_eval_tasks(folder, model, tasks, lengths, samples, seed, option or [])


@app.command()
@_with_exit_codes
def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Students, adapters, teachers; else --shape with random weights."),
    ] = None,
    what: Annotated[
        str, typer.Option(help="Comma-separated: operators, generation, training.")
    ] = "operators,generation,training",
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="smollm2-135m, llama-3.2-1b, mistral-7b, qwen2.5-0.5b, qwen3-0.6b or tiny. Repeatable."
        ),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens: 1k,2k,...; to 64k on a GPU and 2k on a CPU when not given.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of prefill and of the operator.")] = 1,
    decode_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences of decoding; 16 on a GPU, else 1, when not given.")
    ] = None,
    training_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a training step; 16 on a GPU, else 2.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.001, help="About how long one contender may take at one length.")
    ] = None,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Time replays of CUDA graphs, for every contender.")
    ] = False,
    backends: Annotated[
        str | None, typer.Option(help="Which of lawcat's backends, comma-separated; all when not given.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write benchmark.md, plots and benchmark.json into this directory.")
    ] = None,
    image_format: Annotated[str, typer.Option(help="Of the plots: png or svg.")] = "png",
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    device: Device = None,
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 on a GPU, else as saved), float32, bfloat16 or fast.")
    ] = "auto",
) -> None:
    """Time lawcat against softmax attention and the teacher, on the same inputs by turns."""
    from lawcat.cli.bench import run_bench

    run_bench(
        models or [],
        what,
        shape or [],
        lengths,
        batch,
        decode_batch,
        training_batch,
        seconds,
        cuda_graphs,
        backends,
        output,
        report,
        image_format,
        seed,
        device,
        dtype,
    )


def main() -> None:
    """Run the app."""
    app()
