"""The recipe: every choice of a distillation run as one frozen object that reads and writes YAML."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from lawcat.errors import ConfigurationError, did_you_mean

Provider = Literal["text", "hub", "passkey", "needle", "babilong", "teacher"]
Precision = Literal["auto", "float32", "bfloat16"]

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class _FieldError(ConfigurationError):
    """A bad field. Carries its dotted key, so that each level above can put its own name in front."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.problem = problem

    def under(self, prefix: str) -> _FieldError:
        return _FieldError(f"{prefix}.{self.key}", self.problem)


class _Settings:
    """Base of the recipe's parts: reads each field by its annotation, then checks them against each other."""

    def __post_init__(self) -> None:
        cls: Any = type(self)
        hints = _hints(cls)
        for field in dataclasses.fields(cls):
            value = _read(getattr(self, field.name), hints[field.name], field.name)
            object.__setattr__(self, field.name, value)
        for name, reason in self._without_effect().items():
            if getattr(self, name) != _default(cls, name):
                raise _FieldError(name, f"got {getattr(self, name)!r}, which {reason}; leave it out.")
        self._check()

    def _without_effect(self) -> dict[str, str]:
        """Return the fields that the other fields make meaningless, each with why."""
        return {}

    def _check(self) -> None:
        """Raise `_FieldError` for values out of range or in contradiction."""


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _default(cls: Any, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(cls) if field.name == name)


def _fail(key: str, value: object, rule: str) -> _FieldError:
    return _FieldError(key, f"got {value!r}; {rule}")


def _read(value: Any, hint: Any, key: str) -> Any:
    """Return `value` as the annotation `hint` has it, or raise `_FieldError`.

    YAML 1.1 reads `1e-3` (no dot) as a string, so a float field takes a string that is a number.
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _read_union(value, get_args(hint), key)
    if origin is Literal:
        allowed = get_args(hint)
        if value not in allowed:
            guess = did_you_mean(str(value), [str(a) for a in allowed])
            raise _fail(key, value, f"use one of {', '.join(map(repr, allowed))}.{guess}")
        return value
    if origin is tuple:
        return _read_tuple(value, get_args(hint), key)
    if hint is Matrix:
        return value if isinstance(value, Matrix) else _read_matrix(value, key)
    if dataclasses.is_dataclass(hint):
        return _read_settings(value, hint, key)
    if hint is bool:
        if not isinstance(value, bool):
            raise _fail(key, value, "give true or false.")
        return value
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _fail(key, value, "give a whole number.")
        return value
    if hint is float:
        if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise _fail(key, value, "give a finite number.")
        return float(value)
    if hint is str:
        if not isinstance(value, str):
            raise _fail(key, value, "give text (in quotes if it looks like a number).")
        return value
    raise AssertionError(f"no reader for the annotation {hint!r}")


def _read_union(value: Any, hints: tuple[Any, ...], key: str) -> Any:
    if value is None and type(None) in hints:
        return None
    others = [hint for hint in hints if hint is not type(None)]
    for hint in others[:-1]:
        try:
            return _read(value, hint, key)
        except _FieldError:
            continue
    return _read(value, others[-1], key)


def _read_tuple(value: Any, hints: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _fail(key, value, "give a list.")
    if hints[-1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(value) != len(hints):
        raise _fail(key, list(value), f"give a list of {len(hints)}.")
    return tuple(
        _read(item, hint, f"{key}.{i}") for i, (item, hint) in enumerate(zip(value, hints, strict=True))
    )


def _read_settings(value: Any, cls: Any, key: str) -> Any:
    if isinstance(value, cls):
        return value
    try:
        return _build(cls, value)
    except _FieldError as error:
        # An empty key means that the mapping itself is wrong, not a field of it.
        raise error.under(key) if error.key else _FieldError(key, error.problem) from None


def _build(cls: Any, values: Any) -> Any:
    """Make a settings object from a mapping; unknown and missing keys are refused."""
    if not isinstance(values, Mapping):
        raise _FieldError("", f"got {values!r}; give a mapping of keys to values.")
    allowed = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in allowed:
            guess = did_you_mean(str(name), allowed)
            raise _FieldError(str(name), f"unknown key.{guess} Allowed here: {', '.join(allowed)}.")
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise _FieldError(field.name, "is missing; give a value.")
    settings = cls(**values)
    # The object itself cannot tell a field left out from one given at its default; the mapping can.
    for name, reason in settings._without_effect().items():
        if name in values:
            raise _FieldError(name, f"got {values[name]!r}, which {reason}; leave it out.")
    return settings


def _write(settings: Any) -> dict[str, Any]:
    """Return the settings as plain lists and dicts, without fields that are not set or have no effect."""
    written: dict[str, Any] = {}
    silent = settings._without_effect()
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is None or field.name in silent:
            continue
        written[field.name] = _write_value(value)
    return written


def _write_value(value: Any) -> Any:
    if isinstance(value, Matrix):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return _write(value)
    if isinstance(value, tuple | list):
        return [_write_value(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _write_value(item) for key, item in value.items()}
    return value


def _override(cls: Any, values: dict[str, Any], parts: list[str], value: Any) -> None:
    """Put `value` at the dotted key `parts` into `values`, the mapping of a settings class."""
    name, rest = parts[0], parts[1:]
    hints = _hints(cls)
    allowed = [field.name for field in dataclasses.fields(cls)]
    if name not in allowed:
        raise _FieldError(
            name, f"unknown key.{did_you_mean(name, allowed)} Allowed here: {', '.join(allowed)}."
        )
    hint = hints[name]
    if not rest:
        parsed = _parse(value, hint, name) if isinstance(value, str) else value
        values[name] = _write_value(_read(parsed, hint, name))
        return
    try:
        if dataclasses.is_dataclass(hint):
            _override(hint, values.setdefault(name, {}), rest, value)
        elif get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0]):
            _override_item(name, get_args(hint)[0], values.setdefault(name, []), rest, value)
        else:
            raise _FieldError(".".join(rest), f"unknown key; {name} is a single value.")
    except _FieldError as error:
        raise error.under(name) from None


def _override_item(name: str, cls: Any, items: list[dict[str, Any]], parts: list[str], value: Any) -> None:
    number, rest = parts[0], parts[1:]
    if not number.isdecimal() or int(number) >= len(items):
        raise _FieldError(number, f"unknown key. Entries are numbered 0 to {len(items) - 1}.")
    if not rest:
        raise _FieldError(number, f"name one of its keys, such as {name}.{number}.weight.")
    try:
        _override(cls, items[int(number)], rest, value)
    except _FieldError as error:
        raise error.under(number) from None


def _parse(text: str, hint: Any, key: str) -> Any:
    """Return what a command line's `text` stands for in a field of type `hint`; `_read` judges it."""
    if get_origin(hint) in (Union, types.UnionType):
        # Not "none" where text is wanted: it is a choice of the gate.
        nothing = ("null", "~", "") if str in get_args(hint) else ("null", "none", "~", "")
        if type(None) in get_args(hint) and text.strip().lower() in nothing:
            return None
        others = [h for h in get_args(hint) if h is not type(None)]
        tuples = [h for h in others if get_origin(h) is tuple]
        return _parse(text, tuples[0] if tuples and text.lstrip().startswith("[") else others[0], key)
    is_tuple = get_origin(hint) is tuple
    if dataclasses.is_dataclass(hint) or (is_tuple and text.lstrip().startswith("[")):
        try:
            return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader
        except yaml.YAMLError:
            raise _fail(key, text, "this is not valid YAML.") from None
    if is_tuple:
        return [_parse(part.strip(), get_args(hint)[0], key) for part in text.split(",") if part.strip()]
    if hint is bool:
        return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(
            text.strip().lower(), text
        )
    if hint is int and re.fullmatch(r"[-+]?\d[\d_]*", text.strip()):
        return int(text)
    return text


