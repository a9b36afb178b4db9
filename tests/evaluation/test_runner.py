import errno
import io
import json
import threading
from collections.abc import Mapping

import pytest
import torch
from tiny_models import tiny_lawcat, tiny_llama

import lawcat.evaluation.records as records_module
from lawcat.errors import ConfigurationError, DataError, LawcatError
from lawcat.evaluation.answering import reads_in_pieces
from lawcat.evaluation.records import read_records
from lawcat.evaluation.runner import evaluate
from lawcat.evaluation.samples import SampleCache, made_ahead
from lawcat.tasks import TextSource
from lawcat.tasks.sample import Task


class Counting(Task):
    """Asks short things, says what it was asked to make, and crashes where told to."""

    name = "counting"
    metrics = ("right", "half")
    default_options: Mapping = {"word": "grass"}

    def __init__(self, crashing=()):
        self.crashing = crashing
        self.made = []

    def make(self, request):
        index = request.index
        self.made.append((request.length, index))
        if index in self.crashing:
            raise RuntimeError(f"no sample {index}\nand more")
        sentence = f"The {request.options['word']} is green. "
        prompt = sentence * (1 + request.length // 50) + f"{request.seed} {index}"
        return request.sample(prompt, ("a",), 5, depth=index / 10, metadata={})

    def score(self, sample, answer_text):
        if answer_text == "the rule's":
            return {"right": float(sample.index == 0), "half": 0.5}
        return {"right": float(sample.index % 2), "half": 0.5}

    def rule_answers(self, sample):
        return {"first": "the rule's"}


def run(model, tokenizer, task=None, **options):
    return evaluate(
        model, tokenizer, **{"tasks": [task or Counting()], "lengths": [100], "samples": 7, **options}
    )


def given(result):
    return [record.given for cell in result.cells for record in cell.records]


def count_calls(model):
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_scores_of_a_cell(tokenizer, model):
    result = run(model, tokenizer, lengths=[100, "1k"], samples=4, name="tiny")
    cell = result.cell("counting", 1024)
    assert (cell.accuracy, cell.mean("half"), cell.num_errors) == (0.5, 0.5, 0)
    assert cell.interval == pytest.approx((0.15003899, 0.84996101))
    assert [record.index for record in cell.records] == [0, 1, 2, 3]
    record = cell.records[1]
    assert record.scores == {"right": 1.0, "half": 0.5}
    assert record.wanted == ["a"]
    assert record.num_new_tokens == 5
    assert record.prompt_head.startswith("The grass is green.")
    assert record.prompt_tail.endswith("0 1")
    assert len(record.prompt_head) == len(record.prompt_tail) == 200
    assert record.seconds > 0
    with pytest.raises(KeyError):
        result.cell("counting", 2048)


@pytest.mark.parametrize("make", [tiny_llama, tiny_lawcat])
def test_batches_give_what_samples_give_one_by_one(tokenizer, make):
    model = make()
    alone = run(model, tokenizer, lengths=[400, 1000], batch_tokens=1)
    together = run(model, tokenizer, lengths=[400, 1000], batch_tokens=100_000, prefill_chunk_tokens=20)
    assert given(alone) == given(together)
    assert len(set(given(alone))) > 1


def test_batches_keep_to_their_budget(tokenizer, model, monkeypatch):
    sizes = []
    # Both try the model with calls of their own.
    monkeypatch.setattr("lawcat.evaluation.memory.measure_cache", lambda *_: None)
    reads_in_pieces(model)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    run(model, tokenizer, samples=7, batch_tokens=70)
    prompts = [size for size in sizes if size[1] > 1]
    assert sum(rows for rows, _ in prompts) == 7
    assert max(rows for rows, _ in prompts) > 1
    assert all(rows * (columns + 5) <= 70 for rows, columns in prompts)


def test_samples_are_the_same_for_every_model(tokenizer):
    first = evaluate(tiny_llama(0), tokenizer, tasks=["passkey"], lengths=[300], samples=3)
    second = evaluate(tiny_lawcat(), tokenizer, tasks=["passkey"], lengths=[300], samples=3)
    asked = [[record.wanted for record in one.cells[0].records] for one in (first, second)]
    assert asked[0] == asked[1]
    assert first.model_fingerprint != second.model_fingerprint


def test_a_second_run_asks_nothing(tokenizer, model, tmp_path):
    path = tmp_path / "new" / "samples.jsonl"
    task = Counting()
    first = run(model, tokenizer, task, output_jsonl=path)
    lines = path.read_text()
    assert len(lines.splitlines()) == 7

    calls, made = count_calls(model), len(task.made)
    second = run(model, tokenizer, task, output_jsonl=path)
    assert (len(calls), len(task.made)) == (0, made)
    assert path.read_text() == lines
    assert (first.num_resumed, second.num_resumed) == (0, 7)
    assert second.cells == first.cells


def test_an_interrupted_run_goes_on_where_it_was(tokenizer, model, tmp_path):
    path = tmp_path / "samples.jsonl"
    whole = run(model, tokenizer)

    def interrupt(report):
        if report.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, output_jsonl=path, batch_tokens=1, progress=interrupt)
    assert len(path.read_text().splitlines()) == 3
    with open(path, "a") as file:  # the line that a kill cut off
        file.write(path.read_text().splitlines()[0][:-20])

    task = Counting()
    resumed = run(model, tokenizer, task, output_jsonl=path)
    assert resumed.num_resumed == 3
    assert {index for _, index in task.made} == {0, 3, 4, 5, 6}  # 0 to try the cell
    assert given(resumed) == given(whole)
    assert len(read_records(path)) == 7


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"lengths": [120]},
        {"options": {"counting": {"word": "sky"}}},
    ],
)
def test_other_questions_are_not_mistaken_for_answered_ones(tokenizer, model, tmp_path, change):
    path = tmp_path / "samples.jsonl"
    run(model, tokenizer, output_jsonl=path)
    assert run(model, tokenizer, output_jsonl=path, **change).num_resumed == 0
    assert len(path.read_text().splitlines()) == 14
    # Both are kept in the one file, and more samples only add to them.
    assert run(model, tokenizer, output_jsonl=path, samples=9).num_resumed == 7


