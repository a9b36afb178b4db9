"""The recipe: round trips, refusals in the user's own spelling, overrides."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lawcat.convert.initialize import OPERATOR_FIELDS
from lawcat.distill.recipe import (
    AttentionTransferSettings,
    DataSource,
    EvaluationSettings,
    ModelSettings,
    Recipe,
    RecoverySettings,
    TeacherTuningSettings,
)
from lawcat.errors import ConfigurationError

positive = st.floats(min_value=1e-9, max_value=1e6)
texts = st.text(min_size=1, max_size=20).filter(str.strip)
weights = positive


def sources() -> st.SearchStrategy[DataSource]:
    common: dict[str, Any] = {"weight": weights, "name": st.none() | texts}
    return st.one_of(
        st.builds(
            DataSource,
            provider=st.just("text"),
            path=texts | st.lists(texts, min_size=1, max_size=3).map(tuple),
            text_field=texts,
            **common,
        ),
        st.builds(
            DataSource,
            provider=st.just("hub"),
            dataset=texts,
            subset=st.none() | texts,
            split=texts,
            **common,
        ),
        st.builds(
            DataSource,
            provider=st.just("passkey"),
            answer_weight=st.none() | positive,
            answer_kl_weight=st.none() | st.floats(0, 9),
            min_sample_tokens=st.integers(1, 16),
            **common,
        ),
        st.builds(
            DataSource,
            provider=st.just("babilong"),
            noise_shares=st.none() | st.tuples(positive, positive, st.just(0.0)),
            label_weight=st.none() | positive,
            min_sample_tokens=st.integers(1, 16),
            **common,
        ),
        st.builds(
            DataSource,
            provider=st.just("needle"),
            path=texts,
            value_kinds=st.lists(st.sampled_from(["numbers", "words", "uuids"]), min_size=1).map(tuple),
            haystacks=st.lists(st.sampled_from(["prose", "noise", "needle"]), min_size=1).map(tuple),
            num_keys=st.lists(st.integers(1, 4), min_size=1).map(tuple),
            min_sample_tokens=st.just(16),
            **common,
        ),
        st.builds(DataSource, provider=st.just("teacher"), top_p=st.floats(0.01, 1), **common),
    )


def recipes() -> st.SearchStrategy[Recipe]:
    steps = st.integers(20, 10_000)
    tuning = st.builds(
        TeacherTuningSettings,
        steps=st.sampled_from([0, 20]),
        learning_rate=positive,
        schedule=st.sampled_from(["cosine", "constant"]),
    )

    def tuned(recipe: Recipe, tuning: TeacherTuningSettings) -> Recipe:
        fits = recipe.recovery.train == "lora"
        return dataclasses.replace(recipe, teacher_tuning=tuning) if fits else recipe

    base = st.builds(
        Recipe,
        name=texts,
        description=st.text(max_size=30),
        seed=st.integers(0, 2**63),
        sequence_length=st.integers(16, 10_000),
        precision=st.sampled_from(["auto", "float32", "bfloat16"]),
        model=st.builds(
            ModelSettings,
            softmax_layers=st.lists(st.integers(0, 99), unique=True, max_size=3).map(tuple),
            use_conv=st.none() | st.booleans(),
            gate=st.sampled_from([None, "head", "channel"]),
        ),
        data=st.lists(sources(), min_size=1, max_size=3).map(tuple),
        attention_transfer=st.builds(
            AttentionTransferSettings,
            steps=steps,
            learning_rate=positive,
            betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
            schedule=st.sampled_from(["cosine", "linear", "trapezoid", "constant"]),
        ),
        recovery=st.one_of(
            st.builds(RecoverySettings, steps=steps, lora_rank=st.integers(1, 99), kl_weight=positive),
            st.builds(RecoverySettings, train=st.just("all"), kl_weight=st.just(0.0), answer_weight=positive),
        ),
    )
    return st.builds(tuned, base, tuning)


@given(recipes())
def test_yaml_round_trip_is_exact(recipe: Recipe) -> None:
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.with_overrides({}) == recipe


@pytest.mark.parametrize("name", Recipe.shipped())
def test_every_shipped_recipe_parses(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    names = recipe.matrix.names if recipe.matrix else ()
    variants = [recipe.variant(variant) for variant in names]
    for variant_name, variant in zip(names, variants, strict=True):
        assert variant.matrix is None
        assert Recipe.from_yaml(variant.to_yaml()) == variant
        # What is compared is measured alike, and sees as many tokens, unless these are what is varied.
        assert variant.evaluation == recipe.evaluation
        longer = name == "comparison" and variant_name.endswith("-from-tuned-teacher")
        base = recipe.variant("lawcat-from-tuned-teacher") if longer else recipe
        for stage in ("attention_transfer", "recovery")[variant_name.endswith("-stage-1") :]:
            mine, theirs = getattr(variant, stage), getattr(base, stage)
            assert (mine.steps, mine.batch_sequences) == (theirs.steps, theirs.batch_sequences)
    assert len({variant.fingerprint() for variant in variants}) == len(variants)


def commands_in(comments: str) -> list[list[str]]:
    """Return the words of each `lawcat linearize` that a recipe's comments show."""
    text = re.sub(r"^# ?", "", comments, flags=re.MULTILINE).replace("\\\n", " ")
    return [
        shlex.split(line)[2:] for line in text.splitlines() if line.strip().startswith("lawcat linearize ")
    ]