def _drop_ineffective(cls: Any, values: dict[str, Any], kept: frozenset[str], prefix: str = "") -> None:
    """Remove fields that other fields now make meaningless. Those asked for stay, and are refused later."""
    hints = _hints(cls)
    # A bare object, because the values are judged only when all of them are in place.
    probe = object.__new__(cls)
    for field in dataclasses.fields(cls):
        fallback = None if field.default is dataclasses.MISSING else field.default
        object.__setattr__(probe, field.name, values.get(field.name, fallback))
    for name in probe._without_effect():
        if prefix + name not in kept:
            values.pop(name, None)
    for name, value in values.items():
        hint = hints[name]
        if isinstance(value, dict):
            _drop_ineffective(hint, value, kept, f"{prefix}{name}.")
        elif isinstance(value, list) and get_args(hint) and dataclasses.is_dataclass(get_args(hint)[0]):
            for i, item in enumerate(value):
                _drop_ineffective(get_args(hint)[0], item, kept, f"{prefix}{name}.{i}.")


def dotted_keys(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested overrides by dotted key.

    >>> dotted_keys({"recovery": {"steps": 1}, "model.gate": "head"})
    {'recovery.steps': 1, 'model.gate': 'head'}
    """
    flat: dict[str, Any] = {}
    for name, value in overrides.items():
        if isinstance(value, Mapping) and value:
            flat.update({f"{name}.{inner}": v for inner, v in dotted_keys(value).items()})
        else:
            flat[name] = value
    return flat


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice; YAML's rule that the last one counts hides mistakes."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            is_merge = key_node.tag == "tag:yaml.org,2002:merge"  # <<: *anchor
            key = "<<" if is_merge else self.construct_object(key_node, deep=True)
            if isinstance(key, str):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} is given twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


def _shipped_folder() -> Any:
    return resources.files("lawcat").joinpath("recipes")


def _positive(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise _fail(name, value, "it must be above 0.")


def _not_negative(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 0:
            raise _fail(name, value, "it must be 0 or above.")


@dataclass(frozen=True)
class ModelSettings(_Settings):
    """The student's operator: fields of `LawcatConfig`, of which only those that are set are passed on.

    Args:
        softmax_layers: Layers, counted from 0, that keep the teacher's softmax attention.
        feature_dim: As in `LawcatConfig`, and so all below.
        use_conv: Convolution on q and k.
        conv_kernel_size: Its taps.
        conv_init_std: Where those of preceding tokens start.
        use_normalizer: Divide by the decayed sum of weights.
        normalizer_eps: Added to that sum.
        gate: `"channel"`, `"head"` or `"none"`.
        gate_rank: Inner width of the gate's projection.
        gate_divisor: Divisor of its log sigmoid.
        gate_bias_init: `"zeros"` or `"spread"`.
        min_log_decay: Lower bound of the log decay a token.
        linear_rope: Rotary embedding on linear layers too.
        state_heads: `"query"` or `"kv"`.
        feature_map: `"tied"` or `"untied"`.
        sliding_window: Tokens of softmax attention inside each linear layer.
        num_sinks: First tokens that never leave that window.

    Example:
        >>> ModelSettings(gate="head", softmax_layers=(0,)).config_fields()
        {'gate': 'head'}
    """

    softmax_layers: tuple[int, ...] = ()
    feature_dim: int | None = None
    use_conv: bool | None = None
    conv_kernel_size: int | None = None
    conv_init_std: float | None = None
    use_normalizer: bool | None = None
    normalizer_eps: float | None = None
    gate: str | None = None
    gate_rank: int | None = None
    gate_divisor: float | None = None
    gate_bias_init: str | None = None
    min_log_decay: float | None = None
    linear_rope: bool | None = None
    state_heads: str | None = None
    feature_map: str | None = None
    sliding_window: int | None = None
    num_sinks: int | None = None

    def config_fields(self) -> dict[str, Any]:
        """Return the fields of `LawcatConfig` that this recipe sets."""
        fields = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "softmax_layers"
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _check(self) -> None:
        if any(layer < 0 for layer in self.softmax_layers):
            raise _fail("softmax_layers", list(self.softmax_layers), "layers count from 0.")
        if len(set(self.softmax_layers)) != len(self.softmax_layers):
            raise _fail("softmax_layers", list(self.softmax_layers), "name each layer once.")
        fields = self.config_fields()
        if not fields:
            return
        # The configuration itself knows what its fields allow; the teacher's head_dim is not known here, so
        # one that holds any feature_dim stands in for it.
        from lawcat.model.configuration_lawcat import LawcatConfig

        try:
            LawcatConfig(num_hidden_layers=1, head_dim=max(64, self.feature_dim or 0), **fields)
        except Exception as error:
            text = str(error.__cause__ or error)
            name = next((name for name in fields if f"{name}=" in text), "")
            raise _FieldError(name, text) from error


@dataclass(frozen=True)
class DataSource(_Settings):
    """One ingredient of the training data.

    Args:
        provider: `"text"` (files), `"hub"` (a data set streamed by name), `"passkey"`, `"needle"` and
            `"babilong"` (task data made on the fly), `"teacher"` (text that the teacher writes itself).
        weight: Share of the sequences, relative to the other sources' weights; above 0.
        carried_weight: The same among the long sequences of `recovery.carried_segments`; 0 for none, `None`
            for the same as `weight`.
        name: Name in logs and records; `None` means the provider's.
        path: Provider text, required: a file or glob, or a list of them, of `.txt`, `.md` and `.jsonl`, plain
            or with `.gz` or `.xz` after it. Provider needle: the prose to hide needles in, likewise; `None`
            means that of the recipe's text sources. It must not be text that you evaluate on. Provider
            babilong: the prose between the facts, likewise; without any, a noise sentence is repeated.
        text_field: Providers text, needle, babilong and hub: the field of a JSONL line or of a row that holds
            the text.
        dataset: Provider hub, required: the data set's name on the hub.
        subset: Provider hub: the data set's configuration, if it has several.
        split: Provider hub: its split.
        revision: Provider hub: a branch, tag or commit; a commit makes the data reproducible.
        value_kinds: Provider needle: what is hidden, drawn with equal chance from this list of `"numbers"`,
            `"words"` and `"uuids"`; repeat one to have it more often.
        haystacks: Provider needle: what it is hidden in, likewise: `"prose"`, `"noise"` (lines of the noise
            sentence, as `niah_single_1`) or `"needle"` (among other needles, as `niah_multikey_2`).
        num_keys: Provider needle: how many needles are hidden, one of which is asked for, likewise.
        needles: Provider needle: in half of the samples so many needles with different keys are hidden, and
            each is asked for, one after another, as far as there is room; 1 for one question a sample.
        tasks: Provider babilong: which of `"qa1"` to `"qa5"`, drawn with equal chance from this list; repeat
            one to have it more often. A prompt without facts takes some 200 to 300 tokens.
        questions: Provider babilong: most questions about the facts of one sample, each with its answer; 1
            for one alone, as in the evaluation.
        noise_shares: Provider babilong: how many samples are filled up with noise, have some, and have none,
            relative to one another, as in `[1, 1, 6]`; `None` for 4, 3 and 1. Those of
            `recovery.carried_segments` are all filled up.
        answer_weight: Providers passkey, needle and babilong: `recovery.answer_weight` for this source's
            answers; above 0, `None` for what the recipe says.
        label_weight: Provider babilong: the same for the one word of an answer that does not follow from the
            question (a place, a person or an object); `None` for the same as the rest of the answer.
        answer_kl_weight: Providers passkey, needle and babilong: `recovery.kl_weight` is multiplied by it on
            this source's answers; 0 where the teacher's own would be wrong, `None` for 1.
        min_sample_tokens: Providers passkey, needle and babilong: least length of a sample. Lengths vary
            between this and the sequence length.
        num_tokens: Provider teacher: tokens to sample. When training needs more, they come round again in
            another order.
        temperature: Provider teacher: temperature of sampling.
        top_p: Provider teacher: probability mass that is sampled from.

    Example:
        >>> DataSource(provider="text", path="corpus/*.txt", weight=2).weight
        2.0
    """

    provider: Provider
    weight: float = 1.0
    carried_weight: float | None = None
    name: str | None = None
    path: str | tuple[str, ...] | None = None
    text_field: str = "text"
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    value_kinds: tuple[Literal["numbers", "words", "uuids"], ...] = ("numbers", "numbers", "words", "uuids")
    haystacks: tuple[Literal["prose", "noise", "needle"], ...] = ("prose",)
    num_keys: tuple[int, ...] = (1,)
    needles: int = 1
    tasks: tuple[Literal["qa1", "qa2", "qa3", "qa4", "qa5"], ...] = ("qa1", "qa2", "qa3")
    questions: int = 1
    noise_shares: tuple[float, float, float] | None = None
    answer_weight: float | None = None
    label_weight: float | None = None
    answer_kl_weight: float | None = None
    min_sample_tokens: int = 96
    num_tokens: int = 32768
    temperature: float = 1.0
    top_p: float = 0.95

    _OPTIONS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": ("path", "text_field"),
        "hub": ("dataset", "subset", "split", "revision", "text_field"),
        "passkey": ("answer_weight", "answer_kl_weight", "min_sample_tokens"),
        "needle": (
            "path",
            "text_field",
            "value_kinds",
            "haystacks",
            "num_keys",
            "needles",
            "answer_weight",
            "answer_kl_weight",
            "min_sample_tokens",
        ),
        "babilong": (
            "path",
            "text_field",
            "tasks",
            "questions",
            "noise_shares",
            "answer_weight",
            "label_weight",
            "answer_kl_weight",
            "min_sample_tokens",
        ),
        "teacher": ("num_tokens", "temperature", "top_p"),
    }

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths and globs given, none, one or several."""
        if self.path is None:
            return ()
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def is_task(self) -> bool:
        """Whether this source is made by the generators that also make evaluation samples."""
        return self.provider in ("passkey", "needle", "babilong")

    def _without_effect(self) -> dict[str, str]:
        own = ("provider", "weight", "carried_weight", "name", *self._OPTIONS[self.provider])
        others = [field.name for field in dataclasses.fields(self) if field.name not in own]
        users = {name: [p for p, options in self._OPTIONS.items() if name in options] for name in others}
        return {name: f"is for provider {' or '.join(users[name])}, not {self.provider}" for name in others}

    def _check(self) -> None:
        _positive(
            self,
            "weight",
            "needles",
            "questions",
            "answer_weight",
            "label_weight",
            "min_sample_tokens",
            "num_tokens",
            "temperature",
            "top_p",
        )
        _not_negative(self, "carried_weight", "answer_kl_weight")
        if self.top_p > 1:
            raise _fail("top_p", self.top_p, "it must be at most 1.")
        if self.provider == "text" and not self.paths:
            raise _FieldError(
                "path", "is missing; provider text needs a file or glob of .txt, .md or .jsonl."
            )
        if any(not path for path in self.paths):
            raise _fail("path", self.path, "a path is empty; give a file or glob.")
        if self.provider == "hub" and not self.dataset:
            raise _FieldError("dataset", "is missing; provider hub needs the name of a data set.")
        if not self.value_kinds:
            raise _fail("value_kinds", [], "name at least one kind.")
        if not self.haystacks:
            raise _fail("haystacks", [], "name at least one: prose, noise or needle.")
        if not self.num_keys or min(self.num_keys) < 1:
            raise _fail("num_keys", list(self.num_keys), "give at least one number, none below 1.")
        if self.needles > 40:
            raise _fail("needles", self.needles, "it must be at most 40; prose has places for no more.")
        if not self.tasks:
            raise _fail("tasks", [], "name at least one, such as qa2.")
        if self.noise_shares is not None and (min(self.noise_shares) < 0 or not any(self.noise_shares)):
            raise _fail("noise_shares", list(self.noise_shares), "none may be below 0, and not all 0.")


@dataclass(frozen=True)
class _OptimizerSettings(_Settings):
    """What the stages have in common."""

    steps: int = 100
    batch_sequences: int = 16
    learning_rate: float = 1e-3
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "trapezoid", "constant"] = "cosine"
    decay_share: float = 0.2
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    gate_penalty: float = 0.0

    def _without_effect(self) -> dict[str, str]:
        silent = {}
        if self.schedule == "constant":
            silent["min_learning_rate_ratio"] = "has no effect with schedule: constant"
        if self.schedule != "trapezoid":
            silent["decay_share"] = "is for schedule: trapezoid"
        return silent

    def _check(self) -> None:
        _not_negative(self, "steps", "warmup_steps", "weight_decay", "gate_penalty")
        if not 0 < self.decay_share <= 1:
            raise _fail("decay_share", self.decay_share, "it must be above 0 and at most 1.")
        _positive(self, "batch_sequences", "learning_rate", "max_grad_norm")
        if not 0 <= self.min_learning_rate_ratio <= 1:
            raise _fail("min_learning_rate_ratio", self.min_learning_rate_ratio, "it must be from 0 to 1.")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise _fail("betas", list(self.betas), "each must be at least 0 and below 1.")
        if self.steps and self.warmup_steps >= self.steps:
            raise _fail("warmup_steps", self.warmup_steps, f"it must be below steps, which is {self.steps}.")