def test_another_model_is_not_mistaken_for_this_one(tokenizer, model, tmp_path):
    path = tmp_path / "samples.jsonl"
    first = run(model, tokenizer, output_jsonl=path)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(0.01)
    assert run(model, tokenizer, output_jsonl=path).num_resumed == 0
    same = tiny_llama()
    same.config._name_or_path = "elsewhere"
    assert run(same, tokenizer, output_jsonl=path).num_resumed == 7
    assert run(same.double(), tokenizer, output_jsonl=path).num_resumed == 0
    newer = Counting()
    newer.version = 2
    assert run(tiny_llama(), tokenizer, newer, output_jsonl=path).num_resumed == 0
    assert first.model == "LlamaForCausalLM"


def test_a_sample_that_cannot_be_made_is_recorded_and_the_run_goes_on(tokenizer, model, tmp_path):
    path = tmp_path / "samples.jsonl"
    result = run(model, tokenizer, Counting(crashing=[2, 5]), output_jsonl=path)
    cell = result.cells[0]
    assert (result.num_errors, len(cell.finished)) == (2, 5)
    assert cell.records[2].error == "RuntimeError: no sample 2"
    assert cell.accuracy == 2 / 5
    assert cell.to_json()["errors"] == 2
    assert cell.to_json()["samples"] == 5
    # Crashed samples are tried again.
    mended = run(model, tokenizer, Counting(), output_jsonl=path)
    assert (mended.num_resumed, mended.num_errors) == (5, 0)


def test_a_first_sample_that_crashes_does_not_stop_the_run(tokenizer, model):
    result = run(model, tokenizer, Counting(crashing=[0]))
    assert result.num_errors == 1
    assert result.cells[0].records[0].error == "RuntimeError: no sample 0"


def test_what_the_report_reads(tokenizer, model, tmp_path):
    path = tmp_path / "samples.jsonl"
    result = run(model, tokenizer, Counting(crashing=[2]), samples=5, output_jsonl=path).to_json()
    assert (result["schema"], result["kind"]) == (1, "teacher")
    assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert result["peak_memory_bytes"] > 10_000_000
    assert result["settings"]["attention"] == "sdpa"
    (cell,) = result["results"]
    assert cell["rules"] == {"first": 0.25}  # sample 0 of the four that did not crash
    assert cell["state_bytes"] == 2 * 2 * 2 * 8 * 4 * cell["max_tokens"]
    total = sum(record.num_tokens + 5 for record in read_records(path).values())
    assert cell["tokens_per_second"] == pytest.approx(total / cell["seconds"], rel=0.1)
    zero, crashed, four = cell["failures"]
    assert set(zero) == {
        "index", "depth", "num_tokens", "prompt_head", "prompt_tail", "wanted", "given", "score", "error"
    }  # fmt: skip
    assert (zero["index"], zero["score"], zero["wanted"], zero["error"]) == (0, 0.0, ["a"], None)
    assert (crashed["index"], crashed["score"]) == (2, None)
    assert crashed["error"] == "RuntimeError: no sample 2"
    assert four["depth"] == 0.4
    # All of it but the peak is known to a run that answers nothing anew.
    again = run(model, tokenizer, Counting(crashing=[2]), samples=2, output_jsonl=path).to_json()
    assert again["peak_memory_bytes"] is None
    assert again["results"][0]["rules"] == {"first": 0.5}
    assert again["results"][0]["state_bytes"] == cell["state_bytes"]
    assert run(tiny_lawcat(), tokenizer).kind == "student"
    assert (
        "rules"
        not in evaluate(model, tokenizer, tasks=["passkey"], lengths=[300], samples=1).cells[0].to_json()
    )