@pytest.mark.parametrize("name", Recipe.shipped())
def test_the_commands_in_a_recipe_s_comments_are_valid(name: str) -> None:
    text = resources.files("lawcat.recipes").joinpath(f"{name}.yaml").read_text()
    commands = commands_in("\n".join(line for line in text.splitlines() if line.startswith("#")))
    for words in commands:
        options = [(word, words[i + 1]) for i, word in enumerate(words[:-1]) if word.startswith("--")]
        recipe = Recipe.load(dict(options)["--recipe"])
        assert recipe.name == name
        overrides = dict(value.split("=", 1) for option, value in options if option == "--set")
        variants = dict(options).get("--variant")
        for variant in variants.split(",") if variants else []:
            recipe.variant(variant).with_overrides(overrides)
        recipe.with_overrides(overrides)
    assert commands or name == "quick"


def test_the_ablations_change_one_thing_each() -> None:
    recipe = Recipe.load("ablations")
    assert recipe.matrix is not None
    changes = {}
    base = recipe.variant("lawcat").to_dict()
    for name in recipe.matrix.names:
        found = recipe.variant(name).to_dict()
        changes[name] = {
            f"{part}.{key}"
            for part in ("model", "attention_transfer", "recovery")
            for key in {*base[part], *found[part]}
            if base[part].get(key) != found[part].get(key)
        }
    lora = {"recovery.lora_rank", "recovery.lora_alpha", "recovery.lora_targets"}
    assert changes == {
        "lawcat": set(),
        "no-conv": {"model.use_conv"},
        "no-normalizer": {"model.use_normalizer"},
        "rope": {"model.linear_rope"},
        "window-64": {"model.sliding_window"},
        "gate-per-head": {"model.gate"},
        "no-gate": {"model.gate"},
        "untied-map": {"model.feature_map"},
        "kv-state": {"model.state_heads"},
        "all-weights": {"recovery.train", "recovery.learning_rate"} | lora,
        "lora-on-mlps": {"recovery.lora_targets"},
        "no-kl": {"recovery.kl_weight", "recovery.kl_temperature"},
        "nothing-carried": {"recovery.carried_segments", "recovery.carried_share"},
    }
    assert recipe.variant("no-gate").model.gate == "none"


def test_lolcats_in_the_comparison_is_the_recipe_of_that_name() -> None:
    comparison, lolcats = Recipe.load("comparison"), Recipe.load("lolcats")
    theirs = comparison.variant("lolcats")
    shares = [dataclasses.replace(source, carried_weight=None) for source in theirs.data]
    assert (
        dataclasses.replace(theirs, name="lolcats", description=lolcats.description, data=tuple(shares))
        == lolcats
    )
    # With all of our training, only the operator differs from ours.
    tuned, ours = comparison.variant("lolcats-tuned"), comparison.variant("lawcat")
    assert tuned.model == theirs.model
    assert dataclasses.replace(tuned, name=ours.name, model=ours.model) == ours
    # 100 and 220 steps of 16 sequences, and as many where a state is carried over.
    recovery = ours.recovery
    assert (recovery.carried_sequences or recovery.batch_sequences) == recovery.batch_sequences
    steps = ours.attention_transfer.steps + recovery.steps
    assert steps * recovery.batch_sequences * ours.sequence_length == 5_242_880


def test_both_are_compared_from_a_tuned_teacher_too() -> None:
    comparison, plain = Recipe.load("comparison"), Recipe.load("smollm2-135m-longcontext")
    ours, theirs = (comparison.variant(f"{name}-from-tuned-teacher") for name in ("lawcat", "lolcats"))
    assert ours.data == theirs.data
    assert ours.teacher_tuning == theirs.teacher_tuning == plain.teacher_tuning
    stories = dataclasses.replace(plain.data[-1], weight=3.0)
    assert ours.data[-1] == stories
    # Their two stages and operator, for more steps and with the error at answers.
    alone = comparison.variant("lolcats")
    stage_1 = dataclasses.replace(alone.attention_transfer, steps=200, answer_weight=1.0)
    assert (theirs.model, theirs.attention_transfer) == (alone.model, stage_1)
    assert theirs.recovery == dataclasses.replace(alone.recovery, steps=600)
    tuned = comparison.variant("lolcats-tuned-from-tuned-teacher")
    assert dataclasses.replace(tuned, name=ours.name, model=ours.model) == ours


def test_the_promised_recipes_are_shipped() -> None:
    assert {"quick", "smollm2-135m-short"} <= set(Recipe.shipped())
    short = Recipe.load("smollm2-135m-short")
    task_share = sum(s.weight for s in short.data if s.is_task) / sum(s.weight for s in short.data)
    assert task_share == 0.5


SMOLLM2 = ("smollm2-135m", "smollm2-135m-longcontext", "smollm2-135m-hybrid")


def tokens_of(recipe: Recipe) -> tuple[float, float]:
    """Return the tokens that a run trains on, and those that it reads besides, on average over seeds."""
    recovery, share = recipe.recovery, recipe.recovery.carried_share
    assert recovery.carried_segments == 15
    assert recovery.carried_sequences
    sequences = recovery.steps * ((1 - share) * recovery.batch_sequences + share * recovery.carried_sequences)
    for stage in (recipe.teacher_tuning, recipe.attention_transfer):
        sequences += stage.steps * stage.batch_sequences
    before = recovery.steps * share * recovery.carried_sequences * (1 + 3 + 7 + 15) / 4
    return sequences * recipe.sequence_length, before * recipe.sequence_length


