"""lm-evaluation-harness asks our questions and finds our scores."""

import json
import subprocess
import sys

import pytest
from tiny_models import tiny_lawcat, tiny_llama

from lawcat.errors import ConfigurationError
from lawcat.evaluation.runner import evaluate
from lawcat.tasks.sample import TASKS, Sample, Task, register_task

pytest.importorskip("lm_eval", reason="lm-eval is an extra")

from lm_eval.api.registry import get_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from lawcat.evaluation.lm_eval import LawcatLM, process_results, write_tasks

pytestmark = pytest.mark.filterwarnings("ignore")


class Vowels(Task):
    """A task that even a model with random weights gets partly right, so that equal scores mean something."""

    name = "vowels"
    metrics = ("share", "starts")

    def make(self, request):
        index = request.index
        prompt = " ".join(["grass", "sky", "sun", "pass key"][: 1 + index % 4]) + " is" * (index + 1)
        return request.sample(prompt, ("a",), 12, metadata={"index": index})

    def score(self, sample, answer_text):
        letters = [letter for letter in answer_text if letter.isalpha()]
        share = sum(letter in "aeiou" for letter in letters) / max(len(letters), 1)
        return {"share": share, "starts": float(answer_text[:1] == " ") * (1 + sample.metadata["index"]) / 7}


@pytest.fixture
def vowels():
    yield register_task(Vowels())
    del TASKS["vowels"]


def run(model, tokenizer, folder, names, batch_size=3):
    return simple_evaluate(
        model=LawcatLM(model, tokenizer, batch_size=batch_size),
        tasks=names,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )


@pytest.mark.parametrize("make", [tiny_lawcat, tiny_llama])
def test_scores_are_those_of_our_runner_on_the_same_samples(make, tokenizer, vowels, tmp_path):
    model = make()
    names = write_tasks(tmp_path, tokenizer, tasks=["vowels", "passkey"], lengths=["256"], samples=7)
    assert names == ["lawcat_vowels_256", "lawcat_passkey_256"]
    theirs = run(model, tokenizer, tmp_path, names)["results"]
    ours = evaluate(model, tokenizer, tasks=["vowels", "passkey"], lengths=[256], samples=7)
    share = ours.cell("vowels", 256).mean("share")
    assert 0 < share < 1, "the samples would show no difference"
    for metric in ("share", "starts"):
        assert theirs["lawcat_vowels_256"][f"{metric},none"] == pytest.approx(
            ours.cell("vowels", 256).mean(metric), abs=1e-12
        )
    assert theirs["lawcat_passkey_256"]["accuracy,none"] == ours.cell("passkey", 256).accuracy


def test_prompts_arrive_as_they_are(tokenizer, tmp_path):
    names = write_tasks(tmp_path, tokenizer, tasks=["niah_single_1"], lengths=["512"], samples=2)
    samples = run(tiny_lawcat(), tokenizer, tmp_path, names)["samples"][names[0]]
    for index, sample in enumerate(samples):
        wanted = TASKS["niah_single_1"].generate(tokenizer, 512, index, 0)
        assert sample["arguments"][0][0] == wanted.prompt
        assert sample["arguments"][0][1]["max_gen_toks"] == 128


def test_a_document_is_scored_as_its_sample(tokenizer, tmp_path):
    name = write_tasks(tmp_path, tokenizer, tasks=["passkey"], lengths=[128], samples=1)[0]
    document = json.loads((tmp_path / f"{name}.jsonl").read_text())
    key = document["answers"][0]
    assert process_results(document, [f" {key}."])["accuracy"] == 1.0
    assert process_results(document, [" 0."])["accuracy"] == 0.0


def test_a_prompt_beyond_max_length_is_refused_and_not_cut(tokenizer):
    model = LawcatLM(tiny_lawcat(), tokenizer, max_length=64)
    with pytest.raises(ConfigurationError, match="has 80 tokens and max_length=64 leaves room for 54"):
        model.tok_batch_encode(["1" * 80], left_truncate_len=54)


def test_the_models_declared_window_is_no_limit(tokenizer):
    assert LawcatLM(tiny_lawcat(max_position_embeddings=32), tokenizer).max_length == 131_072