@dataclass(frozen=True)
class TeacherTuningSettings(_OptimizerSettings):
    """Stage 0: the LoRA factors of stage 2 learn the data's tasks in the teacher's softmax attention, which
    stage 1 then fits linear attention to.

    They are made as `recovery` says (`lora_rank`, `lora_alpha`, `lora_targets`), trained by its losses
    (`cross_entropy_weight`, `kl_weight`, the weights of tokens; no `carried_segments`), and go on training in
    stage 2. Nothing else trains here.

    Args:
        steps: Optimizer steps; 0 skips the stage. Above 0 it needs `recovery.train: lora` and
            `recovery.steps` above 0.
        batch_sequences: Sequences a step, over all processes.
        learning_rate: Peak learning rate.
        min_learning_rate_ratio: The last learning rate over the peak one (not with schedule constant).
        warmup_steps: Steps over which the learning rate grows linearly from zero.
        schedule: After the warm-up, `"cosine"` or `"linear"` from the peak down, `"trapezoid"` (at the peak,
            then linearly down), or `"constant"`.
        decay_share: Share of the steps after the warm-up in which a trapezoid goes down.
        weight_decay: AdamW's.
        betas: AdamW's.
        max_grad_norm: Norm to which gradients are clipped.
        gate_penalty: Not for this stage; softmax attention has no gates.

    Example:
        >>> TeacherTuningSettings(steps=20).learning_rate
        0.001
    """

    steps: int = 0

    def _without_effect(self) -> dict[str, str]:
        reason = "is for stages that run linear attention, which has the gates"
        return {**super()._without_effect(), "gate_penalty": reason}