def test_several_models_share_samples_made_once(tokenizer, model):
    task, cache = Counting(), SampleCache()
    first = run(model, tokenizer, task, sample_cache=cache)
    assert len(task.made) == 7
    second = run(tiny_lawcat(), tokenizer, task, sample_cache=cache)
    assert len(task.made) == 7
    assert given(second) == given(run(tiny_lawcat(), tokenizer, Counting()))
    assert given(second) != given(first)
    # Not for other questions, and not without room.
    run(model, tokenizer, task, sample_cache=cache, seed=1)
    assert len(task.made) == 14
    run(model, tokenizer, task, sample_cache=SampleCache(max_bytes=0))
    assert len(task.made) == 14 + 9  # the first and the last are tried before the run


def test_samples_made_in_the_background_are_the_same(tokenizer, model, monkeypatch):
    whole = run(model, tokenizer, Counting(crashing=[3]), lengths=[100, 400], batch_tokens=200)
    needles = {"tasks": ["niah_single_2", "passkey"], "lengths": [700], "samples": 4, "batch_tokens": 1500}
    asked = evaluate(model, tokenizer, **needles)
    monkeypatch.setattr("lawcat.evaluation.runner._overlaps", lambda device: True)
    assert given(evaluate(model, tokenizer, **needles)) == given(asked)
    again = run(model, tokenizer, Counting(crashing=[3]), lengths=[100, 400], batch_tokens=200)
    assert given(again) == given(whole)
    assert again.num_errors == 2


