"""Teacher -> untrained student: nothing of the teacher is lost, and every tensor is accounted for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForSequenceClassification

from comparison import assert_near
from lawcat.convert.families import FAMILIES
from lawcat.convert.initialize import (
    OPERATOR_FIELDS,
    cast_teacher_weights,
    convert,
    is_new_parameter,
    sliding_window_teacher,
    student_config,
)
from lawcat.errors import ConfigurationError, TeacherError
from lawcat.model.configuration_lawcat import _OPERATOR_FIELDS, LawcatConfig
from tiny_teachers import LLAMA3_ROPE, random_ids, tiny_teacher

TEACHERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "llama, linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "llama, dynamic rope": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "max_position_embeddings": 16,
    },
    "llama, yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, head_dim of its own": {"head_dim": 16, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "llama, all together": {
        "tie_word_embeddings": True,
        "attention_bias": True,
        "rope_parameters": LLAMA3_ROPE,
        "hidden_act": "gelu",
    },
    "llama, dropout": {"attention_dropout": 0.5},
    "mistral": {"family": "mistral"},
    "mistral, tied": {"family": "mistral", "tie_word_embeddings": True, "head_dim": 16},
    "qwen2": {"family": "qwen2"},
    "qwen2, tied": {"family": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen3": {"family": "qwen3"},
    "qwen3, tied, biases": {"family": "qwen3", "tie_word_embeddings": True, "attention_bias": True},
}


@pytest.mark.parametrize("fields", TEACHERS.values(), ids=TEACHERS)
def test_softmax_layers_give_the_teachers_logits_bit_for_bit(fields: dict[str, Any]) -> None:
    teacher, ids = tiny_teacher(**fields), random_ids()
    expected = teacher(ids).logits
    student, report = convert(teacher, softmax_layers=(0, 1))
    assert torch.equal(student(ids).logits, expected)
    assert report.names("created") == report.names("dropped") == []
    assert report.num_parameters("copied") == sum(p.numel() for p in teacher.parameters())

    linear, _ = convert(tiny_teacher(**fields))
    with linear.teacher_mode():
        assert torch.equal(linear(ids).logits, expected)
    assert not torch.allclose(linear(ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("fields", TEACHERS.values(), ids=TEACHERS)
def test_a_sliding_window_over_everything_is_the_teacher(fields: dict[str, Any]) -> None:
    """Up to window and sinks together: 24 tokens."""
    ids = random_ids(tokens=24)
    expected = tiny_teacher(**fields)(ids).logits
    for window, num_sinks in ((24, 0), (20, 4), (100, 4)):
        model = sliding_window_teacher(tiny_teacher(**fields), window=window, num_sinks=num_sinks)
        assert_near(model(ids).logits, expected, 1e-5, f"window {window}")
    small = sliding_window_teacher(tiny_teacher(**fields), window=5)
    assert (small(ids).logits[:, 9:] - expected[:, 9:]).abs().amax(-1).min() > 1e-2
    if "rope_parameters" not in fields or fields["rope_parameters"]["rope_type"] != "dynamic":
        assert_near(small(ids).logits[:, :9], expected[:, :9], 1e-5)


def test_a_sliding_window_shares_the_teachers_weights() -> None:
    teacher = tiny_teacher(tie_word_embeddings=True).to(torch.bfloat16)
    model = sliding_window_teacher(teacher, window=8)
    assert (model.config.sliding_window, model.config.num_sinks) == (8, 4)
    assert model.config.layer_types == ["sliding_attention"] * 2
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == {
        name: p.data_ptr() for name, p in teacher.named_parameters()
    }
    assert model.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())
    output = model.generate(random_ids(), max_new_tokens=30, min_new_tokens=30, return_dict_in_generate=True)
    short = model.generate(random_ids(), max_new_tokens=2, return_dict_in_generate=True)
    assert output.past_key_values.state_bytes() == short.past_key_values.state_bytes()
    for window, num_sinks, message in ((0, 4, "sliding_window=0"), (8, -1, "num_sinks=-1")):
        with pytest.raises(ConfigurationError, match=message):
            sliding_window_teacher(teacher, window=window, num_sinks=num_sinks)
    with pytest.raises(TeacherError, match="'gpt2'"):
        sliding_window_teacher(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2)), window=8)


def test_layers_of_three_kinds() -> None:
    options: dict[str, Any] = {"softmax_layers": (1,), "sliding_layers": (0,), "sliding_window": 4}
    student, report = convert(tiny_teacher(num_hidden_layers=3), **options)
    assert student.config.layer_types == ["sliding_attention", "full_attention", "linear_attention"]
    assert all(".layers.2.self_attn." in name for name in report.names("created"))
    assert "model.layers.2.self_attn.window.scale" in report.names("created")


@pytest.mark.parametrize("tied", [False, True])
def test_the_report_accounts_for_every_tensor(tied: bool) -> None:
    teacher = tiny_teacher(tie_word_embeddings=tied)
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    student, report = convert(teacher, softmax_layers=(1,))
    assert [row.name for row in report.tensors if row.action == "copied"] == list(before)
    parameters = dict(student.named_parameters())
    assert {row.name for row in report.tensors} == set(parameters)
    for row in report.tensors:
        assert row.shape == parameters[row.name].shape
        assert (row.action == "created") == is_new_parameter(row.name)
        assert is_new_parameter(row.name) == parameters[row.name].requires_grad
    assert report.names("created")
    assert all(".layers.0.self_attn." in name for name in report.names("created"))
    for name, value in before.items():
        assert torch.equal(parameters[name], value), name
    assert report.num_parameters("created") + report.num_parameters("copied") == student.num_parameters()
    counts = f"{len(before)} tensors copied ({report.num_parameters('copied'):,} parameters)"
    assert report.summary().startswith(counts)
    assert report.summary().endswith("0 tensors dropped (0 parameters)")


def test_tied_embeddings_stay_one_tensor() -> None:
    student, _ = convert(tiny_teacher(tie_word_embeddings=True))
    assert student.lm_head.weight is student.model.embed_tokens.weight
    student, _ = convert(tiny_teacher(tie_word_embeddings=False))
    assert student.lm_head.weight is not student.model.embed_tokens.weight


def test_the_configuration_is_the_teachers() -> None:
    teacher = tiny_teacher(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)
    teacher.generation_config.max_new_tokens = 7
    student, _ = convert(teacher, softmax_layers=(0,), gate="head", use_conv=False)
    config = student.config
    for name in ("hidden_size", "rope_parameters", "tie_word_embeddings", "eos_token_id", "pad_token_id"):
        assert getattr(config, name) == getattr(teacher.config, name)
    assert config.layer_types == ["full_attention", "linear_attention"]
    assert (config.teacher_model_type, config.gate, config.use_conv) == ("llama", "head", False)
    assert student.generation_config.max_new_tokens == 7
    assert not student.training


def new_parameters(student: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in student.named_parameters() if is_new_parameter(name)}


def test_new_parameters_start_where_they_should() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    student, _ = convert(tiny_teacher(), seed=3)
    again, other = (new_parameters(convert(tiny_teacher(), seed=seed)[0]) for seed in (3, 4))
    for name, value in new_parameters(student).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, again[name])
        assert torch.equal(value, other[name]) == (not name.endswith("decay_gate.reduce")), name
    for attention in student.attention_modules():
        assert torch.equal(attention.decay_gate.bias, attention.decay_gate.initial_bias())
        assert not attention.decay_gate.expand.any()
        assert attention.decay_gate.reduce.std().item() == pytest.approx(32**-0.5, rel=0.2)
        assert torch.equal(attention.feature_map.weight, attention.feature_map.initial_value())
        for convolution in (attention.q_conv, attention.k_conv):
            assert torch.equal(convolution.weight, convolution.initial_value())
    torch.set_rng_state(state)
    teacher = tiny_teacher()
    state = torch.get_rng_state()
    convert(teacher)
    assert torch.equal(torch.get_rng_state(), state), "converting drew from the caller's random numbers"


def test_a_bfloat16_teacher_keeps_its_type() -> None:
    teacher, ids = tiny_teacher(), random_ids()
    for parameter in teacher.parameters():  # and not the rotary frequencies: as loading in bfloat16 does
        parameter.data = parameter.data.to(torch.bfloat16)
    expected = teacher(ids).logits
    student, _ = convert(teacher)
    types = {is_new_parameter(name): parameter.dtype for name, parameter in student.named_parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    with student.teacher_mode():
        assert torch.equal(student(ids).logits, expected)
    assert student(ids).logits.dtype == torch.bfloat16


def test_casting_leaves_new_parameters_alone() -> None:
    student, _ = convert(tiny_teacher(tie_word_embeddings=True))
    before = new_parameters(student)
    cast_teacher_weights(student, torch.bfloat16)
    for name, parameter in student.named_parameters():
        assert parameter.dtype == (torch.float32 if name in before else torch.bfloat16)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert all(torch.equal(value, before[name]) for name, value in new_parameters(student).items())


def test_every_field_of_the_operator_can_be_chosen() -> None:
    assert {*OPERATOR_FIELDS, "teacher_model_type", "layer_types"} == set(_OPERATOR_FIELDS)
    config = LawcatConfig()
    assert all(hasattr(config, name) for name in OPERATOR_FIELDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_divisr": 8}, r"'gate_divisr' is not a field.*Did you mean 'gate_divisor'\?"),
        ({"hidden_size": 8}, "'hidden_size' is not a field"),
        ({"softmax_layers": (2,)}, "softmax layer 2 does not exist: the teacher has layers 0 to 1"),
        ({"softmax_layers": (0, -1)}, "softmax layer -1 does not exist"),
        ({"sliding_layers": (2,), "sliding_window": 4}, "sliding layer 2 does not exist"),
        ({"sliding_layers": (1,)}, "'sliding_attention', which needs sliding_window"),
        (
            {"softmax_layers": (1,), "sliding_layers": (1,), "sliding_window": 4},
            "layer 1 is named as softmax and as sliding",
        ),
        ({"num_sinks": 4}, "num_sinks=4 has no effect without a window"),
        ({"gate": "chanel"}, "gate='chanel' is not a choice"),
        ({"feature_dim": 7}, "feature_dim=7 must be an even number"),
        ({"use_conv": "yes"}, "use_conv"),
        ({"gate_divisor": 0.0}, "gate_divisor=0.0 must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        convert(tiny_teacher(), **options)


def test_teachers_that_do_not_fit() -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(TeacherError, match="'gpt2'"):
        convert(GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2)))
    with pytest.raises(TeacherError, match=r"lm_head\.weight of a llama model is missing from the teacher"):
        convert(LlamaForSequenceClassification(LlamaConfig(vocab_size=8, pad_token_id=0, **small)))
    teacher = tiny_teacher()
    teacher.model.layers[1].extra = torch.nn.Linear(2, 2)
    with pytest.raises(TeacherError, match=r"model\.layers\.1\.extra\.weight .* has no place for"):
        convert(teacher)
    with pytest.raises(TeacherError, match="'gpt2'"):
        student_config(GPT2Config())


def test_a_tensor_that_the_family_does_not_have_or_that_is_not_there() -> None:
    teacher = tiny_teacher("qwen2")
    teacher.model.layers[1].self_attn.o_proj = torch.nn.Linear(32, 32, bias=True)
    with pytest.raises(
        TeacherError, match=r"layers\.1\.self_attn\.o_proj\.bias of a qwen2 model .* no place for"
    ):
        convert(teacher)
    teacher = tiny_teacher("qwen2")
    teacher.model.layers[0].self_attn.k_proj = torch.nn.Linear(32, 16, bias=False)
    with pytest.raises(TeacherError, match=r"layers\.0\.self_attn\.k_proj\.bias of a qwen2 model is missing"):
        convert(teacher)
    teacher = tiny_teacher("qwen3")
    teacher.model.layers[1].self_attn.k_norm = torch.nn.Identity()
    with pytest.raises(
        TeacherError, match=r"layers\.1\.self_attn\.k_norm\.weight of a qwen3 model is missing"
    ):
        convert(teacher)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_too_it_is_the_teacher(family: str) -> None:
    """And the linear layers get q, k and v of one type, whatever their norms make of them."""
    teacher, ids = tiny_teacher(family), random_ids()
    short, exact = {"device_type": "cpu", "dtype": torch.bfloat16}, teacher(ids).logits
    with torch.autocast(**short):
        expected = teacher(ids).logits
    student, _ = convert(teacher)
    with torch.autocast(**short):
        cache = student(ids, use_cache=True).past_key_values
        with student.teacher_mode():
            assert torch.equal(student(ids).logits, expected)
    assert {layer.q_inputs.dtype for layer in cache.layers} == {torch.bfloat16}
    sliding = sliding_window_teacher(tiny_teacher(family), window=20, num_sinks=4)
    with torch.autocast(**short):
        assert_near(sliding(ids).logits, exact, 0.05)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_inside_pads_and_generates_as_it_does(family: str) -> None:
    """In every layer and in some, whatever the family puts on its projections."""
    teacher = tiny_teacher(family, num_hidden_layers=3, hidden_size=48, num_attention_heads=6, pad_token_id=0)
    ids, mask = random_ids(3, 21), torch.ones(3, 21, dtype=torch.long)
    mask[0, :8], mask[1, :1] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    expected, generated = teacher(ids, attention_mask=mask).logits, teacher.generate(ids, **options)
    student, _ = convert(teacher)
    with student.teacher_mode():
        assert_near(student(ids, attention_mask=mask).logits[mask == 1], expected[mask == 1], 1e-5)
        assert torch.equal(student.generate(ids, **options), generated)
    linear = student.generate(ids, **options)
    assert torch.equal(linear, student.generate(ids, use_cache=False, **options))
    alone = student.generate(ids[:1, 8:], **options | {"attention_mask": mask[:1, 8:]})
    assert torch.equal(linear[0, 8:], alone[0])
