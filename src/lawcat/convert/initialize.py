"""Teacher -> untrained student, with an account of every tensor."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init

from lawcat.convert.families import family_of
from lawcat.errors import ConfigurationError, TeacherError, did_you_mean
from lawcat.model.configuration_lawcat import FULL, LINEAR, OPERATOR_FIELDS, SLIDING, LawcatConfig
from lawcat.model.modeling_lawcat import NEW_MODULES, LawcatForCausalLM

# What has no effect in greedy decoding.
_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor: ``copied`` from the teacher, ``created`` for the student, or ``dropped``."""

    name: str
    shape: tuple[int, ...]
    action: Literal["copied", "created", "dropped"]


@dataclass(frozen=True)
class ConversionReport:
    """The account of a conversion, a row a tensor."""

    tensors: tuple[TensorReport, ...]

    def names(self, action: str) -> list[str]:
        """Return the names of the tensors with this action."""
        return [tensor.name for tensor in self.tensors if tensor.action == action]

    def num_parameters(self, action: str) -> int:
        """Return how many numbers the tensors with this action hold."""
        return sum(int(torch.Size(t.shape).numel()) for t in self.tensors if t.action == action)

    def summary(self) -> str:
        """Return one line of counts."""
        return ", ".join(
            f"{len(self.names(action))} tensors {action} ({self.num_parameters(action):,} parameters)"
            for action in ("copied", "created", "dropped")
        )


def is_new_parameter(name: str) -> bool:
    """Return whether a parameter's name is one that lawcat adds to a teacher.

    >>> is_new_parameter("model.layers.0.self_attn.q_conv.weight")
    True
    >>> is_new_parameter("model.layers.0.self_attn.q_proj.weight")
    False
    """
    return any(part in NEW_MODULES for part in name.split("."))


def student_config(
    teacher_config: Any,
    *,
    softmax_layers: tuple[int, ...] = (),
    sliding_layers: tuple[int, ...] = (),
    **operator: Any,
) -> LawcatConfig:
    """Return the configuration of a teacher's student.

    Args:
        teacher_config: The teacher's transformers configuration.
        softmax_layers: Layers, counted from 0, that keep the teacher's softmax attention.
        sliding_layers: Layers that keep it over a window (``sliding_window``, ``num_sinks``) only.
        operator: Fields of the operator (``OPERATOR_FIELDS``).

    Raises:
        TeacherError: when the teacher is not supported.
        ConfigurationError: for an unknown field, a layer that does not exist, or values that contradict.
    """
    family = family_of(teacher_config)
    for name in operator:
        if name not in OPERATOR_FIELDS:
            raise ConfigurationError(
                f"{name!r} is not a field of the operator.{did_you_mean(name, OPERATOR_FIELDS)} "
                f"Fields: {', '.join(OPERATOR_FIELDS)}."
            )
    num_layers = teacher_config.num_hidden_layers
    kinds = [LINEAR] * num_layers
    for what, kind, layers in (("softmax", FULL, softmax_layers), ("sliding", SLIDING, sliding_layers)):
        for layer in layers:
            if not 0 <= layer < num_layers:
                raise ConfigurationError(
                    f"{what} layer {layer} does not exist: the teacher has layers 0 to {num_layers - 1}."
                )
            if kinds[layer] not in (LINEAR, kind):
                raise ConfigurationError(f"layer {layer} is named as softmax and as sliding; choose one.")
            kinds[layer] = kind
    fields = {name: getattr(teacher_config, name) for name in family.fields if hasattr(teacher_config, name)}
    fields |= {"teacher_model_type": family.model_type, "layer_types": kinds, **family.constants}
    try:
        return LawcatConfig(**fields, **operator)
    except (ValueError, StrictDataclassError) as error:
        raise ConfigurationError(str(error.__cause__ or error)) from error


