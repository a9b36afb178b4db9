"""Layer importance against hybrids that were converted as such, and full logits in float64."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import on_one_processor, tiny_recipe
from torch import Tensor
from typer.testing import CliRunner

from comparison import assert_near
from lawcat import LawcatForCausalLM
from lawcat.cli.app import app
from lawcat.convert.initialize import convert, is_new_parameter
from lawcat.distill.layer_importance import answer_data, check_rankable, rank_layers
from lawcat.distill.linearize import linearize
from lawcat.distill.losses import hidden_divergence
from lawcat.distill.mixture import build_mixture
from lawcat.distill.recipe import Recipe
from lawcat.errors import ConfigurationError, DataError
from tiny_teachers import random_ids, save_teacher, spelling_tokenizer, tiny_teacher, write_text

LAYERS = 5
IDS = random_ids(3, 17)


def student_of(softmax_layers: tuple[int, ...] = (), **fields: Any) -> LawcatForCausalLM:
    """Return a hybrid whose linear layers have the same parameters, whichever layers they are."""
    student, _ = convert(
        tiny_teacher(num_hidden_layers=LAYERS, **fields), softmax_layers=softmax_layers, feature_dim=4
    )
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if is_new_parameter(name):
                seed = int.from_bytes(name.encode()[-24:], "little") % 2**31 + int(name.split(".")[2])
                noise = torch.Generator().manual_seed(seed)
                parameter.copy_(torch.randn(parameter.shape, generator=noise))
    return student


def divergence(softmax_layers: tuple[int, ...]) -> Tensor:
    """Return that of each sequence."""
    return token_divergence(softmax_layers).mean(-1)


def token_divergence(softmax_layers: tuple[int, ...]) -> Tensor:
    """Return that of each token, from whole logits of a model converted so."""
    with torch.no_grad():
        student = student_of(softmax_layers).double()(IDS).logits.log_softmax(-1)
        teacher = tiny_teacher(num_hidden_layers=LAYERS).double()(IDS).logits.log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1)


@pytest.mark.parametrize("batch_sequences", [1, 2, 8])
def test_against_hybrids_converted_as_such(batch_sequences: int) -> None:
    ranking = rank_layers(student_of(), IDS, num_softmax_layers=3, batch_sequences=batch_sequences)
    as_is = divergence(())
    assert ranking.divergence == pytest.approx(as_is.mean().item(), rel=1e-4)
    assert (ranking.num_sequences, ranking.num_tokens) == (3, 17)
    assert sorted(row.layer for row in ranking.layers) == list(range(LAYERS))
    for row in ranking.layers:
        restored = divergence((row.layer,))
        gain = as_is - restored
        others = tuple(layer for layer in range(LAYERS) if layer != row.layer)
        assert row.restored == pytest.approx(restored.mean().item(), rel=1e-4)
        assert row.linearized == pytest.approx(divergence(others).mean().item(), rel=1e-4)
        assert row.gain == pytest.approx(gain.mean().item(), rel=1e-3, abs=1e-5)
        assert row.gain_error == pytest.approx(gain.std().item() / 3**0.5, rel=1e-3, abs=1e-5)
    assert [row.gain for row in ranking.layers] == sorted((row.gain for row in ranking.layers), reverse=True)
    assert len({round(row.gain, 4) for row in ranking.layers}) == LAYERS

    kept: tuple[int, ...] = ()
    for chosen in ranking.chosen:
        candidates = {
            layer: divergence((*kept, layer)).mean().item() for layer in range(LAYERS) if layer not in kept
        }
        assert chosen.layer == min(candidates, key=candidates.__getitem__)
        assert chosen.divergence == pytest.approx(candidates[chosen.layer], rel=1e-4)
        kept = (*kept, chosen.layer)
    assert len(kept) == 3
    assert ranking.softmax_layers == sorted(kept)


def test_layers_that_are_softmax_already_stay_so() -> None:
    ranking = rank_layers(student_of((1, 3)), IDS, num_softmax_layers=1)
    assert sorted(row.layer for row in ranking.layers) == [0, 2, 4]
    assert ranking.divergence == pytest.approx(divergence((1, 3)).mean().item(), rel=1e-4)
    for row in ranking.layers:
        assert row.restored == pytest.approx(divergence((1, 3, row.layer)).mean().item(), rel=1e-4)
        others = tuple(layer for layer in range(LAYERS) if layer != row.layer)
        assert row.linearized == pytest.approx(divergence(others).mean().item(), rel=1e-4)


def test_the_student_is_left_as_it_was() -> None:
    student = student_of((1,), attention_dropout=0.5).train()
    kinds = student.present_layer_types()
    calls: list[tuple[int, int]] = []
    ranking = rank_layers(
        student,
        IDS,
        num_softmax_layers=3,
        progress=lambda title, done, total, shown: calls.append((done, total)),
    )
    assert ranking.divergence == pytest.approx(divergence((1,)).mean().item(), rel=1e-4)
    assert student.training
    assert student.present_layer_types() == kinds
    total = 1 + 2 * 4 + 3 + 2
    assert calls == [(done, total) for done in range(1, total + 1)]
    with pytest.raises(RuntimeError, match="stop"):
        rank_layers(student, IDS, progress=_stop, num_softmax_layers=0)
    assert student.training
    assert student.present_layer_types() == kinds


def _stop(*arguments: Any) -> None:
    raise RuntimeError("stop")


def test_only_tokens_of_weight_count() -> None:
    """Those of answers; and what is predicted at t is token t + 1."""
    weight = torch.zeros(IDS.shape)
    weight[0, 3], weight[1, 5:7], weight[2, 16] = 2.0, torch.tensor([1.0, 3.0]), 0.5
    weight[:, 0] = 7.0  # which nothing predicts
    ranking = rank_layers(student_of(), IDS, weight=weight, num_softmax_layers=2, batch_sequences=2)

    def at_answers(softmax_layers: tuple[int, ...]) -> Tensor:
        by_token = token_divergence(softmax_layers)
        return torch.stack([by_token[0, 2], (by_token[1, 4] + 3 * by_token[1, 5]) / 4, by_token[2, 15]])

    assert ranking.num_weighed == 4
    assert ranking.divergence == pytest.approx(at_answers(()).mean().item(), rel=1e-4)
    for row in ranking.layers:
        others = tuple(layer for layer in range(LAYERS) if layer != row.layer)
        assert row.linearized == pytest.approx(at_answers(others).mean().item(), rel=1e-4)
        assert row.restored == pytest.approx(at_answers((row.layer,)).mean().item(), rel=1e-4)
    kept = tuple(chosen.layer for chosen in ranking.chosen)
    assert ranking.chosen[-1].divergence == pytest.approx(at_answers(kept).mean().item(), rel=1e-4)
    assert "nats a token, at 4 tokens of answers in 3 x 17 tokens; " in ranking.table()
    plain = rank_layers(student_of(), IDS, num_softmax_layers=2)
    assert [row.layer for row in ranking.layers] != [row.layer for row in plain.layers]
    weight[1, 1:] = 0.0
    with pytest.raises(ConfigurationError, match=r"^A sequence has no token of weight: give each at least"):
        rank_layers(student_of(), IDS, weight=weight)


def test_softmax_in_some_layers_and_in_none() -> None:
    student = student_of()
    with torch.no_grad():
        plain = student(IDS).logits
        with student.softmax_in([4, 0]):
            assert [kind == "full_attention" for kind in student.present_layer_types()] == [
                layer in (0, 4) for layer in range(LAYERS)
            ]
            assert_near(student(IDS).logits, student_of((0, 4))(IDS).logits, 1e-6, "two layers")
            with student.softmax_in([]):
                assert student.present_layer_types().count("full_attention") == 2
        assert torch.equal(student(IDS).logits, plain)


def test_a_single_sequence_has_no_error() -> None:
    ranking = rank_layers(student_of(), IDS[:1], num_softmax_layers=0)
    assert all(math.isnan(row.gain_error) for row in ranking.layers)
    found = ranking.to_json()
    assert {row["gain_error"] for row in found["layers"]} == {None}
    json.dumps(found, allow_nan=False)
    assert "+-" not in ranking.table()
    assert "model.softmax_layers" not in ranking.table()


def test_the_table() -> None:
    ranking = rank_layers(student_of(), IDS, num_softmax_layers=2)
    first = replace(ranking.layers[0], layer=7, linearized=0.25, restored=1.5, gain=0.0625, gain_error=0.5)
    ranking = replace(ranking, divergence=1.0, layers=(first,), num_sequences=16, num_tokens=1024)
    chosen = tuple(replace(c, layer=i, divergence=0.5) for i, c in zip((9, 3), ranking.chosen, strict=True))
    assert replace(ranking, chosen=chosen).table().splitlines() == [
        "divergence from the teacher's next tokens, nats a token, over 16 x 1024 tokens; 1.0000 as the "
        "student is",
        "",
        "layer   alone linear   alone softmax             gain",
        "    7         0.2500          1.5000     0.0625 +- 0.5000",
        "",
        "chosen one after another, with the divergence then: 9 (0.5000), 3 (0.5000)",
        "model.softmax_layers: [3, 9]",
    ]


@pytest.mark.parametrize("count", [-1, 5, 6])
def test_more_layers_than_there_are(count: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{count} softmax layers cannot be chosen.* has 5 linear"):
        rank_layers(student_of(), IDS, num_softmax_layers=count)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_divergence_in_pieces(tokens: int) -> None:
    noise = torch.Generator().manual_seed(0)
    mine, theirs, head = (
        torch.randn(*shape, generator=noise) for shape in ((tokens, 8), (tokens, 8), (30, 8))
    )
    found = hidden_divergence(mine, theirs, head)
    p, q = (torch.softmax(hidden.double() @ head.double().T, -1) for hidden in (theirs, mine))
    assert_near(found, (p * (p / q).log()).sum(-1), 1e-5)
    assert torch.equal(hidden_divergence(mine[None], theirs[None], head), found[None])


TASKS = {
    "name": "tasks",
    "seed": 4,
    "data": [
        {"provider": "text", "path": "none.txt"},
        {"provider": "passkey", "min_sample_tokens": 600},
        {"provider": "needle", "min_sample_tokens": 600, "value_kinds": ["words"], "answer_weight": 3.0},
    ],
}


def test_samples_of_a_recipe_s_tasks(tmp_path: Path) -> None:
    tokenizer, prose = spelling_tokenizer(), write_text(tmp_path / "prose.txt")
    recipe, sizes = Recipe.from_dict(TASKS), {"num_sequences": 6, "num_tokens": 900}
    data = answer_data(recipe, tokenizer, prose=[str(prose)], **sizes)
    assert data.input_ids.shape == data.weight.shape == (6, 900)
    assert data.record["has_task_data"]
    assert [source["name"] for source in data.record["sources"]] == ["passkey", "needle"]
    for ids, weight in zip(data.input_ids, data.weight, strict=True):
        is_passkey = weight.max() == 8
        assert set(weight.tolist()) == ({0.0, 8.0} if is_passkey else {0.0, 3.0})
        text = tokenizer.decode(ids)
        answer = tokenizer.decode(ids[weight > 0]).replace(tokenizer.eos_token, "").strip(" .")
        assert answer
        assert text.count(answer) > 1, answer
        assert is_passkey or "w3" in text
    assert {weight.max().item() for weight in data.weight} == {3.0, 8.0}
    for other in (
        answer_data(recipe, tokenizer, prose=[str(prose)], seed=1, **sizes),
        answer_data(replace(recipe, seed=5), tokenizer, prose=[str(prose)], **sizes),
        build_mixture(
            recipe.with_overrides({"data.0.path": str(prose), "sequence_length": 900}), tokenizer
        ).batch(0, 24),
    ):
        for ids in data.input_ids:
            assert not (other.input_ids == ids).all(-1).any()
    with pytest.raises(DataError, match=r"There is no file none\.txt"):
        answer_data(recipe, tokenizer, **sizes)
    with pytest.raises(ConfigurationError, match=r"recipe 'text only' has no task data.*or rank by text"):
        answer_data(Recipe.from_dict({"name": "text only"}), tokenizer, **sizes)
    with pytest.raises(ConfigurationError, match=r"min_sample_tokens: got 600; it must be at most"):
        answer_data(recipe, tokenizer, num_sequences=1, num_tokens=500)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, module_patch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("ranked")
    on_one_processor(module_patch, folder / "cache")
    save_teacher(folder / "teacher", tie_word_embeddings=True, num_hidden_layers=3)
    write_text(folder / "text.txt")
    for name, steps in (("stage 1", 0), ("stage 2", 1)):
        recipe = tiny_recipe(folder / "text.txt", recovery__steps=steps, attention_transfer__steps=2)
        linearize(str(folder / "teacher"), folder / name, recipe)
    save_teacher(folder / "speller", spells=True, tie_word_embeddings=True, num_hidden_layers=3)
    recipe = tiny_recipe(folder / "text.txt", recovery__steps=0, attention_transfer__steps=1)
    linearize(str(folder / "speller"), folder / "spells", recipe)
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["rank-layers", *map(str, arguments)])


def test_the_command(place: Path) -> None:
    found = {}
    for student in ("stage 1", "stage 1/adapter"):
        output = place / "ranking.json"
        options = ["--windows", 5, "--length", 32, "--choose", 1, "--output", output]
        result = run(place / student, "--text", place / "text.txt", *options)
        assert result.exit_code == 0, result.stderr
        assert "over 5 x 32 tokens" in result.stdout
        record = json.loads(output.read_text())
        assert result.stdout.strip().endswith(f"model.softmax_layers: {record['softmax_layers']}")
        assert "layers compared: 7/7" in result.stderr
        assert len(record["layers"]) == 3
        assert record["text"][0]["name"] == "text.txt"
        found[student] = record["layers"]
    assert found["stage 1"] == found["stage 1/adapter"]
    other = run(place / "stage 1", "--text", place / "text.txt", *options[:-2], "--seed", 1)
    assert other.stdout != result.stdout
    # No more pieces than the text has.
    assert (
        "over 3 x 600 tokens"
        in run(place / "stage 1", "--text", place / "text.txt", "--length", 600, "--choose", 0).stdout
    )


def test_the_command_ranks_by_answers(place: Path) -> None:
    recipe, output = place / "tasks.yaml", place / "by answers.json"
    recipe.write_text(Recipe.from_dict(TASKS).to_yaml(), encoding="utf-8")
    options = ["--windows", 3, "--length", 900, "--choose", 1, "--output", output]
    result = run(place / "spells", "--data", recipe, "--text", place / "text.txt", *options)
    assert result.exit_code == 0, result.stderr
    record = json.loads(output.read_text())
    assert record["recipe"] == "tasks"
    assert [source["provider"] for source in record["data"]["sources"]] == ["passkey", "needle"]
    assert "text" not in record
    assert f"at {record['num_weighed']} tokens of answers in 3 x 900 tokens" in result.stdout
    assert 3 < record["num_weighed"] < 200
    assert "There is no file none.txt" in run(place / "spells", "--data", recipe, *options).stderr
    neither = run(place / "spells")
    assert neither.exit_code == 2
    assert "Nothing to read: give --text, or --data with a recipe to rank by answers." in neither.stderr


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("stage 2", "has been through stage 2"),
        (
            "stage 2/adapter",
            "OUT --recipe ... --set teacher_tuning.steps=0 --set recovery.steps=0 --no-evaluate",
        ),
        ("teacher", "is a teacher; give a student"),
        ("nothing", "nothing"),
    ],
)
def test_models_that_cannot_be_ranked(place: Path, student: str, message: str) -> None:
    result = run(place / student, "--text", place / "text.txt", "--device", "cpu")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_texts_that_cannot_be_read(place: Path) -> None:
    assert "There is no file none.txt" in run(place / "stage 1", "--text", "none.txt").stderr
    result = run(place / "stage 1", "--text", place / "text.txt", "--length", 3000)
    assert "holds 2001 tokens, fewer than one sequence of 3000" in result.stderr
    assert run(place / "stage 1").exit_code == 2


def test_a_folder_without_a_record_is_taken(tmp_path: Path) -> None:
    check_rankable(tmp_path)
    for content in ("", "[]", "{}", '{"stages": 1}', '{"stages": {"1": {}}}'):
        (tmp_path / "lawcat_run.json").write_text(content)
        check_rankable(tmp_path)
    (tmp_path / "lawcat_run.json").write_text('{"stages": {"1": {}, "2": {}}}')
    with pytest.raises(ConfigurationError, match="has been through stage 2"):
        check_rankable(tmp_path)


def test_what_is_chosen_can_be_set(place: Path) -> None:
    recipe = tiny_recipe(place / "text.txt")
    for pair in itertools.combinations(range(3), 2):
        text = ", ".join(map(str, pair))
        assert recipe.with_overrides({"model.softmax_layers": f"[{text}]"}).model.softmax_layers == pair
        assert recipe.with_overrides({"model.softmax_layers": text}).model.softmax_layers == pair
