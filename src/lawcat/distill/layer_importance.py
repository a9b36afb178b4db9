"""Which layers a hybrid should keep as softmax: those whose linear attention costs most.

Of a student after stage 1 the teacher is still inside, since only the new parameters have trained. So any set
of its layers can be switched to the teacher's softmax attention, and the cost of the rest measured as the
divergence of next-token distributions from the teacher's: of all tokens of a text, or of those alone that
answer questions on it. The two need not agree, since few tokens of a text look anything up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lawcat.convert.adapter import Adapter, is_adapter
from lawcat.distill.losses import hidden_divergence
from lawcat.distill.mixture import build_mixture
from lawcat.distill.recipe import DataSource, Recipe, RecoverySettings
from lawcat.distill.sources import seed_of
from lawcat.distill.text import Progress
from lawcat.errors import ConfigurationError
from lawcat.model.configuration_lawcat import LINEAR
from lawcat.model.modeling_lawcat import LawcatForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LayerImportance:
    """What one layer's linear attention costs; divergences in nats a token.

    Attributes:
        layer: Counted from 0.
        linearized: Divergence from the teacher when this layer alone is linear.
        restored: Divergence when this layer alone is softmax, and the others as in the student.
        gain: By how much that is less than the student's own.
        gain_error: Standard error of the gain over sequences; NaN of a single one.
    """

    layer: int
    linearized: float
    restored: float
    gain: float
    gain_error: float


@dataclass(frozen=True)
class ChosenLayer:
    """A layer chosen to be softmax, and the divergence with it and all that were chosen before."""

    layer: int
    divergence: float


@dataclass(frozen=True)
class LayerRanking:
    """What `rank_layers` found.

    Attributes:
        divergence: The student's as it is, in nats a token.
        layers: Its linear layers, that of the largest gain first.
        chosen: Layers to keep as softmax, the first chosen first.
        num_sequences: How many sequences were read.
        num_tokens: Tokens of each.
        num_weighed: Of all these tokens, how many are weighed; ``None`` for all of them.
    """

    divergence: float
    layers: tuple[LayerImportance, ...]
    chosen: tuple[ChosenLayer, ...]
    num_sequences: int
    num_tokens: int
    num_weighed: int | None = None

    @property
    def softmax_layers(self) -> list[int]:
        """The chosen layers in order, for `model.softmax_layers` of a recipe."""
        return sorted(chosen.layer for chosen in self.chosen)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data; a NaN becomes null."""
        found = asdict(self) | {"softmax_layers": self.softmax_layers}
        for layer in found["layers"]:
            if math.isnan(layer["gain_error"]):
                layer["gain_error"] = None
        return found

    def table(self) -> str:
        """Return what a reader wants to see, as aligned text."""
        which = "over" if self.num_weighed is None else f"at {self.num_weighed} tokens of answers in"
        lines = [
            f"divergence from the teacher's next tokens, nats a token, {which} "
            f"{self.num_sequences} x {self.num_tokens} tokens; {self.divergence:.4f} as the student is",
            "",
            "layer   alone linear   alone softmax             gain",
        ]
        for row in self.layers:
            error = "" if math.isnan(row.gain_error) else f" +- {row.gain_error:.4f}"
            lines.append(
                f"{row.layer:5}   {row.linearized:12.4f}   {row.restored:13.4f}   {row.gain:8.4f}{error}"
            )
        if self.chosen:
            steps = ", ".join(f"{chosen.layer} ({chosen.divergence:.4f})" for chosen in self.chosen)
            lines += ["", f"chosen one after another, with the divergence then: {steps}"]
            lines += [f"model.softmax_layers: {self.softmax_layers}"]
        return "\n".join(lines)