@dataclass(frozen=True)
class AttentionTransferSettings(_OptimizerSettings):
    """Stage 1: each layer's linear attention is fitted to the teacher's softmax attention; new parameters
    only.

    Args:
        steps: Optimizer steps; 0 skips the stage.
        batch_sequences: Sequences a step, over all processes.
        learning_rate: Peak learning rate.
        min_learning_rate_ratio: The last learning rate over the peak one (not with schedule constant).
        warmup_steps: Steps over which the learning rate grows linearly from zero.
        schedule: After the warm-up, `"cosine"` or `"linear"` from the peak down, `"trapezoid"` (at the peak,
            then linearly down), or `"constant"`.
        decay_share: Share of the steps after the warm-up in which a trapezoid goes down.
        weight_decay: AdamW's.
        betas: AdamW's.
        max_grad_norm: Norm to which gradients are clipped. Without it, gates saturate at this learning rate.
        gate_penalty: Weight of what pulls gates towards holding: the mean of `-log a * gate_divisor` over
            channels, tokens and layers. 0 for none.
        answer_weight: What the error where answers are predicted counts beside the error of all tokens, each
            relative to the teacher's output there; of an answer's tokens each counts as in stage 2. Few
            tokens of a sequence look something up, and the mean over all hardly shows them. `None` for 0.

    Example:
        >>> AttentionTransferSettings(steps=50).learning_rate
        0.005
    """

    learning_rate: float = 5e-3
    answer_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _not_negative(self, "answer_weight")


