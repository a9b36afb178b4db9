"""A matrix of variants: each a whole student, none trained twice, one that fails stops no other."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tiny_runs import (
    TinyRun,
    assert_same_student,
    files_unchanged,
    free_port,
    on_one_processor,
    tensors_of,
    tiny_recipe,
)

import lawcat.distill.linearize as linearize_module
import lawcat.distill.matrix as matrix_module
from comparison import assert_near
from lawcat.convert.teacher import resolve_teacher
from lawcat.distill.linearize import linearize
from lawcat.distill.matrix import MatrixResult, _write_record, linearize_matrix, matrix_table, plan
from lawcat.distill.recipe import Matrix, Recipe, Variant
from lawcat.errors import ConfigurationError
from tiny_teachers import save_teacher

VARIANTS: dict[str, Any] = {
    "plain": {},
    "no-conv": {"model.use_conv": False},
    "all": {"recovery": {"train": "all"}},
}
EVALUATION = {"tasks": ["passkey"], "lengths": [512], "samples": 2, "perplexity_tokens": 64}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, module_patch: pytest.MonkeyPatch) -> TinyRun:
    place = tmp_path_factory.mktemp("matrix")
    on_one_processor(module_patch, place / "cache")
    tiny = TinyRun(place)
    shutil.rmtree(tiny.teacher)
    save_teacher(tiny.teacher, spells=True, tie_word_embeddings=True)  # one that can hold a passkey
    return tiny


def recipe_of(run: TinyRun, matrix: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    values = tiny_recipe(run.text, evaluation=EVALUATION).to_dict() | fields
    return Recipe.from_dict(values | {"matrix": VARIANTS if matrix is None else matrix})


def train(run: TinyRun, out: str, recipe: Recipe | None = None, **options: Any) -> MatrixResult:
    options = {"evaluate": False} | options
    return linearize_matrix(str(run.teacher), run.place / out, recipe or recipe_of(run), **options)


@pytest.fixture(scope="module")
def whole(run: TinyRun) -> MatrixResult:
    """All variants, one of them from two seeds, measured."""
    matrix = VARIANTS | {"no-conv": {"model.use_conv": False, "seeds": [3, 1]}}
    return train(run, "whole", recipe_of(run, matrix), evaluate=True)


def states(result: MatrixResult) -> dict[str, str]:
    return {one.name: one.state for one in result.runs}


@pytest.mark.parametrize("name", Recipe.shipped())
def test_a_shipped_recipe_is_read_back_as_it_was(name: str) -> None:
    recipe = Recipe.load(name)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    if recipe.matrix is None:
        return
    for variant in recipe.matrix.names:
        own = recipe.variant(variant, seed=7)
        assert Recipe.from_yaml(own.to_yaml()) == own
    subset = replace(recipe, matrix=Matrix(recipe.matrix.variants[::2], seeds=(1, 2)))
    assert Recipe.from_yaml(subset.to_yaml()) == subset


def test_a_matrix_with_a_variant_that_is_out_is_read_back(run: TinyRun) -> None:
    recipe = recipe_of(run, VARIANTS | {"all": {"recovery": {"train": "all"}, "seeds": [2]}})
    tuned = recipe.with_overrides({"teacher_tuning.steps": 1})
    assert tuned.matrix is not None
    assert [variant.is_excluded for variant in tuned.matrix.variants] == [False, False, True]
    text = tuned.to_yaml()
    assert text.count("excluded: true") == 1
    again = Recipe.from_yaml(text)
    assert again == tuned
    assert again.fingerprint() == tuned.fingerprint() != recipe.fingerprint()
    with pytest.raises(ConfigurationError, match=r"^matrix\.all\.teacher_tuning\.steps: got 1"):
        again.variant("all")
    assert again.with_overrides({"teacher_tuning.steps": 0}) == recipe
    with pytest.raises(ConfigurationError, match=r"^matrix\.all\.excluded: got True of one that can be"):
        Recipe.from_yaml(text.replace("steps: 1\n", "steps: 0\n", 1))
    with pytest.raises(ConfigurationError, match=r"^matrix\.all\.excluded: got 'yes'; give true or false"):
        Recipe.from_yaml(text.replace("excluded: true", "excluded: 'yes'"))


def test_a_matrix_made_in_python_is_read_back(run: TinyRun) -> None:
    data = [{"provider": "babilong", "noise_shares": (1.0, 2.0, 3.0), "min_sample_tokens": 16}]
    variants = Variant("nested", {"model": {"softmax_layers": (0, 1)}}), Variant("data", {"data": data})
    recipe = replace(recipe_of(run), matrix=Matrix(variants))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert recipe.variant("nested").model.softmax_layers == (0, 1)


def test_a_run_s_recipe_is_resolved_once(run: TinyRun, tmp_path: Path) -> None:
    _, runs = plan(recipe_of(run), tmp_path)
    assert runs[0].recipe is runs[0].recipe


def test_every_variant_is_the_student_that_its_recipe_alone_gives(run: TinyRun, whole: MatrixResult) -> None:
    assert states(whole) == dict.fromkeys(["plain", "no-conv", "no-conv-seed1", "all"], "finished")
    assert whole.failed == ()
    overrides: dict[str, dict[str, Any]] = {
        "no-conv-seed1": {"model.use_conv": False, "seed": 1},
        "all": {"recovery.train": "all"},
    }
    for name, values in overrides.items():
        alone = linearize(str(run.teacher), run.place / f"alone-{name}", tiny_recipe(run.text), **values)
        assert_same_student(alone.path, whole.path / name)
    assert {path.name for path in whole.path.iterdir()} == {
        *states(whole),
        *("evaluation", "report", "matrix.json", "matrix.md"),
    }


def test_models_are_measured_on_the_same_samples(whole: MatrixResult) -> None:
    seen = []
    for folder, model in [(whole.path, "teacher"), *((one.path, one.name) for one in whole.runs)]:
        lines = (folder / "evaluation" / "samples.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert {record["model"] for record in records} == {model}
        seen.append([(record["prompt_head"], record["prompt_tail"], record["wanted"]) for record in records])
    assert len(seen) == 5
    assert all(samples == seen[0] for samples in seen)
    assert len(seen[0]) == 2


def test_the_table_and_the_record(run: TinyRun, whole: MatrixResult) -> None:
    assert (whole.path / "matrix.md").read_text() == whole.table
    lines = whole.table.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    first = [row for row in rows if len(row) == 7][2:]
    assert [(row[0], row[1], row[2], row[6]) for row in first] == [
        ("plain", "3", "-", "finished"),
        ("no-conv", "3", "`model.use_conv: false`", "finished"),
        ("no-conv", "1", "`model.use_conv: false`", "finished"),
        ("all", "3", "`recovery.train: all`", "finished"),
    ]
    # 12 steps of 2 sequences of 16 tokens; what is read besides hangs on the seed.
    assert all(row[3].startswith("384 / ") for row in first)
    names = ["teacher", "plain", "no-conv", "no-conv-seed1", "*no-conv, 2 seeds: mean (range)*", "all"]
    for title in ("## passkey", "## perplexity"):
        begin = lines.index(title)
        found = [line.split("|")[1].strip() for line in lines[begin:] if line.startswith("| ")]
        assert found[2 : 2 + len(names)] == names
    record = json.loads((whole.path / "matrix.json").read_text())
    assert [entry["name"] for entry in record["runs"]] == [one.name for one in whole.runs]
    for entry in record["runs"]:
        log = [json.loads(line) for line in (whole.path / entry["name"] / "training_log.jsonl").open()]
        assert entry["training_s"] == pytest.approx(sum(row["seconds"] for row in log), abs=0.1)
        assert entry["read_tokens"] == sum(row["tokens"] for row in log)
        assert entry["trained_tokens"] == 384
        results = json.loads((whole.path / entry["name"] / "evaluation" / "student.json").read_text())
        assert entry["perplexity"][0]["perplexity"] == results["perplexity"][0]["perplexity"]
        assert entry["results"][0]["samples"] == 2
    assert Recipe.from_dict(record["recipe"]).matrix is not None
    assert any((whole.path / "report").glob("report.*"))


def test_a_second_call_finds_all_done(whole: MatrixResult, run: TinyRun) -> None:
    matrix = VARIANTS | {"no-conv": {"model.use_conv": False, "seeds": [3, 1]}}
    before = {path: path.read_bytes() for path in whole.path.glob("*/*.safetensors")}
    steps: list[str] = []
    again = train(run, "whole", recipe_of(run, matrix), progress=lambda title, *rest: steps.append(title))
    assert steps == []
    assert again.table == whole.table
    assert {path: path.read_bytes() for path in whole.path.glob("*/*.safetensors")} == before


def test_an_interrupted_matrix_goes_on_in_the_middle_of_a_variant(
    run: TinyRun, whole: MatrixResult, capfd: pytest.CaptureFixture[str]
) -> None:
    begun: list[str] = []

    def interrupt(title: str, done: int, total: int, shown: Any = None) -> None:
        if len(begun) == 2 and title.startswith("stage 2:") and done == 3:
            signal.raise_signal(signal.SIGINT)

    def note(text: str) -> None:
        if text.startswith("variant "):
            begun.append(text)

    with pytest.raises(KeyboardInterrupt):
        train(run, "broken", progress=interrupt, message=note)
    assert begun == ["variant 1 of 3: plain", "variant 2 of 3: no-conv"]
    messages: list[str] = []
    result = train(run, "broken", message=messages.append)
    assert "resuming from stage 2, step 3" in messages
    assert set(states(result).values()) == {"finished"}
    for name in ("plain", "no-conv", "all"):
        assert_same_student(result.path / name, whole.path / name)


def test_some_variants_and_other_seeds(run: TinyRun) -> None:
    first = train(run, "some", variants=["no-conv"], seeds=[3, 0])
    assert states(first) == {
        "plain": "not finished",
        "no-conv": "finished",
        "no-conv-seed0": "finished",
        "all": "not finished",
    }
    second = train(run, "some", variants=["plain"])
    assert states(second) == states(first) | {"plain": "finished"}
    assert "| no-conv | 0 |" in second.table
    recipe = Recipe.load(first.path / "no-conv-seed0" / "recipe.yaml")
    assert (recipe.name, recipe.seed, recipe.model.use_conv) == ("tiny/no-conv", 0, False)


def test_a_variant_that_overrides_exclude_stops_only_those_who_ask_for_it(run: TinyRun) -> None:
    before = train(run, "excluded", variants=["all"])
    result = train(run, "excluded", variants=["plain"], **{"teacher_tuning.steps": 1})
    expected = {"plain": "finished", "no-conv": "not finished", "all": "finished"}
    assert states(result) == expected
    record = json.loads((result.path / "matrix.json").read_text())
    assert {entry["name"]: entry["state"] for entry in record["runs"]} == expected
    earlier = next(entry for entry in before.table.splitlines() if entry.startswith("| all"))
    assert earlier in result.table
    with files_unchanged(result.path):
        for variants in (["all"], ["plain", "all"], None):
            with pytest.raises(ConfigurationError, match=r"^matrix\.all\.teacher_tuning\.steps: got 1; "):
                train(run, "excluded", variants=variants, **{"teacher_tuning.steps": 1})
    assert states(train(run, "excluded", variants=["no-conv"])) == dict.fromkeys(expected, "finished")


def test_one_that_fails_is_told_and_the_others_go_on(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch, whole: MatrixResult
) -> None:
    recovery = linearize_module.RecoveryModel

    def broken(student: Any, settings: Any) -> Any:
        if not hasattr(student.model.layers[0].self_attn, "q_conv"):
            raise ZeroDivisionError("by nought")
        return recovery(student, settings)

    messages: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(linearize_module, "RecoveryModel", broken)
        result = train(run, "failing", message=messages.append)
    assert states(result) == {"plain": "finished", "no-conv": "failed", "all": "finished"}
    assert [one.name for one in result.failed] == ["no-conv"]
    assert "no-conv FAILED: ZeroDivisionError: by nought" in messages
    assert "- no-conv: ZeroDivisionError: by nought" in result.table
    entry = json.loads((result.path / "matrix.json").read_text())["runs"][1]
    assert "in broken" in entry["trace"]
    # It is remembered while others are trained, and tried again when it is asked for.
    assert states(train(run, "failing", variants=["all"]))["no-conv"] == "failed"
    again = train(run, "failing")
    assert set(states(again).values()) == {"finished"}
    assert "Failed" not in again.table
    assert_same_student(again.path / "no-conv", whole.path / "no-conv")


def test_one_that_cannot_be_measured(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    assess = matrix_module.assess
    reported: list[dict[str, Any]] = []

    def broken(student: Path, *args: Any, **options: Any) -> str:
        if student.name == "no-conv":
            raise RuntimeError("out of memory")
        return assess(student, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(matrix_module, "assess", broken)
        patch.setattr(matrix_module, "write_report", lambda folder, payloads: reported.extend(payloads))
        result = train(run, "unmeasured", evaluate=True)
    assert [payload["model"] for payload in reported] == ["teacher", "plain", "all"]
    assert set(states(result).values()) == {"finished"}
    assert [(one.name, one.error) for one in result.failed] == [("no-conv", "RuntimeError: out of memory")]
    assert "| all |" in result.table.split("## passkey")[1]
    assert "| no-conv |" not in result.table.split("## passkey")[1]


def test_two_processes_share_the_work(run: TinyRun, whole: MatrixResult) -> None:
    """The second is started in the middle of the first one's first variant, and passes it over."""
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()
    children: list[Any] = []

    def second() -> None:
        queue.put(states(train(run, "shared")))

    def start(title: str, done: int, total: int, shown: Any = None) -> None:
        if not children:
            children.append(context.Process(target=second))
            children[0].start()
            children[0].join(120)

    first = train(run, "shared", progress=start)
    assert queue.get(timeout=60) == {"plain": "busy", "no-conv": "finished", "all": "finished"}
    assert set(states(first).values()) == {"finished"}
    for name in ("plain", "no-conv", "all"):
        assert_same_student(first.path / name, whole.path / name)


