"""Stage 2, recovery: the student end to end on next tokens and on the teacher's logits. And stage 0, teacher
tuning: the LoRA factors alone by the same losses, through the teacher's softmax attention.

With LoRA the teacher is the same model with its factors switched off and softmax attention switched on, so a
second copy of the weights is needed only where all weights train.

Source: LAWCAT (arXiv 2509.18467), section on distillation; the KL term is ours.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lawcat.convert.initialize import is_new_parameter
from lawcat.distill.losses import LanguageLosses, language_loss
from lawcat.distill.recipe import RecoverySettings
from lawcat.errors import ConfigurationError, MissingDependencyError, did_you_mean
from lawcat.model.modeling_lawcat import LawcatForCausalLM


class RecoveryModel:
    """The student with what trains in stages 0 and 2, and the teacher inside or beside it.

    Args:
        student: After stage 1, or before stage 0. With LoRA its linear layers are replaced in place. Where it
            is in bfloat16, ``full_targets`` need autocast around all that follows: their weights become
            float32.
        settings: The stage's settings.

    Attributes:
        student: The student.
        lora_scale: ``alpha / rank``, 0 without LoRA.
    """

    def __init__(self, student: LawcatForCausalLM, settings: RecoverySettings) -> None:
        self.student = student
        self._settings = settings
        self._adapted: list[Any] = []
        self._teacher: LawcatForCausalLM | None = None
        self.lora_scale = 0.0
        if settings.train == "lora":
            _add_lora(student, settings)
            self._adapted = [module for module in student.modules() if hasattr(module, "_disable_adapters")]
            self.lora_scale = settings.lora_alpha / settings.lora_rank
        elif settings.kl_weight:
            self._teacher = copy.deepcopy(student).requires_grad_(False)
        for name, parameter in student.named_parameters():
            if settings.train == "all" or is_new_parameter(name):
                parameter.requires_grad_(True)
        self._trained = {name for name, p in student.named_parameters() if p.requires_grad}

    def train_factors(self) -> None:
        """Let the LoRA factors train and nothing else, as stage 0 does."""
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(is_lora_factor(name))

    def train_all(self) -> None:
        """Let all train that does in stage 2; so it is when this object is made."""
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name in self._trained)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups: new parameters, LoRA factors or the teacher's weights, and those
        that train in full beside LoRA, if any do."""
        settings = self._settings
        peaks = {"new": settings.new_parameter_learning_rate, "base": settings.learning_rate}
        if self._adapted and settings.full_targets:
            peaks["full"] = settings.full_learning_rate
        groups: dict[str, dict[str, Any]] = {
            name: {"name": name, "params": [], "peak": peak} for name, peak in peaks.items()
        }
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                kind = "new" if is_new_parameter(name) else "full" if is_trained_in_full(name) else "base"
                groups[kind]["params"].append(parameter)
        return list(groups.values())

    def teacher_hidden(self, input_ids: Tensor) -> Tensor:
        """Return the teacher's last hidden states [B, T, hidden], without gradient."""
        model = self._teacher if self._teacher is not None else self.student
        with torch.no_grad(), self._without_adapters(), model.teacher_mode():
            hidden: Tensor = model.model(input_ids, use_cache=False).last_hidden_state
        return hidden

    @contextlib.contextmanager
    def _without_adapters(self) -> Iterator[None]:
        """Within this context the layers that were adapted compute as they were before.

        As peft's ``disable_adapter``, which looks at the whole model each time: 50 ms with 30 layers.
        """
        for module in self._adapted:
            module._disable_adapters = True
        try:
            yield
        finally:
            for module in self._adapted:
                module._disable_adapters = False

    def losses(
        self,
        input_ids: Tensor,
        loss_weight: Tensor,
        kl_factor: Tensor | None = None,
        is_answer: Tensor | None = None,
        *,
        total_weight: Tensor | float,
        uses_softmax: bool = False,
    ) -> LanguageLosses:
        """Return loss, cross-entropy and KL, each the weighted sum over these tokens divided by
        ``total_weight``, and the weight of answers that are right.

        Args:
            input_ids: Tokens [B, T].
            loss_weight: The weight of predicting each of them [B, T].
            kl_factor: What the KL of each counts beside that [B, T]; None for 1 everywhere.
            is_answer: Which of them belong to an answer [B, T]; None for none.
            total_weight: The sum of weights of the whole step, over all processes.
            uses_softmax: Whether the losses are the teacher's with the LoRA factors, and not the student's.
        """
        settings = self._settings
        teacher_hidden = self.teacher_hidden(input_ids) if settings.kl_weight else None
        with self.student.teacher_mode() if uses_softmax else contextlib.nullcontext():
            hidden = self.student.model(input_ids, use_cache=False).last_hidden_state
        sums = language_loss(
            hidden[:, :-1],
            self.student.lm_head.weight,
            input_ids[:, 1:],
            loss_weight[:, 1:],
            teacher_hidden=None if teacher_hidden is None else teacher_hidden[:, :-1],
            teacher_head=None if self._teacher is None else self._teacher.lm_head.weight,
            kl_factors=None if kl_factor is None else kl_factor[:, 1:],
            is_answer=None if is_answer is None else is_answer[:, 1:],
            cross_entropy_weight=settings.cross_entropy_weight,
            kl_weight=settings.kl_weight,
            temperature=settings.kl_temperature,
        )
        return sums.divided_by(total_weight)

    def carried_losses(
        self,
        input_ids: Tensor,
        loss_weight: Tensor,
        num_trained_tokens: int,
        is_answer: Tensor | None = None,
        *,
        total_weight: Tensor | float,
    ) -> LanguageLosses:
        """Return the losses of the last tokens, the state before them carried over without gradient.

        The loss is their cross-entropy alone: a teacher would have to read all of them at once.

        Args:
            input_ids: Tokens [B, T].
            loss_weight: The weight of predicting each of them [B, T].
            num_trained_tokens: How many tokens at the end the gradient reaches.
            is_answer: Which of them belong to an answer [B, T]; None for none.
            total_weight: The sum of those tokens' weights of the whole step, over all processes.
        """
        decoder = self.student.model
        with torch.no_grad():
            cache = decoder(input_ids[:, :-num_trained_tokens], use_cache=True).past_key_values
        last, weight = input_ids[:, -num_trained_tokens:], loss_weight[:, -num_trained_tokens:]
        hidden = decoder(last, past_key_values=cache, use_cache=True).last_hidden_state
        sums = language_loss(
            hidden[:, :-1],
            self.student.lm_head.weight,
            last[:, 1:],
            weight[:, 1:],
            is_answer=None if is_answer is None else is_answer[:, -num_trained_tokens + 1 :],
            cross_entropy_weight=self._settings.cross_entropy_weight,
        )
        return sums.divided_by(total_weight)