def rank_layers(
    student: LawcatForCausalLM,
    input_ids: Tensor,
    *,
    weight: Tensor | None = None,
    num_softmax_layers: int = 4,
    batch_sequences: int = 1,
    progress: Progress | None = None,
) -> LayerRanking:
    """Return what each linear layer costs, and which few are best left as softmax.

    Layers are chosen one after another: first that whose restoration lowers the divergence most, then that
    which does so beside it, and so on. Layers that do the same thing are so not both chosen, as they might be
    from gains of single layers.

    Args:
        student: After stage 1 and not after stage 2: its projections must still be the teacher's.
        input_ids: Held-out text [N, T].
        weight: What the prediction of each token counts beside the others of its sequence [N, T], 0 or more,
            as ``answer_data`` returns it; ``None`` for all alike.
        num_softmax_layers: How many layers to choose, less than the student has linear ones; 0 for none.
        batch_sequences: Sequences read at once.
        progress: Called after each set of layers.

    Returns:
        The ranking.

    Raises:
        ConfigurationError: if there are fewer linear layers than are to be chosen, or none would be left; or
            if a sequence has no token of weight.

    Source: ours; that single layers matter most to hybrids is in many reports.

    Example:
        >>> rank_layers(student, windows).softmax_layers  # doctest: +SKIP
        [3, 12, 17, 21]
    """
    types = student.present_layer_types()
    linear = [i for i, kind in enumerate(types) if kind == LINEAR]
    if not 0 <= num_softmax_layers < len(linear):
        raise ConfigurationError(
            f"{num_softmax_layers} softmax layers cannot be chosen: the student has {len(linear)} linear "
            "layers, of which at least one has to stay. Choose fewer."
        )
    if weight is not None and not (weight[:, 1:].sum(-1) > 0).all():
        raise ConfigurationError("A sequence has no token of weight: give each at least one after the first.")
    rounds = [len(linear) - chosen for chosen in range(1, num_softmax_layers)]
    total = 1 + 2 * len(linear) + sum(rounds)
    batches = torch.split(input_ids, batch_sequences)
    # The distribution at t is that of token t + 1.
    weights = torch.ones(input_ids.shape) if weight is None else F.pad(weight[:, 1:].cpu(), (0, 1))
    device = student.model.embed_tokens.weight.device
    done = 0

    def hidden(batch: Tensor) -> Tensor:
        state: Tensor = student.model(batch.to(device), use_cache=False).last_hidden_state
        return state

    def divergence(softmax_layers: Sequence[int]) -> Tensor:
        """Return the divergence of each sequence [N], float64."""
        nonlocal done
        with torch.no_grad(), student.softmax_in(softmax_layers):
            found = [
                hidden_divergence(hidden(batch), theirs, student.lm_head.weight)
                for batch, theirs in zip(batches, teacher, strict=True)
            ]
        done += 1
        if progress is not None:
            progress("layers compared", done, total, {})
        return (torch.cat(found).cpu().double() * weights).sum(-1) / weights.sum(-1)

    was_training = student.training
    student.eval()  # dropout would tell layers apart that are the same
    try:
        with torch.no_grad(), student.teacher_mode():
            teacher = [hidden(batch) for batch in batches]
        as_is = divergence(())
        others = {layer: [i for i in range(len(types)) if i != layer] for layer in linear}
        linearized = {layer: divergence(others[layer]).mean().item() for layer in linear}
        restored = {layer: divergence([layer]) for layer in linear}
        rows = [_importance(layer, linearized[layer], restored[layer], as_is) for layer in linear]
        chosen: list[ChosenLayer] = []
        found = {layer: values.mean().item() for layer, values in restored.items()}
        for _ in range(num_softmax_layers):
            if chosen:
                kept = [before.layer for before in chosen]
                left = [layer for layer in linear if layer not in kept]
                found = {layer: divergence([*kept, layer]).mean().item() for layer in left}
            best = min(found, key=found.__getitem__)
            chosen.append(ChosenLayer(best, found[best]))
    finally:
        student.train(was_training)
    return LayerRanking(
        as_is.mean().item(),
        tuple(sorted(rows, key=lambda row: -row.gain)),
        tuple(chosen),
        num_sequences=input_ids.shape[0],
        num_tokens=input_ids.shape[1],
        num_weighed=None if weight is None else int((weights > 0).sum()),
    )


@dataclass(frozen=True, eq=False)
class AnswerData:
    """Samples of a recipe's tasks, packed as training packs them.

    Attributes:
        input_ids: Tokens [N, T].
        weight: What each token counts in stage 2 if it belongs to an answer, else 0 [N, T].
        record: What a record of the run says of this data.
    """

    input_ids: Tensor
    weight: Tensor
    record: dict[str, Any]