@dataclass(frozen=True)
class RecoverySettings(_OptimizerSettings):
    """Stage 2: the whole model is trained end to end on next tokens and on the teacher's logits.

    A token's loss counts `answer_weight` if it belongs to the answer of a task sample, `context_weight` if to
    the rest of one, and 1 in any other text. A data source may say otherwise for its answers.

    Args:
        steps: Optimizer steps; 0 skips the stage.
        batch_sequences: Sequences a step, over all processes.
        learning_rate: Peak learning rate of the LoRA factors, or of the teacher's weights with `train: all`.
        min_learning_rate_ratio: The last learning rate over the peak one (not with schedule constant).
        warmup_steps: Steps over which the learning rate grows linearly from zero.
        schedule: After the warm-up, `"cosine"` or `"linear"` from the peak down, `"trapezoid"` (at the peak,
            then linearly down), or `"constant"`.
        decay_share: Share of the steps after the warm-up in which a trapezoid goes down.
        weight_decay: AdamW's.
        betas: AdamW's.
        max_grad_norm: Norm to which gradients are clipped.
        gate_penalty: As in stage 1.
        train: `"lora"`, or `"all"` weights of the teacher. The new parameters train in both.
        lora_rank: Rank of the LoRA factors (`train: lora` only, and so the next two).
        lora_alpha: LoRA's scale is `lora_alpha / lora_rank`.
        lora_targets: Names of the linear layers that get factors.
        full_targets: Names of linear layers whose weights train themselves, beside LoRA on others; none of
            `lora_targets`, and `None` for none at all. Such a student is saved whole and not as an adapter,
            which would be as large.
        full_learning_rate: Their peak learning rate.
        new_parameter_learning_rate: Peak learning rate of the parameters that conversion created; 0 leaves
            them as stage 1 did.
        cross_entropy_weight: Weight of the next-token loss.
        kl_weight: Weight of the divergence from the teacher's logits.
        kl_temperature: Temperature of both logits in it.
        answer_weight: See above; above 0.
        context_weight: See above; 0 or more.
        carried_segments: In some steps a sequence is this many segments longer at most; what comes before its
            last `sequence_length` tokens is read without gradient and only its state is carried over. Gates
            so learn to hold what is far back, at the cost of reading alone. 0 for none.
        carried_share: Share of steps that do so. They train on next tokens only, of task samples only the
            answer: the teacher has not seen what came before.
        carried_sequences: Sequences in such a step, over all processes; `None` means `batch_sequences`.

    Example:
        >>> RecoverySettings(train="all", learning_rate=2e-4).train
        'all'
    """

    train: Literal["lora", "all"] = "lora"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    full_targets: tuple[str, ...] | None = None
    full_learning_rate: float = 2e-4
    new_parameter_learning_rate: float = 2e-3
    cross_entropy_weight: float = 1.0
    kl_weight: float = 1.0
    kl_temperature: float = 1.0
    answer_weight: float = 8.0
    context_weight: float = 0.2
    carried_segments: int = 0
    carried_share: float = 0.5
    carried_sequences: int | None = None

    def _without_effect(self) -> dict[str, str]:
        silent = super()._without_effect()
        if self.train == "all":
            for name in ("lora_rank", "lora_alpha", "lora_targets", "full_targets"):
                silent[name] = "contradicts train: all, which trains the weights themselves"
        if self.train == "all" or not self.full_targets:
            silent["full_learning_rate"] = "has no effect without full_targets"
        if self.carried_segments == 0:
            for name in ("carried_share", "carried_sequences"):
                silent[name] = "has no effect with carried_segments: 0"
        if self.kl_weight == 0:
            silent["kl_temperature"] = "has no effect with kl_weight: 0"
        return silent

    def _check(self) -> None:
        super()._check()
        _positive(self, "lora_rank", "lora_alpha", "full_learning_rate", "kl_temperature", "answer_weight")
        _not_negative(
            self,
            "new_parameter_learning_rate",
            "cross_entropy_weight",
            "kl_weight",
            "context_weight",
            "carried_segments",
        )
        _positive(self, "carried_share", "carried_sequences")
        if self.carried_share > 1:
            raise _fail("carried_share", self.carried_share, "it must be at most 1.")
        if self.carried_segments and self.cross_entropy_weight == 0:
            raise _fail(
                "carried_segments",
                self.carried_segments,
                "such steps train on cross_entropy_weight, which is 0.",
            )
        if not self.lora_targets:
            raise _fail("lora_targets", [], "name at least one linear layer, such as q_proj.")
        if both := [name for name in self.full_targets or () if name in self.lora_targets]:
            raise _fail(
                "full_targets", both[0], "lora_targets names it too; a layer trains in one of the two ways."
            )
        if self.steps and self.cross_entropy_weight == 0 and self.kl_weight == 0:
            raise _fail(
                "cross_entropy_weight", 0.0, "kl_weight is 0 too, which leaves no loss; set one above 0."
            )


StageSettings = TeacherTuningSettings | AttentionTransferSettings | RecoverySettings


@dataclass(frozen=True)
class CheckpointSettings(_Settings):
    """When training state is saved.

    Args:
        every_steps: Steps between checkpoints, at least 1. One is also saved when a run is interrupted.
        keep: Checkpoints kept, the newest, at least 1.
    """

    every_steps: int = 50
    keep: int = 2

    def _check(self) -> None:
        _positive(self, "every_steps", "keep")