@pytest.mark.parametrize("name", SMOLLM2)
def test_the_recipes_of_smollm2_keep_to_their_budget(name: str) -> None:
    recipe = Recipe.load(name)
    trained, read = tokens_of(recipe)
    assert trained + read < 150e6
    assert f"{trained / 1e6:.0f} million tokens trained" in recipe.description or name.endswith("hybrid")
    assert recipe.sequence_length == 1024
    assert any(source.is_task for source in recipe.data) == (name != "smollm2-135m")

    # Hidden 576, keys and values 192, MLP 1,536, 30 layers; 35,520 new parameters a layer.
    recovery = recipe.recovery
    assert recovery.lora_targets == (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    factors = 30 * recovery.lora_rank * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    new = 30 * 35_520
    assert 2 * factors + 4 * new < 12e6  # shipped: factors of 16 bits
    assert 3 * 4 * (factors + new) < 64 * 2**20  # a checkpoint: weights and two moments


def test_the_hybrid_is_the_long_context_recipe_with_softmax_layers() -> None:
    hybrid, plain = Recipe.load("smollm2-135m-hybrid"), Recipe.load("smollm2-135m-longcontext")
    assert len(hybrid.model.softmax_layers) == 4
    assert (
        dataclasses.replace(hybrid, name=plain.name, description=plain.description, model=plain.model)
        == plain
    )


STORIES: dict[str, Any] = {"tasks": ("qa1", "qa2", "qa2", "qa3", "qa3"), "noise_shares": (2.0, 2.0, 4.0)}


def test_the_search_changes_little_at_a_time() -> None:
    search, plain = Recipe.load("search-longcontext"), Recipe.load("smollm2-135m-longcontext")
    assert search.matrix is not None
    base = search.variant("base")
    # What the long-context recipe became.
    tuned = search.variant("lookups-tuned-teacher")
    *others, stories = tuned.data
    assert (*others, dataclasses.replace(stories, **STORIES)) == plain.data
    assert tuned.attention_transfer.answer_weight == plain.attention_transfer.answer_weight
    assert tuned.teacher_tuning.steps == plain.teacher_tuning.steps
    assert base.recovery.lora_targets == plain.recovery.lora_targets
    for name in search.matrix.names[1:]:
        found = search.variant(name)
        before = search.variant("lookups") if name.startswith("lookups-") else base
        changed = [
            field.name
            for part in ("model", "teacher_tuning", "attention_transfer", "recovery")
            for field in dataclasses.fields(getattr(before, part))
            if getattr(getattr(before, part), field.name) != getattr(getattr(found, part), field.name)
        ]
        changed += ["data"] * (found.data != before.data)
        # Without an adapter, its settings are gone too.
        assert 1 <= len(changed) <= (5 if name in ("mlps-in-full", "lookups-all-weights") else 3), name


def test_the_operator_can_be_set_and_only_what_is_set_goes_on() -> None:
    names = {field.name for field in dataclasses.fields(ModelSettings)}
    assert names == {*OPERATOR_FIELDS, "softmax_layers"}
    assert ModelSettings().config_fields() == {}
    assert ModelSettings(use_conv=False, softmax_layers=(1,)).config_fields() == {"use_conv": False}


def test_defaults() -> None:
    recipe = Recipe(name="x")
    assert [source.provider for source in recipe.data] == ["teacher"]
    assert recipe.attention_transfer.learning_rate == 5e-3
    assert recipe.recovery.learning_rate == 1e-3
    assert recipe.recovery.new_parameter_learning_rate == 2e-3
    assert recipe.recovery.lora_rank == 16
    assert recipe.attention_transfer.max_grad_norm == 1.0
    assert (recipe.teacher_tuning.steps, recipe.teacher_tuning.learning_rate) == (0, 1e-3)


def test_recipes_without_teacher_tuning_are_what_they_were() -> None:
    recipe = Recipe(name="x")
    assert "teacher_tuning" not in recipe.to_dict()
    tuned = recipe.with_overrides({"teacher_tuning.steps": "20"})
    assert tuned.to_dict()["teacher_tuning"]["steps"] == 20
    assert "gate_penalty" not in tuned.to_dict()["teacher_tuning"]
    assert Recipe.from_yaml(tuned.to_yaml()) == tuned
    assert tuned.fingerprint() != recipe.fingerprint()
    assert tuned.with_overrides({"teacher_tuning.steps": 0}) == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"recovery": {"learning_rte": 1}},
            r"^recovery\.learning_rte: unknown key\. Did you mean 'learning_rate'\?",
        ),
        ({"recvery": {}}, r"^recvery: unknown key\. Did you mean 'recovery'\?"),
        ({"data": [{"provider": "text", "pat": "x"}]}, r"^data\.0\.pat: unknown key\. Did you mean 'path'\?"),
        (
            {"data": [{"provider": "txt"}]},
            r"^data\.0\.provider: got 'txt'; use one of 'text'.*Did you mean 'text'\?",
        ),
        ({"data": []}, r"^data: got \[\]"),
        ({"data": {"provider": "teacher"}}, r"^data: got .*give a list"),
        ({"data": [{}]}, r"^data\.0\.provider: is missing"),
        ({"data": [{"provider": "text"}]}, r"^data\.0\.path: is missing"),
        ({"data": [{"provider": "hub"}]}, r"^data\.0\.dataset: is missing"),
        ({"data": [{"provider": "passkey", "weight": 0}]}, r"^data\.0\.weight: got 0\.0; it must be above 0"),
        ({"data": [{"provider": "passkey", "weight": -1}]}, r"^data\.0\.weight: got -1\.0"),
        (
            {"data": [{"provider": "passkey", "path": "x"}]},
            r"^data\.0\.path: got 'x', which is for provider text or needle",
        ),
        (
            {"data": [{"provider": "passkey", "split": "train"}]},
            r"^data\.0\.split: got 'train', which is for",
        ),
        (
            {"data": [{"provider": "needle"}]},
            r"^data\.0\.path: is missing; without a source of provider text",
        ),
        (
            {"data": [{"provider": "passkey", "min_sample_tokens": 65}], "sequence_length": 64},
            r"^data\.0\.min_sample_tokens: got 65; it must be at most sequence_length, which is 64",
        ),
        ({"data": [{"provider": "teacher", "top_p": 1.5}]}, r"^data\.0\.top_p"),
        (
            {"recovery": {"train": "all", "lora_rank": 16}},
            r"^recovery\.lora_rank: got 16, which contradicts train: all",
        ),
        ({"recovery": {"train": "all", "lora_targets": ["x"]}}, r"^recovery\.lora_targets"),
        ({"recovery": {"train": "all", "full_targets": ["x"]}}, r"^recovery\.full_targets: .* contradicts"),
        (
            {"recovery": {"full_targets": ["up_proj", "q_proj"]}},
            r"^recovery\.full_targets: got 'q_proj'; lora_targets names it too",
        ),
        ({"recovery": {"full_learning_rate": 1e-4}}, r"^recovery\.full_learning_rate: .* without full_tar"),
        (
            {"recovery": {"full_targets": ["up_proj"], "full_learning_rate": 0}},
            r"^recovery\.full_learning_rate: got 0\.0; it must be above 0",
        ),
        ({"recovery": {"train": "loar"}}, r"^recovery\.train: .*Did you mean 'lora'\?"),
        ({"recovery": {"kl_weight": 0, "kl_temperature": 2}}, r"^recovery\.kl_temperature: .*no effect"),
        (
            {"recovery": {"kl_weight": 0, "cross_entropy_weight": 0}},
            r"^recovery\.cross_entropy_weight: .*no loss",
        ),
        ({"recovery": {"kl_weight": -1}}, r"^recovery\.kl_weight: got -1\.0"),
        ({"recovery": {"answer_weight": 0}}, r"^recovery\.answer_weight: got 0\.0"),
        ({"recovery": {"betas": [0.9]}}, r"^recovery\.betas: got \[0\.9\]; give a list of 2"),
        ({"recovery": {"betas": [0.9, 1.0]}}, r"^recovery\.betas"),
        ({"recovery": {"lora_rank": 1.5}}, r"^recovery\.lora_rank: got 1\.5; give a whole number"),
        ({"recovery": {"lora_rank": True}}, r"^recovery\.lora_rank: got True"),
        ({"recovery": {"learning_rate": True}}, r"^recovery\.learning_rate: got True"),
        (
            {"recovery": {"learning_rate": "fast"}},
            r"^recovery\.learning_rate: got 'fast'; give a finite number",
        ),
        ({"recovery": {"learning_rate": float("nan")}}, r"^recovery\.learning_rate"),
        ({"recovery": {"learning_rate": float("inf")}}, r"^recovery\.learning_rate"),
        ({"recovery": {"lora_targets": "q_proj"}}, r"^recovery\.lora_targets: got 'q_proj'; give a list"),
        ({"recovery": {"lora_targets": [1]}}, r"^recovery\.lora_targets\.0: got 1; give text"),
        ({"recovery": 3}, r"^recovery: got 3; give a mapping"),
        ({"recovery": None}, r"^recovery: got None; give a mapping"),
        (
            {"teacher_tuning": {"steps": 20}, "recovery": {"train": "all"}},
            r"^teacher_tuning\.steps: got 20; it trains the LoRA factors of recovery, which has train: all; "
            "set it to 0, or recovery to train: lora with steps above 0",
        ),
        (
            {"teacher_tuning": {"steps": 20}, "recovery": {"steps": 0}},
            r"^teacher_tuning\.steps: got 20; it trains the LoRA factors of recovery, which has steps: 0",
        ),
        (
            {"teacher_tuning": {"gate_penalty": 0.1}},
            r"^teacher_tuning\.gate_penalty: got 0\.1, which is for stages that run linear attention",
        ),
        (
            {"teacher_tuning": {"steps": 20}, "recovery": {"cross_entropy_weight": 0}},
            r"^teacher_tuning\.steps: got 20; with recovery\.cross_entropy_weight: 0 the teacher would learn "
            "to be what it is; set it to 0",
        ),
        (
            {"attention_transfer": {"answer_weight": 1}},
            r"^attention_transfer\.answer_weight: got 1\.0; without a source of provider passkey, needle or "
            "babilong there are no answers; set it to null",
        ),
        ({"teacher_tuning": {"lora_rank": 2}}, r"^teacher_tuning\.lora_rank: unknown key"),
        ({"teacher_tuning": {"steps": -1}}, r"^teacher_tuning\.steps: got -1; it must be 0 or above"),
        ({"attention_transfer": {"steps": -1}}, r"^attention_transfer\.steps: got -1; it must be 0 or above"),
        (
            {"attention_transfer": {"steps": 5, "warmup_steps": 5}},
            r"^attention_transfer\.warmup_steps: got 5.*steps",
        ),
        (
            {"attention_transfer": {"schedule": "constant", "min_learning_rate_ratio": 0.1}},
            r"^attention_transfer\.min_learning_rate_ratio: .*schedule: constant",
        ),
        ({"attention_transfer": {"batch_sequences": 0}}, r"^attention_transfer\.batch_sequences"),
        ({"attention_transfer": {"max_grad_norm": 0}}, r"^attention_transfer\.max_grad_norm"),
        ({"checkpoint": {"every_steps": 0}}, r"^checkpoint\.every_steps"),
        ({"checkpoint": {"keep": 0}}, r"^checkpoint\.keep"),
        ({"model": {"softmax_layers": [-1]}}, r"^model\.softmax_layers: .*count from 0"),
        ({"model": {"softmax_layers": [1, 1]}}, r"^model\.softmax_layers: .*once"),
        ({"model": {"gate": "chanel"}}, r"^model\.gate: .*'channel'"),
        ({"model": {"conv_kernel_size": 1}}, r"^model\.conv_kernel_size: .*at least 2"),
        ({"model": {"use_conv": "yes"}}, r"^model\.use_conv: got 'yes'; give true or false"),
        (
            {"evaluation": {"tasks": ["passkeys"]}},
            r"^evaluation\.tasks\.0: .*'passkeys'.*Did you mean 'passkey'\?",
        ),
        ({"evaluation": {"lengths": []}}, r"^evaluation\.lengths: .*at least one length"),
        ({"evaluation": {"lengths": [0]}}, r"^evaluation\.lengths"),
        ({"evaluation": {"lengths": [64, 64]}}, r"^evaluation\.lengths"),
        ({"sequence_length": 8}, r"^sequence_length: got 8"),
        ({"seed": -1}, r"^seed"),
        ({"name": " "}, r"^name"),
        ({"name": 12}, r"^name: got 12; give text \(in quotes"),
        ({"precision": "fp16"}, r"^precision: got 'fp16'; use one of 'auto', 'float32', 'bfloat16'"),
        ({1: 2}, r"^1: unknown key"),
    ],
)
def test_refusals_name_the_dotted_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Recipe.from_dict({"name": "x", **values})