def convert(
    teacher: PreTrainedModel,
    *,
    softmax_layers: tuple[int, ...] = (),
    sliding_layers: tuple[int, ...] = (),
    seed: int = 0,
    **operator: Any,
) -> tuple[LawcatForCausalLM, ConversionReport]:
    """Return the untrained student of a teacher, and what became of every tensor.

    The student takes over the teacher's tensors (no copy is made), so the teacher is not to be used for other
    things afterwards.

    Args:
        teacher: A causal language model of a supported family, unquantized.
        softmax_layers: Layers, counted from 0, that keep the teacher's softmax attention.
        sliding_layers: Layers that keep it over a window only.
        seed: For the gate's random first matrix.
        operator: Fields of the operator; see ``LawcatConfig``.

    Returns:
        The student, in the teacher's dtype but for the new parameters, which are float32; and the report.

    Raises:
        TeacherError: when the teacher is not supported, or has a tensor that the student has no place for.
        ConfigurationError: see ``student_config``.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> small = LlamaConfig(vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2)
        >>> student, report = convert(LlamaForCausalLM(small))
        >>> report.names("dropped")
        []
    """
    config = student_config(
        teacher.config, softmax_layers=softmax_layers, sliding_layers=sliding_layers, **operator
    )
    with torch.random.fork_rng(devices=[]):
        with init.no_init_weights():
            student = LawcatForCausalLM(config)
        torch.manual_seed(seed)
        for module in student.modules():
            if type(module).__name__ in ("CausalConvolution", "FeatureMap", "DecayGate", "SlidingWindow"):
                module.reset_parameters()

    # Tied weights are one tensor of two names; it counts under the first.
    tied = set(student._tied_weights_keys) if config.tie_word_embeddings else set()
    tensors = {name: tensor for name, tensor in teacher.state_dict().items() if name not in tied}
    places = {name: tensor for name, tensor in student.state_dict().items() if name not in tied}
    created = [name for name in places if name not in tensors]
    lost = [name for name in created if not is_new_parameter(name)]
    dropped = [name for name in tensors if name not in places]
    if lost or dropped:
        name = (lost or dropped)[0]
        raise TeacherError(
            f"the tensor {name} of a {config.teacher_model_type} model is "
            f"{'missing from the teacher' if lost else 'one that lawcat has no place for'}; the checkpoint "
            "is not a plain causal language model of that family."
        )
    student.load_state_dict(tensors, strict=False, assign=True)
    student.tie_weights()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(is_new_parameter(name))
    student.generation_config = _generation_config(teacher)
    student.eval()
    report = ConversionReport(
        tuple(TensorReport(name, tuple(tensors[name].shape), "copied") for name in tensors)
        + tuple(TensorReport(name, tuple(places[name].shape), "created") for name in created)
    )
    return student, report


def sliding_window_teacher(teacher: PreTrainedModel, *, window: int, num_sinks: int = 4) -> LawcatForCausalLM:
    """Return the teacher with a sliding window of softmax attention in each layer, without any training.

    A baseline: constant memory, and nothing learned. Positions are StreamingLLM's: those within the window
    are relative as ever, and a sink is never farther away than ``num_sinks + window - 1``. Up to
    ``num_sinks + window`` tokens the model computes what the teacher does.

    Args:
        teacher: A causal language model of a supported family, unquantized. Its tensors are shared.
        window: Tokens that a token sees, itself among them; at least 1.
        num_sinks: First tokens of each sequence that are seen besides, for ever.

    Returns:
        The model, in evaluation mode and in the teacher's dtype; nothing of it requires gradients.

    Raises:
        TeacherError: when the teacher is not supported.
        ConfigurationError: for a window below 1 or a negative number of sinks.

    Source: the baseline of arXiv 2608.28444; StreamingLLM (arXiv 2309.17453).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> small = LlamaConfig(vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2)
        >>> sliding_window_teacher(LlamaForCausalLM(small), window=64).config.layer_types
        ['sliding_attention']
    """
    layers = tuple(range(teacher.config.num_hidden_layers))
    model, _ = convert(teacher, sliding_layers=layers, sliding_window=window, num_sinks=num_sinks)
    return model


def _generation_config(teacher: PreTrainedModel) -> GenerationConfig:
    """Return the teacher's settings, without what transformers reads with a warning but refuses to write."""
    settings = copy.deepcopy(teacher.generation_config)
    try:
        settings.validate(strict=True)
    except ValueError:
        if not settings.do_sample:
            for name in _SAMPLING_FIELDS:
                setattr(settings, name, None)
    return settings


def cast_teacher_weights(student: LawcatForCausalLM, dtype: torch.dtype) -> None:
    """Cast what came from the teacher, in place; the new parameters stay float32, where small updates
    survive."""
    for name, parameter in student.named_parameters():
        if not is_new_parameter(name):
            parameter.data = parameter.data.to(dtype)