def test_two_processes_that_train_together(run: TinyRun, capfd: pytest.CaptureFixture[str]) -> None:
    matrix = {"plain": {}, "no-conv": {"model.use_conv": False}}
    options: dict[str, Any] = {"recovery.steps": 2, "recovery.carried_segments": 0}
    one = train(run, "one process", recipe_of(run, matrix), **options)

    def work(rank: int) -> None:
        train(run, "two together", recipe_of(run, matrix), message=print, **options)

    capfd.readouterr()
    run.in_two_processes(work, free_port())
    assert capfd.readouterr().out.count("variant 2 of 2: no-conv") == 1
    for name in matrix:
        expected = tensors_of(one.path / name)
        for key, tensor in tensors_of(run.place / "two together" / name).items():
            assert_near(tensor, expected[key], 1e-4, key, least_scale=0.1)


def test_two_processes_that_train_together_pass_one_over(
    run: TinyRun, capfd: pytest.CaptureFixture[str]
) -> None:
    """Together: one alone would train the next variant with what the other sends of this one."""
    matrix = {"plain": {}, "no-conv": {"model.use_conv": False}}
    settings = {"recovery.steps": 2, "recovery.carried_segments": 0}
    recipe = recipe_of(run, matrix).with_overrides(settings)
    out = run.place / "one over"
    training = out / "plain.training"
    training.mkdir(parents=True)
    _write_record(out, recipe, resolve_teacher(str(run.teacher)).fingerprint, [])

    def work(rank: int) -> None:
        train(run, "one over", recipe, message=print)

    with FileLock(training / "lock"):
        run.in_two_processes(work, free_port())
    told = capfd.readouterr().out
    assert told.count("plain: another process is training") == 1, told
    assert (out / "no-conv" / "model.safetensors").is_file()
    assert not (out / "plain").exists()
    one = train(run, "one over", recipe)
    assert states(one) == {"plain": "finished", "no-conv": "finished"}