def test_answers_count_where_there_are_any() -> None:
    weighed: dict[str, Any] = {"name": "x", "attention_transfer": {"answer_weight": 1}}
    recipe = Recipe.from_dict(weighed | {"data": [{"provider": "teacher"}, {"provider": "passkey"}]})
    assert recipe.attention_transfer.answer_weight == 1
    with pytest.raises(ConfigurationError, match=r"^attention_transfer\.answer_weight: got 1\.0; without"):
        recipe.with_overrides({"data": [{"provider": "teacher"}]})
    overrides = {"data": [{"provider": "teacher"}], "attention_transfer.answer_weight": "null"}
    assert recipe.with_overrides(overrides).attention_transfer.answer_weight is None
    for weight, steps in ((0, 100), (1, 0)):  # as a variant beside others has it
        Recipe.from_dict({"name": "x", "attention_transfer": {"answer_weight": weight, "steps": steps}})


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(ConfigurationError, match=r"^steps: got -3"):
        RecoverySettings(steps=-3)
    with pytest.raises(ConfigurationError, match=r"^lora_rank: got 8"):
        RecoverySettings(train="all", lora_rank=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        RecoverySettings().steps = 3  # type: ignore[misc]
    assert EvaluationSettings(lengths=[64]).lengths == (64,)  # type: ignore[arg-type]


def test_not_a_mapping() -> None:
    for text in ("", "- 1", "text"):
        with pytest.raises(ConfigurationError, match="mapping"):
            Recipe.from_yaml(text)


def test_yaml_merges_mappings() -> None:
    text = "name: x\nrecovery: &one {steps: 7, warmup_steps: 2}\nattention_transfer: {<<: *one, steps: 9}"
    recipe = Recipe.from_yaml(text)
    assert (recipe.recovery.steps, recipe.recovery.warmup_steps) == (7, 2)
    assert (recipe.attention_transfer.steps, recipe.attention_transfer.warmup_steps) == (9, 2)
    with pytest.raises(ConfigurationError, match="'<<' is given twice"):
        Recipe.from_yaml("name: x\nrecovery: &one {steps: 7}\nattention_transfer: {<<: *one, <<: *one}")


def test_yaml_that_is_wrong() -> None:
    with pytest.raises(ConfigurationError, match="not valid YAML"):
        Recipe.from_yaml("name: [")
    with pytest.raises(ConfigurationError, match="'steps' is given twice"):
        Recipe.from_yaml("name: x\nrecovery: {steps: 1, steps: 2}")
    with pytest.raises(ConfigurationError, match="not valid YAML"):
        Recipe.from_yaml("name: !!python/object/apply:os.getcwd []")


def test_yaml_1_1_reads_a_number_without_a_dot_as_text() -> None:
    assert yaml.safe_load("1e-3") == "1e-3"  # the trap itself
    recipe = Recipe.from_yaml("name: x\nrecovery: {learning_rate: 1e-3}")
    assert recipe.recovery.learning_rate == 1e-3
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_zero_steps_skip_a_stage() -> None:
    recipe = Recipe.from_dict({"name": "x", "recovery": {"steps": 0, "warmup_steps": 3}})
    assert recipe.recovery.steps == 0


def carrying(data: list[dict[str, Any]] | None = None, **recovery: Any) -> Recipe:
    sources = [{"provider": "passkey"}, {"provider": "teacher"}] if data is None else data
    return Recipe.from_dict({"name": "x", "data": sources, "recovery": {"carried_segments": 3, **recovery}})


def test_carried_segments() -> None:
    assert Recipe(name="x").recovery.carried_segments == 0
    recipe = carrying([{"provider": "passkey", "carried_weight": 0.5}, {"provider": "teacher"}])
    assert [source.carried_weight for source in recipe.data] == [0.5, None]
    assert recipe.recovery.carried_sequences is None
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert carrying(carried_share=1, carried_sequences=4).recovery.carried_sequences == 4
    # Turned off, what belongs to it goes too.
    off = carrying(carried_share=0.25, carried_sequences=4).with_overrides({"recovery.carried_segments": "0"})
    assert off.recovery == RecoverySettings()
    assert "carried_share" not in off.to_dict()["recovery"]


@pytest.mark.parametrize(
    ("recovery", "message"),
    [
        ({"carried_segments": -1}, r"^recovery\.carried_segments: got -1; it must be 0 or above"),
        ({"carried_segments": 1.5}, r"^recovery\.carried_segments: got 1\.5; give a whole number"),
        ({"carried_share": 0}, r"^recovery\.carried_share: got 0\.0; it must be above 0"),
        ({"carried_share": 1.1}, r"^recovery\.carried_share: got 1\.1; it must be at most 1"),
        ({"carried_sequences": 0}, r"^recovery\.carried_sequences: got 0; it must be above 0"),
        ({"carried_segments": 0, "carried_share": 0.5}, r"^recovery\.carried_share: .*no effect with"),
        ({"carried_segments": 0, "carried_sequences": 2}, r"^recovery\.carried_sequences: .*no effect"),
        ({"cross_entropy_weight": 0}, r"^recovery\.carried_segments: got 3; such steps train on"),
    ],
)
def test_carried_segments_that_cannot_be(recovery: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        carrying(**recovery)


def test_carried_weights_that_cannot_be() -> None:
    with pytest.raises(ConfigurationError, match=r"^data\.0\.carried_weight: got -1\.0; it must be"):
        carrying([{"provider": "passkey", "carried_weight": -1}])
    with pytest.raises(ConfigurationError, match=r"^recovery\.carried_segments: .*every carried_weight is 0"):
        carrying([{"provider": "passkey", "carried_weight": 0}, {"provider": "teacher", "carried_weight": 0}])


def test_load_from_a_file_and_by_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(Recipe.load("quick").to_yaml(), encoding="utf-8")
    assert Recipe.load(path) == Recipe.load(str(path)) == Recipe.load("quick")
    path.write_text("name: x\nsteps: 1", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"mine\.yaml: steps: unknown key"):
        Recipe.load(path)
    path.write_bytes(b"name: \xff")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        Recipe.load(path)


@pytest.mark.parametrize("name", ["quik", "recipes/quik.yaml"])
def test_load_names_what_there_is(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"quick, .*smollm2-135m-short\. Did you mean 'quick'\?"):
        Recipe.load(name)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("recovery.learning_rate", "5e-4", 5e-4),
        ("recovery.learning_rate", 5e-4, 5e-4),
        ("recovery.steps", "1_000", 1000),
        ("recovery.betas", "0.8,0.9", (0.8, 0.9)),
        ("recovery.betas", "[0.8, 9e-1]", (0.8, 0.9)),
        ("recovery.lora_targets", "q_proj,o_proj", ("q_proj", "o_proj")),
        ("evaluation.lengths", "64, 128", (64, 128)),
        ("evaluation.tasks", "", ()),
        ("model.use_conv", "false", False),
        ("model.use_conv", "null", None),
        ("model.softmax_layers", "0,3", (0, 3)),
        ("model.gate_divisor", "8", 8.0),
        ("data.0.weight", "3", 3.0),
        ("data.0.name", "12", "12"),
        ("name", "no", "no"),
        ("description", "null", "null"),
        ("precision", "float32", "float32"),
    ],
)
def test_overrides_are_read_by_the_type_of_the_field(key: str, text: Any, value: Any) -> None:
    recipe = Recipe(name="x").with_overrides({key: text})
    found: Any = recipe
    for part in key.split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_overrides_of_whole_parts() -> None:
    recipe = Recipe(name="x").with_overrides(
        {"data": "[{provider: passkey, weight: 1e-1}]", "recovery": {"steps": 3}, "checkpoint": "{keep: 5}"}
    )
    assert recipe.data == (DataSource(provider="passkey", weight=0.1),)
    assert recipe.recovery.steps == 3
    assert recipe.checkpoint.keep == 5