def answer_data(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_sequences: int,
    num_tokens: int,
    seed: int = 0,
    prose: Sequence[str] = (),
    progress: Progress | None = None,
) -> AnswerData:
    """Return samples of a recipe's tasks, in its proportions, that training by the recipe has not seen.

    Args:
        recipe: One with a source of task data: passkey, needle or babilong. Its other sources are left out.
        tokenizer: The teacher's.
        num_sequences: N.
        num_tokens: T.
        seed: Seed of the samples; with the recipe's own they are different ones.
        prose: Files or globs of held-out text, to hide needles and facts in; the recipe's where empty.
        progress: Called while files are read.

    Returns:
        The samples.

    Raises:
        ConfigurationError: if the recipe has no task data, or samples longer than T.
        DataError: if its files cannot be read, or a sample takes more than T tokens.

    Example:
        >>> data = answer_data(recipe, tokenizer, num_sequences=16, num_tokens=1024)  # doctest: +SKIP
        >>> rank_layers(student, data.input_ids, weight=data.weight).softmax_layers  # doctest: +SKIP
        [13, 17, 18, 23]
    """
    sources = tuple(_with_prose(source, recipe, prose) for source in recipe.data if source.is_task)
    if not sources:
        raise ConfigurationError(
            f"The recipe {recipe.name!r} has no task data, so there are no answers to rank layers by: give "
            "one with a source of provider passkey, needle or babilong, or rank by text."
        )
    only_tasks = Recipe(
        name=recipe.name,
        seed=seed_of("rank-layers", recipe.seed, seed),
        sequence_length=num_tokens,
        data=sources,
        recovery=RecoverySettings(
            answer_weight=recipe.recovery.answer_weight, context_weight=recipe.recovery.context_weight
        ),
    )
    mixture = build_mixture(only_tasks, tokenizer, progress=progress)
    batch = mixture.batch(0, num_sequences)
    return AnswerData(batch.input_ids, batch.loss_weight * batch.is_answer, mixture.describe())


def _with_prose(source: DataSource, recipe: Recipe, prose: Sequence[str]) -> DataSource:
    if prose and source.provider in ("needle", "babilong"):
        return replace(source, path=tuple(prose), text_field="text")
    if source.provider == "needle" and (theirs := recipe.prose_sources(source)) and not source.paths:
        paths = tuple(path for one in theirs for path in one.paths)
        return replace(source, path=paths, text_field=theirs[0].text_field)
    return source


def _importance(layer: int, linearized: float, restored: Tensor, as_is: Tensor) -> LayerImportance:
    gain = as_is - restored  # of the same sequences, so that their differences cancel
    error = gain.std().item() / math.sqrt(len(gain)) if len(gain) > 1 else math.nan
    return LayerImportance(layer, linearized, restored.mean().item(), gain.mean().item(), error)


def check_rankable(path: str | Path) -> None:
    """Refuse a student whose projections are known to have trained: the teacher is no longer inside.

    Args:
        path: Folder of a student or adapter. Of a student without a record nothing is known.

    Raises:
        ConfigurationError: after stage 2.
    """
    folder = Path(path)
    if is_adapter(folder):
        is_recovered = Adapter.load(folder).lora_scale != 0
    else:
        try:
            is_recovered = "2" in json.loads((folder / "lawcat_run.json").read_bytes())["stages"]
        except (OSError, ValueError, KeyError, TypeError):
            return
    if is_recovered:
        raise ConfigurationError(
            f"{path} has been through stage 2, so its softmax layers would not be the teacher's. Rank the "
            "layers of a student that stage 1 alone has trained: lawcat linearize TEACHER OUT --recipe ... "
            "--set teacher_tuning.steps=0 --set recovery.steps=0 --no-evaluate"
        )


__all__ = [
    "AnswerData",
    "ChosenLayer",
    "LayerImportance",
    "LayerRanking",
    "answer_data",
    "check_rankable",
    "rank_layers",
]