def check_targets(decoder: nn.Module, settings: RecoverySettings) -> None:
    """Refuse names of linear layers that a student's decoder does not have.

    Args:
        decoder: Of any student of the teacher; its weights are not looked at.
        settings: The stage's settings.

    Raises:
        ConfigurationError: for the first such name of ``lora_targets`` or ``full_targets``.
    """
    # Of the decoder: the losses read the head's matrix itself, past factors that it might have.
    modules = decoder.named_modules()
    linear = {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)}
    for field in ("lora_targets", "full_targets"):
        for target in getattr(settings, field) or ():
            if target not in linear:
                raise ConfigurationError(
                    f"recovery.{field}: {target!r} is not a linear layer of the student's decoder; it has "
                    f"{', '.join(sorted(linear))}.{did_you_mean(target, sorted(linear))}"
                )


def _add_lora(student: LawcatForCausalLM, settings: RecoverySettings) -> None:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingDependencyError("peft", "distill", "stage 2 with train: lora") from error
    from lawcat.distill.lora import use_half_precision

    check_targets(student.model, settings)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=list(settings.lora_targets),
        # Beside the copy that trains, peft keeps the module as it was: the teacher's.
        modules_to_save=list(settings.full_targets or ()) or None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft still asks transformers for a name that is on its way out
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        get_peft_model(student, config)
    if next(student.parameters()).is_cuda:  # on a CPU float32 products cost next to nothing
        use_half_precision(student)
    for name, parameter in student.named_parameters():
        if is_trained_in_full(name):  # bfloat16 would round small updates away
            parameter.data = parameter.data.float()


def is_lora_factor(name: str) -> bool:
    """Return whether a parameter's name is that of a LoRA factor.

    >>> is_lora_factor("model.layers.0.self_attn.q_proj.lora_A.default.weight")
    True
    """
    return ".lora_" in name


def is_trained_in_full(name: str) -> bool:
    """Return whether a parameter's name is that of a weight of ``full_targets`` as it trains.

    >>> is_trained_in_full("model.layers.0.mlp.up_proj.modules_to_save.default.weight")
    True
    """
    return ".modules_to_save." in name


def plain_name(name: str) -> str:
    """Return a parameter's name as it is in an adapter or student, without what PEFT puts into it.

    >>> plain_name("model.layers.0.self_attn.q_proj.lora_A.default.weight")
    'model.layers.0.self_attn.q_proj.lora_A.weight'
    >>> plain_name("model.layers.0.mlp.up_proj.modules_to_save.default.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    for part in (".lora_A", ".lora_B"):
        name = name.replace(f"{part}.default.", f"{part}.")
    return name.replace(".modules_to_save.default.", ".")