def test_rolling_windows_are_as_long_as_the_model_declares(tokenizer, monkeypatch):
    model = LawcatLM(tiny_lawcat(max_position_embeddings=32), tokenizer)
    widths = []
    call = model._model_call
    monkeypatch.setattr(
        model, "_model_call", lambda ids, **kw: widths.append(ids.shape[1]) or call(ids, **kw)
    )

    class Request:
        args = ("the grass is green " * 20,)

    model.loglikelihood_rolling([Request()], disable_tqdm=True)
    assert max(widths) == 32
    assert model.max_length == 131_072


def test_the_name_is_known_after_the_import():
    assert get_model("lawcat") is LawcatLM


def test_facts_alone_and_options_of_other_tasks(tokenizer, tmp_path):
    names = write_tasks(tmp_path, tokenizer, tasks=["babilong_qa1"], lengths=["0k"], samples=2)
    assert names == ["lawcat_babilong_qa1_0"]
    lines = (tmp_path / "lawcat_babilong_qa1_0.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["length"] for line in lines] == [0, 0]
    with pytest.raises(ConfigurationError, match="options for 'passkey', which is not among the tasks"):
        write_tasks(tmp_path, tokenizer, tasks=["copy"], lengths=[64], options={"passkey": {"depth": 1}})


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigurationError, match="dtype is 'int3'; it must be one of auto, float32"):
        LawcatLM("anywhere", dtype="int3")


def test_lm_evals_default_device_is_taken_without_a_gpu_and_another_is_refused(
    tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    tiny_lawcat().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert str(LawcatLM(str(tmp_path), device="cuda:0").device) == "cpu"
    with pytest.raises(ConfigurationError, match="'cuda:7' cannot be used here"):
        LawcatLM(str(tmp_path), device="cuda:7")


def test_the_command_hands_arguments_on_and_runs_a_student(tokenizer, tmp_path):
    tiny_lawcat().save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    lawcat = [sys.executable, "-m", "lawcat"]
    options = ["--tasks", "passkey", "--lengths", "128", "--samples", "2"]
    made = subprocess.run(
        [*lawcat, "lm-eval-tasks", tmp_path / "tasks", tmp_path / "student", *options],
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout == "lawcat_passkey_128\n"
    model = ["--model", "lawcat", "--model_args", f"pretrained={tmp_path / 'student'}"]
    tasks = ["--include_path", tmp_path / "tasks", "--tasks", "lawcat_passkey_128"]
    ran = subprocess.run([*lawcat, "lm-eval", "run", *model, *tasks], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "lawcat_passkey_128" in ran.stdout
    assert "digit_accuracy" in ran.stdout


@pytest.mark.slow
def test_stock_niah_single_1_asks_as_we_do_and_agrees(tokenizer, tmp_path):
    """Its prompts are ours in the linear fit, and its score of any answer is ours; so both tables agree."""
    from lm_eval.tasks.ruler.common_utils import process_results as theirs
    from lm_eval.tasks.ruler.niah_utils import niah_single_1  # builds a list of 6 million words: 15 seconds

    from lawcat.tasks.context import noise_context
    from lawcat.tasks.needle import Needle, NeedleQuestion

    tokenizer.save_pretrained(tmp_path)
    documents = niah_single_1(max_seq_lengths=[1024], tokenizer=str(tmp_path))["test"]
    task = TASKS["niah_single_1"]
    ours = task.generate(tokenizer, 1024, 0, 0, fit="linear")
    for document in documents.select(range(20)):
        value = document["outputs"][0]
        key = document["query"] if "query" in document else document["input"].rsplit(" for ", 1)[1].split()[0]
        needle = Needle("numbers", key, value)
        context = document["input"].split("afterwards.\n", 1)[1].rsplit("\nWhat is", 1)[0]
        lines = context.split("\n")
        place = (lines.index(needle.sentence) + 0.5) / (len(lines) - 1)
        question = NeedleQuestion([[needle]], [0], noise_context(), lambda units, place=place: [place])
        assert question.prompt(len(lines) - 1) == document["input"] + " " + document["gen_prefix"]
        assert len(lines) - 1 == ours.metadata["haystack_units"]
        sample = Sample("niah_single_1", 1024, 0, 0, document["input"], (value,), 128, 1)
        for answer in (f" {value}.", " 12", f"\x00{value}", ""):
            assert task.score(sample, answer)[task.metrics[0]] == theirs(document, [answer])["1024"]