def test_items_made_ahead_keep_their_order_and_errors():
    def items():
        yield from range(5)
        raise KeyError("the fifth")

    with made_ahead(items(), in_background=True) as ready:
        assert [next(ready) for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(KeyError, match="the fifth"):
            next(ready)

    before = threading.active_count()
    with made_ahead(iter(range(10**9)), in_background=True) as ready:
        assert next(ready) == 0
    assert threading.active_count() == before


def test_a_batch_that_does_not_fit_is_not_tried_again(tokenizer, model):
    whole = run(model, tokenizer, lengths=[100, 400])
    sizes = []

    def refuse(_, args, kwargs):
        rows, columns = kwargs["input_ids"].shape
        if columns > 1:
            sizes.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    reads_in_pieces(model)
    model.register_forward_pre_hook(refuse, with_kwargs=True)
    result = run(model, tokenizer, lengths=[100, 400])
    assert result.num_errors == 0
    assert given(result) == given(whole)
    # 7 rows, halved to 3 and 4; after that, nothing of three short rows' size.
    assert [size for size in sizes if size > 2] == [7, 3]


def test_length_zero_is_for_tasks_that_have_it(tokenizer, model):
    class Zero(Counting):
        name = "zero"
        has_zero_length = True

    result = evaluate(model, tokenizer, tasks=[Zero(), Counting()], lengths=["0k", "100"], samples=1)
    assert [(cell.task, cell.length) for cell in result.cells] == [
        ("zero", 0), ("zero", 100), ("counting", 100)
    ]  # fmt: skip
    with pytest.raises(ConfigurationError, match="length is 0"):
        evaluate(model, tokenizer, tasks=["passkey"], lengths=["0k"], samples=1)


def test_a_crash_of_the_model_costs_one_sample(tokenizer, model):
    whole = run(model, tokenizer, samples=8)
    poison = tokenizer("3").input_ids[-1]

    def crash(_, args, kwargs):
        if (kwargs["input_ids"][:, -1] == poison).any() and kwargs["input_ids"].shape[1] > 1:
            raise RuntimeError("out of luck")

    model.register_forward_pre_hook(crash, with_kwargs=True)
    result = run(model, tokenizer, samples=8)
    cell = result.cells[0]
    assert [record.error for record in cell.records] == [None] * 3 + ["RuntimeError: out of luck"] + [
        None
    ] * 4
    expected = given(whole)
    expected[3] = ""
    assert given(result) == expected
    assert cell.records[3].num_tokens > 0


def test_when_everything_crashes_there_is_no_accuracy(tokenizer, model):
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    result = run(model, tokenizer)
    cell = result.cells[0].to_json()
    assert (cell["accuracy"], cell["ci95"], cell["mean_tokens"], cell["errors"]) == (None, None, None, 7)
    json.dumps(result.to_json(), allow_nan=False)


def test_prompts_beyond_the_window_are_run_whole_and_marked(tokenizer):
    model = tiny_llama(max_position_embeddings=500)
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    result = evaluate(
        model, tokenizer, tasks=["passkey"], lengths=[450, 800], samples=2, prefill_chunk_tokens=4096
    )
    within, beyond = result.cells
    assert [record.beyond_window for record in within.records] == [False, False]
    assert [record.beyond_window for record in beyond.records] == [True, True]
    assert max(seen) == beyond.records[0].num_tokens > 790
    assert (within.to_json()["beyond_window"], beyond.to_json()["beyond_window"]) == (False, True)


def test_passkey_answers_end_after_the_first_number(tokenizer):
    """A model that always says one token: here a digit, then a full stop."""
    digit, stop = (tokenizer(text).input_ids[-1] for text in ("7", "."))
    model = tiny_llama()

    def say(_, args, kwargs, output):
        output.logits = torch.zeros_like(output.logits)
        last_is_digit = kwargs["input_ids"][:, -1] == digit
        output.logits[:, -1, digit] = (~last_is_digit).float()
        output.logits[:, -1, stop] = last_is_digit.float()
        return output

    model.register_forward_hook(say, with_kwargs=True)
    result = evaluate(model, tokenizer, tasks=["passkey"], lengths=[300], samples=3)
    assert given(result) == ["7."] * 3
    assert [record.num_new_tokens for record in result.cells[0].records] == [2, 2, 2]


def test_progress_counts_kept_samples_and_estimates_the_rest(tokenizer, model, tmp_path):
    path = tmp_path / "samples.jsonl"
    run(model, tokenizer, samples=3, output_jsonl=path)
    reports = []
    run(
        model,
        tokenizer,
        lengths=[100, 200],
        samples=4,
        output_jsonl=path,
        batch_tokens=1,
        progress=reports.append,
    )
    assert [report.done for report in reports] == [3, 4, 5, 6, 7, 8]
    assert {report.total for report in reports} == {8}
    assert reports[0].seconds_left is None
    assert all(report.seconds_left > 0 for report in reports[1:-1])
    assert reports[-1].seconds_left == 0
    assert (reports[1].length, reports[-1].length) == (100, 200)


def test_options_and_haystack_reach_their_tasks_and_the_results(tokenizer, model):
    source = TextSource("own.txt", "Nothing of note. " * 400)
    result = evaluate(
        model,
        tokenizer,
        tasks=["niah_single_1", "niah_single_2", "passkey"],
        lengths=[700],
        samples=1,
        haystack=source,
        options={"passkey": {"depth": "random", "length_rule": "longrope"}},
    )
    cells = {cell["task"]: cell for cell in result.to_json()["results"]}
    assert cells["niah_single_1"]["haystack"]["name"] == "noise"
    assert cells["niah_single_2"]["haystack"] == {"name": "own.txt", "sha256": source.sha256}
    assert cells["passkey"]["haystack"] is None
    assert cells["passkey"]["options"] == {"depth": "random", "length_rule": "longrope"}
    assert "of note" in result.cell("niah_single_2", 700).records[0].prompt_head
    with pytest.warns(UserWarning, match=r"haystack 'own.txt' has no effect.*passkey"):
        evaluate(model, tokenizer, tasks=["passkey"], lengths=[300], samples=1, haystack=source)


def test_outside_data_reaches_the_tasks_that_take_it(tokenizer, model):
    class Facts(Counting):
        name = "facts"
        default_options: Mapping = {"word": "grass", "noise": None, "babi": None}

        def make(self, request):
            taken.append((request.options["noise"], request.options["babi"]))
            return super().make(request)

    taken = []
    source = TextSource("own.txt", "Nothing of note. ")
    result = evaluate(
        model,
        tokenizer,
        tasks=[Facts(), Counting()],
        lengths=[100],
        samples=1,
        noise=source,
        babi="some/where",
    )
    assert set(taken) == {(source, "some/where")}
    facts, counting = result.to_json()["results"]
    assert facts["noise"] == facts["options"]["noise"] == {"name": "own.txt", "sha256": source.sha256}
    assert "noise" not in counting
    with pytest.warns(UserWarning, match="has no effect") as caught:
        run(model, tokenizer, samples=1, noise=source, babi="some/where")
    assert [str(one.message).split(":")[0] for one in caught] == [
        "The noise 'own.txt' has no effect",
        "The babi 'where' has no effect",
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": ["pass_key"]}, ConfigurationError, r"no task 'pass_key'.*Did you mean 'passkey'"),
        ({"tasks": []}, ConfigurationError, "nothing to evaluate"),
        ({"lengths": []}, ConfigurationError, "nothing to evaluate"),
        ({"lengths": ["8 kilo"]}, ConfigurationError, "'8 kilo' is not a length.*Did you mean '8k'"),
        ({"tasks": ["niah_single_2"], "noise": "no/such.txt"}, DataError, "No file found"),
        ({"lengths": [20]}, DataError, "Ask for a length of at least"),
        ({"samples": 0}, ConfigurationError, "samples is 0"),
        ({"batch_tokens": -1}, ConfigurationError, "batch_tokens is -1"),
        ({"prefill_chunk_tokens": 0.5}, ConfigurationError, "prefill_chunk_tokens is 0.5"),
        ({"options": {"passkey": {"dept": 1}}}, ConfigurationError, r"no option 'dept'.*'depth'"),
        ({"options": {"niah_single_1": {}}}, ConfigurationError, "options for 'niah_single_1', which is not"),
        ({"options": {"passkey": {"depth": 7}}}, ConfigurationError, "depth is 7"),
        ({"tasks": ["niah_single_2"], "haystack": "no/such.txt"}, DataError, "No file found"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(tokenizer, model, options, error, message):
    calls = count_calls(model)
    with pytest.raises(error, match=message):
        evaluate(model, tokenizer, **{"tasks": ["passkey"], "lengths": [300], "samples": 2, **options})
    assert not calls


def test_more_samples_than_there_are_questions_are_refused_before_anything_runs(tokenizer, model, tmp_path):
    story = "1 Mary went to the office.\n2 Where is Mary? \toffice\t1\n"
    (tmp_path / "qa1_two_train.txt").write_text(2 * story, encoding="utf-8")
    given = {"tasks": ["babilong_qa1"], "lengths": [0], "babi": tmp_path}
    calls = count_calls(model)
    with pytest.raises(DataError, match="has 2 questions for this length, and sample 3 was asked for"):
        evaluate(model, tokenizer, **given, samples=3)
    assert not calls
    assert evaluate(model, tokenizer, **given, samples=2).num_errors == 0


def test_no_tokenizer(model):
    with pytest.raises(ConfigurationError, match="no tokenizer"):
        evaluate(model, None, tasks=["passkey"], lengths=[300])


@pytest.mark.parametrize(
    "content", [b'{"schema": 1}', b"notes\n", b"notes", b"\xff\xfe", b'{"format": "lawcat-sample-1"}\n']
)
def test_somebody_elses_file_is_refused_and_left_alone(tokenizer, model, tmp_path, content):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"samples\.jsonl"):
        run(model, tokenizer, output_jsonl=path)
    assert path.read_bytes() == content


def test_records_on_a_full_disk_say_which_file(tokenizer, model, tmp_path, monkeypatch):
    class Full(io.RawIOBase):
        name = "samples.jsonl"

        def writable(self):
            return True

        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path, mode="r", **options):
        return io.TextIOWrapper(io.BufferedWriter(Full())) if mode == "a" else open(path, mode, **options)

    monkeypatch.setattr(records_module, "open", opened, raising=False)
    with pytest.raises(LawcatError, match=r"^disk full: .*samples\.jsonl could not be written"):
        run(model, tokenizer, samples=2, output_jsonl=tmp_path / "samples.jsonl")


def test_a_length_that_is_too_short_says_for_which_task(tokenizer, model):
    with pytest.raises(DataError, match=r"^vt at 512: The question, .* take \d+ tokens .* not fit in 512"):
        run(model, tokenizer, tasks=["passkey", "vt"], lengths=[512], samples=1)


def test_every_cut_of_the_last_line_is_survived(tokenizer, model, tmp_path):
    path = tmp_path / "samples.jsonl"
    run(model, tokenizer, samples=2, output_jsonl=path)
    first, second = path.read_text().splitlines(keepends=True)
    for length in range(0, len(second) + 1, 7):
        path.write_text(first + second[:length])
        assert len(read_records(path)) == (2 if length >= len(second) - 1 else 1)
    path.write_text(first + second[:-1])
    assert run(model, tokenizer, samples=3, output_jsonl=path).num_resumed == 2
    assert len(path.read_text().splitlines()) == 3