@dataclass(frozen=True)
class EvaluationSettings(_Settings):
    """What teacher and student are measured on after training.

    Args:
        tasks: Names of tasks, as `lawcat eval --tasks` takes them; empty for none.
        lengths: Prompt lengths in tokens.
        samples: Samples a task and length.
        perplexity_tokens: Tokens of held-out text for perplexity; 0 for none.
    """

    tasks: tuple[str, ...] = ("passkey",)
    lengths: tuple[int, ...] = (256, 1024, 4096)
    samples: int = 20
    perplexity_tokens: int = 8192

    def _check(self) -> None:
        _positive(self, "samples")
        _not_negative(self, "perplexity_tokens")
        if any(length <= 0 for length in self.lengths):
            raise _fail("lengths", list(self.lengths), "each must be above 0.")
        for name in ("tasks", "lengths"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise _fail(name, list(values), "name each one once.")
        from lawcat.tasks import get_task

        for i, task in enumerate(self.tasks):
            try:
                get_task(task)
            except ConfigurationError as error:
                raise _FieldError(f"tasks.{i}", str(error)) from None
        if self.tasks and not self.lengths:
            raise _fail("lengths", [], f"tasks {', '.join(self.tasks)} need at least one length.")


_VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What a matrix keeps beside its students.
_TAKEN_NAMES = ("evaluation", "report")
_NOT_OF_A_VARIANT = {
    "matrix": "a variant has no matrix of its own; name its variants in the matrix of the recipe",
    "seed": "seeds are a list of the matrix or of a variant, as in seeds: [0, 1, 2]",
    "evaluation": "all variants are measured on the same samples; set it for the whole recipe",
    "name": "the variant's key is its name",
    "description": "only the whole recipe has one",
}


@dataclass(frozen=True)
class Variant:
    """One member of a matrix.

    Args:
        name: Name of its folder.
        overrides: What it changes in the recipe, by dotted key or nested; kept by dotted key, as YAML has it.
        seeds: Seeds to train it with; empty for those of the matrix.
        is_excluded: Whether fields that were set for all variants cannot be combined with it. It keeps its
            place in the matrix, and `Recipe.variant` refuses it.
    """

    name: str
    overrides: Mapping[str, Any]
    seeds: tuple[int, ...] = ()
    is_excluded: bool = False

    def __post_init__(self) -> None:
        flat = {str(key): _write_value(value) for key, value in dotted_keys(self.overrides).items()}
        object.__setattr__(self, "overrides", flat)


@dataclass(frozen=True)
class Matrix:
    """Variants of one recipe, to be trained beside each other and measured on the same samples.

    In YAML a mapping: each key is a variant, its value a mapping of overrides, by dotted key or nested. The
    key `seeds`, of the matrix or of a variant, is a list of seeds. `excluded: true` is written of a variant
    that cannot be combined with fields set since, so that what is written can be read.

    Args:
        variants: At least one.
        seeds: Seeds to train each with; empty for the recipe's own.

    Example:
        >>> recipe = Recipe.from_yaml('''
        ... name: gates
        ... matrix:
        ...   seeds: [0, 1]
        ...   channel: {}
        ...   head: {model.gate: head, seeds: [0]}
        ... ''')
        >>> recipe.variant("head").model.gate
        'head'
        >>> [(variant.name, variant.seeds) for variant in recipe.matrix.variants]
        [('channel', ()), ('head', (0,))]
    """

    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The variants' names."""
        return tuple(variant.name for variant in self.variants)

    def to_dict(self) -> dict[str, Any]:
        """Return the matrix as the mapping that it is read from."""
        values: dict[str, Any] = {"seeds": list(self.seeds)} if self.seeds else {}
        for variant in self.variants:
            values[variant.name] = {
                **variant.overrides,
                **({"seeds": list(variant.seeds)} if variant.seeds else {}),
                **({"excluded": True} if variant.is_excluded else {}),
            }
        return values

    def with_overrides(self, overrides: Mapping[str, Any]) -> Matrix:
        """Return the matrix of a recipe whose `overrides` are meant for all variants: theirs give way."""
        variants = []
        for variant in self.variants:
            own = {
                key: value
                for key, value in variant.overrides.items()
                if not any(key == name or key.startswith(f"{name}.") for name in overrides)
            }
            # Of a list that the variant has anew, such as `data`, an entry has to be set again.
            again = {n: v for n, v in overrides.items() if any(n.startswith(f"{key}.") for key in own)}
            variants.append(dataclasses.replace(variant, overrides=own | again))
        return dataclasses.replace(self, variants=tuple(variants))


def _read_matrix(value: Any, key: str) -> Matrix:
    if not isinstance(value, Mapping):
        raise _fail(key, value, "give a mapping of variants, as in {no-conv: {model.use_conv: false}}.")
    seeds: tuple[int, ...] = ()
    variants: list[Variant] = []
    for name, overrides in value.items():
        if name == "seeds":
            seeds = _read_seeds(overrides, f"{key}.seeds")
            continue
        variants.append(_read_variant(name, {} if overrides is None else overrides, key))
    if not variants:
        raise _FieldError(key, "names no variant; give at least one, or leave the matrix out.")
    lowered = [variant.name.lower() for variant in variants]
    for variant in variants:  # some file systems do not tell them apart
        if lowered.count(variant.name.lower()) > 1:
            raise _FieldError(f"{key}.{variant.name}", "another variant has that name but for its capitals.")
    return Matrix(tuple(variants), seeds)


def _read_variant(name: Any, overrides: Any, key: str) -> Variant:
    if not isinstance(name, str) or not _VARIANT_NAME.fullmatch(name):
        raise _fail(
            key,
            name,
            "a variant names a folder: letters, digits, '-', '_' and '.', at most 64, none but a letter or "
            "digit first.",
        )
    place = f"{key}.{name}"
    if name.lower() in _TAKEN_NAMES or name.lower().endswith((".training", ".md", ".json")):
        raise _FieldError(place, "is what a matrix keeps beside its students; use another name.")
    if re.search(r"-seed\d+$", name):
        raise _FieldError(place, "such endings are for the students of other seeds; use another name.")
    if not isinstance(overrides, Mapping):
        raise _fail(place, overrides, "give a mapping of overrides, as in {model.use_conv: false}, or {}.")
    flat = dotted_keys(overrides)
    seeds = _read_seeds(flat.pop("seeds"), f"{place}.seeds") if "seeds" in flat else ()
    is_excluded = _read(flat.pop("excluded", False), bool, f"{place}.excluded")
    for field in flat:
        top = str(field).partition(".")[0]
        if top in _NOT_OF_A_VARIANT:
            raise _FieldError(f"{place}.{field}", f"{_NOT_OF_A_VARIANT[top]}.")
    return Variant(name, flat, seeds, is_excluded)


def _read_seeds(value: Any, key: str) -> tuple[int, ...]:
    seeds: tuple[int, ...] = _read(value, tuple[int, ...], key)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise _fail(key, list(seeds), "give at least one seed, each once and 0 or more.")
    return seeds


@dataclass(frozen=True)
class Recipe(_Settings):
    """Every choice of a distillation run, checked when it is made.

    Args:
        name: Short name, for logs and records.
        description: What the recipe is for and what it costs, in a sentence or two.
        seed: Seed of everything random, 0 or more.
        sequence_length: Tokens of a training sequence, at least 16.
        precision: `"float32"`, `"bfloat16"` (autocast; what trains stays float32), or `"auto"` for what the
            device is good at.
        model: The student's operator.
        data: Ingredients of the training data; text of the teacher's own when not given.
        teacher_tuning: Stage 0, which is skipped when not given.
        attention_transfer: Stage 1.
        recovery: Stage 2.
        checkpoint: When training state is saved.
        evaluation: What is measured after training.
        matrix: Variants of this recipe, for `lawcat.distill.matrix.linearize_matrix`.

    Raises:
        ConfigurationError: for an unknown key, a value of the wrong type or out of range, or a contradiction,
            naming the dotted key.

    Example:
        >>> recipe = Recipe(name="mine", recovery={"steps": 20, "learning_rate": "1e-3"})
        >>> recipe.with_overrides({"recovery.learning_rate": "5e-4"}).recovery.learning_rate
        0.0005
        >>> Recipe.from_dict(recipe.to_dict()) == recipe
        True
        >>> Recipe.from_dict({"name": "mine", "recovery": {"learning_rat": 0.1}})
        Traceback (most recent call last):
        ...
        lawcat.errors.ConfigurationError: recovery.learning_rat: unknown key. Did you mean 'learning_rate'?...
    """

    name: str
    description: str = ""
    seed: int = 0
    sequence_length: int = 1024
    precision: Precision = "auto"
    model: ModelSettings = ModelSettings()
    data: tuple[DataSource, ...] = (DataSource(provider="teacher"),)
    teacher_tuning: TeacherTuningSettings = TeacherTuningSettings()
    attention_transfer: AttentionTransferSettings = AttentionTransferSettings()
    recovery: RecoverySettings = RecoverySettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    matrix: Matrix | None = None

    def _check(self) -> None:
        if not self.name.strip():
            raise _fail("name", self.name, "give the recipe a name.")
        _not_negative(self, "seed")
        if self.sequence_length < 16:
            raise _fail("sequence_length", self.sequence_length, "it must be at least 16 tokens.")
        if not self.data:
            raise _fail("data", [], "name at least one source, such as {provider: teacher}.")
        for stage in ("attention_transfer", "recovery"):
            penalty = getattr(self, stage).gate_penalty
            if penalty and self.model.gate == "none":
                raise _fail(f"{stage}.gate_penalty", penalty, "it must be 0 with model.gate: none.")
        if self.teacher_tuning.steps and (self.recovery.train != "lora" or not self.recovery.steps):
            got = "train: all" if self.recovery.train != "lora" else "steps: 0"
            raise _fail(
                "teacher_tuning.steps",
                self.teacher_tuning.steps,
                f"it trains the LoRA factors of recovery, which has {got}; set it to 0, or recovery to "
                "train: lora with steps above 0.",
            )
        if self.teacher_tuning.steps and self.recovery.cross_entropy_weight == 0:
            raise _fail(
                "teacher_tuning.steps",
                self.teacher_tuning.steps,
                "with recovery.cross_entropy_weight: 0 the teacher would learn to be what it is; set it to "
                "0.",
            )
        transfer = self.attention_transfer
        if transfer.steps and transfer.answer_weight and not any(source.is_task for source in self.data):
            raise _fail(
                "attention_transfer.answer_weight",
                transfer.answer_weight,
                "without a source of provider passkey, needle or babilong there are no answers; set it to "
                "null.",
            )
        if self.recovery.carried_segments and all(source.carried_weight == 0 for source in self.data):
            raise _fail(
                "recovery.carried_segments", self.recovery.carried_segments, "every carried_weight is 0."
            )
        for i, source in enumerate(self.data):
            if source.is_task and source.min_sample_tokens > self.sequence_length:
                raise _fail(
                    f"data.{i}.min_sample_tokens",
                    source.min_sample_tokens,
                    f"it must be at most sequence_length, which is {self.sequence_length}.",
                )
            if source.answer_kl_weight == 0 and self.recovery.cross_entropy_weight == 0:
                raise _fail(
                    f"data.{i}.answer_kl_weight",
                    0.0,
                    "recovery.cross_entropy_weight is 0 too, which leaves no loss; set one above 0.",
                )
            hides_in_prose = source.provider == "needle" and "prose" in source.haystacks
            if hides_in_prose and not self.prose_sources(source):
                raise _FieldError(
                    f"data.{i}.path",
                    "is missing; without a source of provider text, needles need prose of their own.",
                )
        for variant in self.matrix.variants if self.matrix is not None else ():
            problem = self._problem_of(variant)
            if problem is not None and not variant.is_excluded:
                raise problem.under(f"matrix.{variant.name}")
            if problem is None and variant.is_excluded:
                raise _FieldError(
                    f"matrix.{variant.name}.excluded", "got True of one that can be combined; leave it out."
                )

    def variant(self, name: str, seed: int | None = None) -> Recipe:
        """Return the recipe of one variant of the matrix.

        Args:
            name: The variant's name.
            seed: Its seed; `None` for the recipe's own.

        Returns:
            A recipe without a matrix, named after both.

        Raises:
            ConfigurationError: if there is no such variant, or other fields set since the recipe was read
                cannot be combined with it.
        """
        names = self.matrix.names if self.matrix is not None else ()
        if self.matrix is None or name not in names:
            there = f"there are {', '.join(names)}" if names else "the recipe has no matrix"
            raise ConfigurationError(
                f"There is no variant {name!r} in the recipe {self.name!r}; {there}."
                f"{did_you_mean(name, names)}"
            )
        try:
            recipe = self._resolved(self.matrix.variants[names.index(name)])
        except _FieldError as error:
            raise ConfigurationError(
                f"matrix.{name}.{error} What is set for all variants cannot be combined with this one: leave "
                "that out, or name the other variants alone."
            ) from None
        return recipe if seed is None else dataclasses.replace(recipe, seed=seed)

    def _resolved(self, variant: Variant) -> Recipe:
        values = dataclasses.replace(self, matrix=None).to_dict()
        values["name"] = f"{self.name}/{variant.name}"
        return _overridden(values, variant.overrides)

    def _problem_of(self, variant: Variant) -> _FieldError | None:
        try:
            self._resolved(variant)
        except _FieldError as error:
            return error
        return None

    def prose_sources(self, task: DataSource) -> tuple[DataSource, ...]:
        """Return what names the prose of a task's source: itself if it has a path, else the text sources."""
        return (task,) if task.paths else tuple(s for s in self.data if s.provider == "text")

    @classmethod
    def shipped(cls) -> tuple[str, ...]:
        """Return the names of the recipes that come with lawcat.

        Example:
            >>> "quick" in Recipe.shipped()
            True
        """
        names = [entry.name for entry in _shipped_folder().iterdir()]
        return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """Return a recipe that comes with lawcat, or one from a YAML file.

        Args:
            name_or_path: A name of `Recipe.shipped()`, or the path of a file.

        Returns:
            The recipe.

        Raises:
            ConfigurationError: if there is no such recipe or file, or it is not valid YAML, or as the class.

        Example:
            >>> Recipe.load("quick").name
            'quick'
        """
        text = str(name_or_path)
        if text in cls.shipped():
            where = f"recipe {text!r}"
            content = _shipped_folder().joinpath(f"{text}.yaml").read_text(encoding="utf-8")
        else:
            where = text
            path = Path(name_or_path).expanduser()
            if not path.is_file():
                guess = did_you_mean(path.stem, cls.shipped())
                raise ConfigurationError(
                    f"There is no recipe {text!r}: give the path of a YAML file, or one of "
                    f"{', '.join(cls.shipped())}.{guess}"
                )
            try:
                content = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(
                    f"{text} cannot be read: {error}. Give a recipe in YAML, UTF-8."
                ) from error
        try:
            return cls.from_yaml(content)
        except ConfigurationError as error:
            raise ConfigurationError(f"{where}: {error}") from error

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Return the recipe that a YAML text holds.

        Args:
            text: A mapping, with the keys of this class.

        Returns:
            The recipe.

        Raises:
            ConfigurationError: if it is not valid YAML, names a key twice, or is not a valid recipe.
        """
        try:
            values = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader
        except yaml.YAMLError as error:
            raise ConfigurationError(f"not valid YAML: {error}") from error
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a mapping holds, as `to_dict` writes it.

        Args:
            values: Keys and values; what is left out has its default.

        Returns:
            The recipe.

        Raises:
            ConfigurationError: as the class.
        """
        try:
            recipe: Recipe = _build(cls, values)
        except _FieldError as error:
            raise ConfigurationError(str(error) if error.key else f"A recipe: {error.problem}") from None
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain dicts and lists, without what is not set or has no effect."""
        values = _write(self)
        # So that recipes without this stage keep the fingerprint that their unfinished runs know them by.
        if self.teacher_tuning == TeacherTuningSettings():
            del values["teacher_tuning"]
        return values

    def to_yaml(self) -> str:
        """Return the recipe as YAML that `from_yaml` reads back to an equal one."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Recipe:
        """Return a copy with other values for some dotted keys.

        Args:
            overrides: Values by key, such as `"recovery.learning_rate"` or `"data.0.path"`. Text is read by
                the field's type, as a command line gives it: `"5e-4"`, `"true"`, `"null"`, `"1024,2048"`,
                `"[1024, 2048]"`. Where one changes a choice (a source's provider, `recovery.train`, a
                schedule), what belonged to the old one only goes back to its default.

        Returns:
            The new recipe. Variants of its matrix that cannot be combined with these values are refused when
            they are asked for, so that they do not keep others from being trained.

        Raises:
            ConfigurationError: for an unknown key, or as the class.

        Example:
            >>> Recipe(name="mine").with_overrides({"recovery.train": "all"}).recovery.train
            'all'
            >>> Recipe(name="mine").with_overrides({"evaluation.lengths": "512,1024"}).evaluation.lengths
            (512, 1024)
        """
        for key in overrides:
            if key.partition(".")[0] == "matrix":
                raise ConfigurationError(
                    f"{key}: a matrix is changed in the recipe's file; other fields, set here, hold for all "
                    "variants, and variants are chosen by name."
                )
        values = self.to_dict()
        values.pop("matrix", None)
        try:
            recipe = _overridden(values, overrides)
            if self.matrix is not None:
                matrix = self.matrix.with_overrides(overrides)
                variants = tuple(
                    dataclasses.replace(variant, is_excluded=recipe._problem_of(variant) is not None)
                    for variant in matrix.variants
                )
                recipe = dataclasses.replace(recipe, matrix=dataclasses.replace(matrix, variants=variants))
        except _FieldError as error:
            raise ConfigurationError(str(error)) from None
        return recipe

    def fingerprint(self) -> str:
        """Return the SHA-256 of the recipe's canonical JSON: equal for equal recipes, on any machine."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _overridden(values: dict[str, Any], overrides: Mapping[str, Any]) -> Recipe:
    """Return the recipe of `values`, which are changed, with other values for some dotted keys."""
    for key, value in overrides.items():
        _override(Recipe, values, key.split("."), value)
    _drop_ineffective(Recipe, values, frozenset(overrides))
    recipe: Recipe = _build(Recipe, values)
    return recipe
