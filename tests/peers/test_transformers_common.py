"""transformers' common tests of every model, run against ours: all linear, hybrid, all softmax.

What it skips by itself needs a GPU, another package, or is of models that see, hear, or mix experts.
"""

from __future__ import annotations

import unittest
import unittest.mock
from typing import ClassVar

import pytest
import torch
import transformers
from sources import import_suite

from lawcat import LawcatConfig, LawcatForCausalLM, LawcatModel
from small_models import make_config

# The archive lacks these. Export of a whole model waits for the exported step program.
STAND_INS = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}
common = import_suite("transformers", "test_modeling_common", STAND_INS)
with unittest.mock.patch("transformers.utils.direct_transformers_import", return_value=transformers):
    # It would load transformers a second time, from the folder of tests.
    configuration = import_suite("transformers", "test_configuration_common", STAND_INS)
# The suite looks here for what a class is: whether it has a head, takes labels, has rotary positions.
common.MODEL_MAPPING_NAMES = {**common.MODEL_MAPPING_NAMES, "lawcat": "LawcatModel"}
common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = {
    **common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "lawcat": "LawcatForCausalLM",
}


class ModelTester:
    """What the suite asks of a model's own tests: a configuration and inputs."""

    batch_size, seq_length, hidden_size = 3, 7, 32
    num_hidden_layers, num_attention_heads, vocab_size = 2, 4, 64
    is_training = True

    def __init__(self, fields: dict[str, object]) -> None:
        self.fields = fields

    def get_config(self) -> LawcatConfig:
        return make_config(tie_word_embeddings=False, **self.fields)

    def prepare_config_and_inputs_for_common(self) -> tuple[LawcatConfig, dict[str, torch.Tensor]]:
        tokens = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class CommonTests(common.ModelTesterMixin):
    all_model_classes = (LawcatModel, LawcatForCausalLM)
    test_can_init_all_missing_weights_before_2023 = True
    fields: ClassVar[dict[str, object]] = {}

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.fields)
        self.config_tester = configuration.ConfigTester(
            self, config_class=LawcatConfig, hidden_size=32, num_attention_heads=4
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    @unittest.skip("GenerationTesterMixin is in no archive; tests/model/test_generation.py tests generate()")
    def test_generation_tester_mixin_inheritance(self) -> None:
        pass


class TestLinear(CommonTests, unittest.TestCase):
    has_attentions = False


for _name in [name for name in dir(TestLinear) if name.startswith("test_model_rope_scaling_from_config")]:
    setattr(
        TestLinear,
        _name,
        unittest.skip("no rotary positions; TestLinearWithRope has them")(lambda self: None),
    )


class TestLinearWithRope(CommonTests, unittest.TestCase):
    has_attentions = False
    fields: ClassVar = {"linear_rope": True, "gate": "head", "gate_bias_init": "zeros"}


class TestHybrid(CommonTests, unittest.TestCase):
    # Only softmax layers have attentions to show, and the suite expects one a layer.
    has_attentions = False
    fields: ClassVar = {"layer_types": ["linear_attention", "full_attention"], "state_heads": "kv"}


class TestWindows(CommonTests, unittest.TestCase):
    has_attentions = False
    fields: ClassVar = {
        "layer_types": ["linear_attention", "sliding_attention"],
        "sliding_window": 4,
        "num_sinks": 2,
        "feature_map": "untied",
    }


class TestSoftmax(CommonTests, unittest.TestCase):
    fields: ClassVar = {"layer_types": ["full_attention", "full_attention"]}

    @unittest.skip("it has none of the modules that are kept in float32")
    def test_keep_in_fp32_modules_exist(self) -> None:
        pass


def test_the_suite_is_not_empty() -> None:
    names = [name for name in dir(TestLinear) if name.startswith("test_")]
    assert len(names) > 100


@pytest.mark.parametrize("tester", [TestLinear, TestSoftmax])
def test_labels_are_given(tester: type) -> None:
    """The suite knows the classes: without labels its training tests would test nothing."""
    case = tester("test_training")
    case.setUp()
    _, inputs = case.model_tester.prepare_config_and_inputs_for_common()
    assert "labels" in case._prepare_for_class(inputs, LawcatForCausalLM, return_labels=True)
    assert "labels" not in case._prepare_for_class(inputs, LawcatModel, return_labels=True)
