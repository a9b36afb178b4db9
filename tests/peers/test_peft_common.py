"""peft's common tests of every model, run against ours with LoRA on the teacher's projections."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sources import import_suite
from transformers import AutoModelForCausalLM

from small_models import make_model

peft = pytest.importorskip("peft")


class _Absent(ModuleType):
    """A package that the suite imports names of and that none of the tests below uses."""

    def __getattr__(self, name: str) -> type:
        return type(name, (), {})


_absent = [name for name in ("datasets", "diffusers") if importlib.util.find_spec(name) is None]
sys.modules.update({name: _Absent(name) for name in _absent})
suite = import_suite("peft", "testing_common")
for _name in _absent:
    del sys.modules[_name]

LORA = {
    "task_type": "CAUSAL_LM",
    "r": 8,  # the suite counts on it
    "lora_alpha": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    # Else an adapter starts as no change, and the suite looks for one.
    "init_lora_weights": False,
}
CONFIGURATIONS = {
    "lora": LORA,
    # As in recovery: the new parameters train in full.
    "new parameters in full": {**LORA, "modules_to_save": ["q_conv", "k_conv", "feature_map", "decay_gate"]},
}
SKIPPED = {"_test_merge_layers_fp16": "needs a GPU", "_test_generate_half_prec": "needs a GPU"}
SKIPPED_IN_FULL = {
    "_test_mixed_adapter_batches": "peft mixes adapters of linear layers only",
    "_test_generate_with_mixed_adapter_batches_and_beam_search": "peft mixes adapters of linear layers only",
    "_test_weighted_combination_of_adapters": "peft weighs no modules that train in full",
    "_test_training_layer_indexing": "modules that train in full do so in every layer",
}
# Those that every kind of model can run: a model, a configuration class and its arguments.
TESTS = [
    name
    for name, function in inspect.getmembers(suite.PeftCommonTester, inspect.isfunction)
    if name.startswith("_test_")
    and list(inspect.signature(function).parameters)[1:] == ["model_id", "config_cls", "config_kwargs"]
]


class Tester(suite.PeftCommonTester):
    torch_device = "cpu"
    transformers_class = AutoModelForCausalLM

    def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
        tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@pytest.fixture(scope="module")
def model_id(tmp_path_factory: pytest.TempPathFactory) -> str:
    place: Path = tmp_path_factory.mktemp("model")
    # The suite saves bare state dicts, in which tied weights are refused, and makes adapters of rank 20.
    fields = {"hidden_size": 64, "head_dim": 16, "tie_word_embeddings": False}
    make_model(noise=0.03, **fields).save_pretrained(place)
    return str(place)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("name", TESTS)
def test_peft(name: str, configuration: str, model_id: str) -> None:
    is_in_full = "modules_to_save" in CONFIGURATIONS[configuration]
    if reason := SKIPPED.get(name) or (is_in_full and SKIPPED_IN_FULL.get(name)):
        pytest.skip(reason)
    getattr(Tester(), name)(model_id, peft.LoraConfig, dict(CONFIGURATIONS[configuration]))


def test_the_suite_is_not_empty() -> None:
    assert len(TESTS) > 20