def test_an_override_of_a_choice_drops_what_belonged_to_the_old_one() -> None:
    recipe = Recipe(name="x", data=({"provider": "passkey"}, {"provider": "teacher", "num_tokens": 500}))  # type: ignore[arg-type]
    assert "lora_rank" in recipe.to_dict()["recovery"]
    assert recipe.with_overrides({"recovery.train": "all"}).recovery.train == "all"
    changed = recipe.with_overrides({"data.1.provider": "text", "data.1.path": "a,b.txt"})
    assert changed.data[1] == DataSource(provider="text", path="a,b.txt")
    assert recipe.with_overrides({"data.1.provider": "text", "data.1.path": "[a.txt, b.txt]"}).data[
        1
    ].paths == (
        "a.txt",
        "b.txt",
    )
    with pytest.raises(ConfigurationError, match=r"recovery\.lora_rank: .*contradicts"):
        recipe.with_overrides({"recovery.train": "all", "recovery.lora_rank": "4"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "recovery.learning_rte",
            "1",
            r"^recovery\.learning_rte: unknown key\. Did you mean 'learning_rate'\?",
        ),
        ("recovry.steps", "1", r"^recovry: unknown key\. Did you mean 'recovery'\?"),
        ("recovery.steps.x", "1", r"^recovery\.steps\.x: unknown key; steps is a single value"),
        ("recovery.steps", "many", r"^recovery\.steps: got 'many'; give a whole number"),
        ("recovery.steps", "1e2", r"^recovery\.steps: got '1e2'; give a whole number"),
        ("recovery.train", "al", r"^recovery\.train: got 'al'.*Did you mean 'all'\?"),
        ("data.1.weight", "1", r"^data\.1: unknown key\. Entries are numbered 0 to 0"),
        ("data.first.weight", "1", r"^data\.first: unknown key"),
        ("data.0", "1", r"^data\.0: name one of its keys, such as data\.0\.weight"),
        ("data.0.wight", "1", r"^data\.0\.wight: unknown key\. Did you mean 'weight'\?"),
        ("data.0.weight", "-1", r"^data\.0\.weight: got -1\.0"),
        ("data", "[", r"^data: .*not valid YAML"),
        ("model.use_conv", "2", r"^model\.use_conv: got '2'; give true or false"),
        ("evaluation.lengths", "64,x", r"^evaluation\.lengths\.1: got 'x'; give a whole number"),
        ("", "1", "unknown key"),
    ],
)
def test_overrides_that_cannot_be(key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Recipe(name="x").with_overrides({key: value})


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    code = "from lawcat.distill.recipe import Recipe; print(Recipe.load('quick').fingerprint())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == Recipe.load("quick").fingerprint()
    assert (
        Recipe.load("quick").fingerprint() != Recipe.load("quick").with_overrides({"seed": 1}).fingerprint()
    )


def test_reading_a_recipe_does_not_import_torch() -> None:
    load = "from lawcat.distill.recipe import Recipe; Recipe.load('quick')"
    code = f"import sys; {load}; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


MATRIX = """
name: m
seed: 4
matrix:
  seeds: [4, 5]
  lawcat:
  no-gate: {model.gate: none, seeds: [0]}
  all: {recovery: {train: all, learning_rate: 2e-4}, data: [{provider: passkey}]}
"""


def test_a_matrix_is_read_and_written_and_resolved() -> None:
    recipe = Recipe.from_yaml(MATRIX)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert recipe.matrix is not None
    assert recipe.matrix.names == ("lawcat", "no-gate", "all")
    assert recipe.matrix.seeds == (4, 5)
    assert [variant.seeds for variant in recipe.matrix.variants] == [(), (0,), ()]
    plain = Recipe(name="m/lawcat", seed=4)
    assert recipe.variant("lawcat") == plain
    assert recipe.variant("no-gate", seed=0) == dataclasses.replace(
        plain, name="m/no-gate", seed=0, model=ModelSettings(gate="none")
    )
    changed = recipe.variant("all")
    assert (changed.recovery.train, changed.recovery.learning_rate) == ("all", 2e-4)
    assert changed.data == (DataSource(provider="passkey"),)
    with pytest.raises(
        ConfigurationError, match=r"no variant 'no-gat' .* there are lawcat, no-gate, all\. Did.*'no-gate'"
    ):
        recipe.variant("no-gat")
    with pytest.raises(
        ConfigurationError, match="no variant 'x' in the recipe 'y'; the recipe has no matrix"
    ):
        Recipe(name="y").variant("x")


def test_overrides_of_a_recipe_with_a_matrix_hold_for_all_variants() -> None:
    recipe = Recipe.from_yaml(MATRIX).with_overrides(
        {"recovery.learning_rate": "3e-3", "data.0.weight": "7", "recovery.lora_rank": "4"}
    )
    resolved = {name: recipe.variant(name) for name in ("lawcat", "no-gate", "all")}
    assert {variant.recovery.learning_rate for variant in resolved.values()} == {3e-3}
    assert {variant.data[0].weight for variant in resolved.values()} == {7.0}
    assert [variant.data[0].provider for variant in resolved.values()] == ["teacher", "teacher", "passkey"]
    assert [resolved[name].recovery.lora_rank for name in ("lawcat", "no-gate")] == [4, 4]
    assert resolved["all"].recovery.train == "all"  # which has no rank
    every = Recipe.from_yaml(MATRIX).with_overrides({"recovery.train": "lora", "model": {"gate": "head"}})
    assert every.variant("all").recovery.train == "lora"
    assert every.variant("no-gate").model.gate == "head"
    assert Recipe.from_yaml(every.to_yaml()) == every
    with pytest.raises(ConfigurationError, match=r"^matrix\.all\.seeds: a matrix is changed in the recipe's"):
        recipe.with_overrides({"matrix.all.seeds": "1"})


def test_a_variant_that_overrides_exclude_is_refused_when_it_is_asked_for() -> None:
    recipe = Recipe.from_yaml(MATRIX).with_overrides({"teacher_tuning.steps": "5"})  # which needs LoRA
    assert recipe.variant("no-gate").teacher_tuning.steps == 5
    with pytest.raises(
        ConfigurationError,
        match=r"^matrix\.all\.teacher_tuning\.steps: got 5; .* set for all variants cannot be combined with",
    ):
        recipe.variant("all")
    assert dataclasses.replace(recipe, seed=3).variant("lawcat").seed == 3
    assert recipe.matrix is not None
    assert recipe.matrix.names == ("lawcat", "no-gate", "all")
    assert recipe.with_overrides({"recovery.train": "lora"}).variant("all").teacher_tuning.steps == 5
    with pytest.raises(ConfigurationError, match=r"^teacher_tuning\.stps: unknown key"):
        Recipe.from_yaml(MATRIX).with_overrides({"teacher_tuning.stps": "5"})


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (
            {"a": {"model.use_cov": True}},
            r"^matrix\.a\.model\.use_cov: unknown key\. Did you mean 'use_conv'\?",
        ),
        ({"a": {"mdel": {"gate": "x"}}}, r"^matrix\.a\.mdel: unknown key\. Did you mean 'model'\?"),
        ({"a": {"model.gate": "hed"}}, r"^matrix\.a\.model\.gate: gate='hed' is not a choice"),
        ({"a": {"recovery.steps": -1}}, r"^matrix\.a\.recovery\.steps: got -1; it must be 0 or above"),
        (
            {"a": {"recovery.train": "all", "recovery.lora_rank": 4}},
            r"^matrix\.a\.recovery\.lora_rank: .*contradicts train: all",
        ),
        (
            {"a": {"matrix": {"b": {}}}},
            r"^matrix\.a\.matrix\.b: a variant has no matrix of its own",
        ),
        (
            {"a": {"matrix": {"b": {"seed": 1}}}},
            r"^matrix\.a\.matrix\.b\.seed: a variant has no matrix of its own",
        ),
        ({"a": {"seed": 1}}, r"^matrix\.a\.seed: seeds are a list"),
        ({"a": {"evaluation.samples": 1}}, r"^matrix\.a\.evaluation\.samples: all variants are measured on"),
        ({"a": {"name": "b"}}, r"^matrix\.a\.name: the variant's key is its name"),
        ({"a": {"seeds": []}}, r"^matrix\.a\.seeds: got \[\]; give at least one seed"),
        ({"a": {}, "seeds": [1, 1]}, r"^matrix\.seeds: got \[1, 1\]; give at least one seed, each once"),
        ({"a": {}, "seeds": 1}, r"^matrix\.seeds: got 1; give a list"),
        ({"a": {}, "seeds": ["x"]}, r"^matrix\.seeds\.0: got 'x'; give a whole number"),
        ({"a": 3}, r"^matrix\.a: got 3; give a mapping of overrides"),
        ({}, r"^matrix: names no variant"),
        ({"seeds": [1]}, r"^matrix: names no variant"),
        ([1], r"^matrix: got \[1\]; give a mapping of variants"),
        ({"a/b": {}}, r"^matrix: got 'a/b'; a variant names a folder"),
        ({"..": {}}, r"^matrix: got '\.\.'; a variant names a folder"),
        ({"": {}}, r"^matrix: got ''; a variant names a folder"),
        ({7: {}}, r"^matrix: got 7; a variant names a folder"),
        ({"x" * 65: {}}, r"at most 64"),
        ({"a": {}, "A": {}}, r"^matrix\.a: another variant has that name but for its capitals"),
        ({"Report": {}}, r"^matrix\.Report: is what a matrix keeps beside its students"),
        ({"a.training": {}}, r"^matrix\.a\.training: is what a matrix keeps"),
        ({"a-seed2": {}}, r"^matrix\.a-seed2: such endings are for the students of other seeds"),
    ],
)
def test_a_matrix_that_cannot_be(matrix: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Recipe.from_dict({"name": "x", "matrix": matrix})


def test_the_gate_named_none_is_a_choice_and_not_nothing() -> None:
    recipe = Recipe(name="x").with_overrides({"model.gate": "none"})
    assert recipe.model.gate == "none"
    assert recipe.with_overrides({"model.gate": "null"}).model.gate is None
    assert recipe.with_overrides({"model.sliding_window": "none"}).model.sliding_window is None


def test_a_penalty_on_gates_needs_gates() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^recovery\.gate_penalty: got 0\.1; it must be 0 with model\.gate"
    ):
        Recipe.from_dict({"name": "x", "model": {"gate": "none"}, "recovery": {"gate_penalty": 0.1}})
    with pytest.raises(
        ConfigurationError, match=r"^recovery\.gate_penalty: got -0\.1; it must be 0 or above"
    ):
        Recipe.from_dict({"name": "x", "recovery": {"gate_penalty": -0.1}})
    with pytest.raises(ConfigurationError, match=r"^recovery\.decay_share: .* is for schedule: trapezoid"):
        Recipe.from_dict({"name": "x", "recovery": {"decay_share": 0.1}})