def test_text_of_the_teacher_is_sampled_once_for_all(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import lawcat.distill.sampling as sampling
    import lawcat.distill.text as text_module

    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    made: list[str] = []
    sample_batch, encode = sampling._sample_batch, text_module.tokenize_documents
    monkeypatch.setattr(sampling, "_sample_batch", lambda *a: made.append("sampled") or sample_batch(*a))
    monkeypatch.setattr(
        text_module, "tokenize_documents", lambda *a, **k: made.append("tokenized") or encode(*a, **k)
    )
    data = [{"provider": "text", "path": str(run.text)}, {"provider": "teacher", "num_tokens": 160}]
    train(run, "sampled", recipe_of(run, data=data))
    assert sorted(made) == ["sampled", "tokenized"]


def test_a_recipe_without_a_matrix_from_several_seeds(run: TinyRun) -> None:
    recipe = tiny_recipe(run.text, attention_transfer__steps=0, recovery__steps=1)
    result = train(run, "seeds", recipe, seeds=[3, 4])
    assert states(result) == {"tiny": "finished", "tiny-seed4": "finished"}


def test_overrides_hold_for_all_variants(run: TinyRun) -> None:
    result = train(run, "overridden", recovery={"steps": 0}, **{"model.use_conv": True, "seed": 5})
    recipes = [Recipe.load(one.path / "recipe.yaml") for one in result.runs]
    assert [(r.recovery.steps, r.model.use_conv, r.seed) for r in recipes] == [(0, True, 5)] * 3


def test_a_place_that_is_taken(run: TinyRun, tmp_path: Path, whole: MatrixResult) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    shutil.copytree(whole.path / "plain", tmp_path / "student")
    with files_unchanged(tmp_path):
        for name in ("folder", "file", "student"):
            with pytest.raises(ConfigurationError, match="does not hold the students of a matrix"):
                linearize_matrix(str(run.teacher), tmp_path / name, recipe_of(run))
    other = save_teacher(tmp_path / "other", seed=1)
    with files_unchanged(whole.path), pytest.raises(ConfigurationError, match="of another teacher"):
        linearize_matrix(str(other), whole.path, recipe_of(run))


def test_a_place_where_another_process_begins(run: TinyRun) -> None:
    """Or was killed as it did."""
    out = run.place / "begun"
    out.mkdir()
    (out / ".matrix.json.tmp-1-00000000-0").write_text("{")
    settings = {"attention_transfer.steps": 1, "recovery.steps": 0}
    result = train(run, "begun", recipe_of(run, {"plain": {}}).with_overrides(settings))
    assert states(result) == {"plain": "finished"}


def test_a_changed_recipe_does_not_overwrite(run: TinyRun) -> None:
    train(run, "changed", variants=["plain"])
    result = train(run, "changed", variants=["plain"], **{"recovery.steps": 2})
    assert "holds a run with another recipe; nothing was overwritten" in str(result.failed[0].error)


def test_mistakes_are_found_before_anything_is_trained(run: TinyRun) -> None:
    recipe, before = recipe_of(run), sorted(run.place.iterdir())
    for options, message in [
        ({"variants": ["no-cnv"]}, r"no variant 'no-cnv' in the recipe 'tiny'; .*Did you mean 'no-conv'\?"),
        ({"variants": []}, "No variant is named; there are plain, no-conv, all"),
        ({"seeds": [1, 1]}, r"seeds: got \[1, 1\]; give at least one, each once"),
        ({"seeds": [-1]}, r"seeds: got \[-1\]"),
        ({"model.softmax_layers": [0, 1]}, "variant plain: model.softmax_layers names all 2 layers"),
        ({"model.feature_dim": 64}, r"variant plain: feature_dim=64 is more than twice head_dim=8"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            train(run, "mistaken", recipe, **options)
    with pytest.raises(ConfigurationError, match=r"a matrix of 3 variants.*recipe\.variant\('plain'\)"):
        linearize(str(run.teacher), run.place / "mistaken", recipe)
    assert sorted(run.place.iterdir()) == before


def test_the_plan_names_a_folder_by_variant_and_seed(run: TinyRun) -> None:
    matrix = {"seeds": [3, 0], "a": {}, "b": {"seeds": [7]}}
    _, runs = plan(recipe_of(run, matrix), Path("out"))
    assert [(one.name, one.seed, one.recipe.seed) for one in runs] == [
        ("a", 3, 3),
        ("a-seed0", 0, 0),
        ("b-seed7", 7, 7),
    ]
    _, runs = plan(recipe_of(run, matrix), Path("out"), variants=["b"], seeds=[3])
    assert [one.name for one in runs] == ["b"]


def test_the_table_of_seeds_by_hand() -> None:
    recipe = Recipe.from_dict({"name": "t", "matrix": {"a": {}, "b": {"recovery.lora_targets": ["q|p"]}}})

    def entry(
        name: str, variant: str, seed: int, accuracy: float | None, perplexity: float
    ) -> dict[str, Any]:
        cell = {"task": "passkey", "length": 1024, "accuracy": accuracy, "ci95": [0.1, 0.9]}
        return {
            "name": name,
            "variant": variant,
            "seed": seed,
            "overrides": {"data": ["x|y"]} if variant == "b" else {},
            "state": "finished",
            "error": None,
            "training_s": 61.4,
            "trained_tokens": 1000,
            "read_tokens": 2500,
            "last_losses": {"1": 0.25},
            "results": [cell],
            "perplexity": [{"length": 1024, "perplexity": perplexity}],
        }

    entries = [entry("a", "a", 0, 0.5, 10), entry("a-seed1", "a", 1, 0.8, 13), entry("b", "b", 0, None, 9)]
    expected = """# t

| variant | seed | differs in | tokens trained / read | training | stage-1 error | state |
| --- | ---: | --- | ---: | ---: | ---: | --- |
| a | 0 | - | 1,000 / 2,500 | 61 s | 0.250 | finished |
| a | 1 | - | 1,000 / 2,500 | 61 s | 0.250 | finished |
| b | 0 | `data: ["x\\|y"]` | 1,000 / 2,500 | 61 s | 0.250 | finished |

## passkey

Accuracy in percent, with Wilson's 95% interval.

| variant | 1K |
| --- | ---: |
| a | 50 [10, 90] |
| a-seed1 | 80 [10, 90] |
| *a, 2 seeds: mean (range)* | 65 (50 to 80) |
| b | crashed |

## perplexity

| variant | 1K |
| --- | ---: |
| a | 10.00 |
| a-seed1 | 13.00 |
| *a, 2 seeds: mean (range)* | 11.50 (10.00 to 13.00) |
| b | 9.00 |
"""
    assert matrix_table(recipe, entries, None) == expected
