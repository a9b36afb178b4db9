"""What a sample is, what a task is, and how seeds and held-out values keep training and evaluation apart."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args

from lawcat.errors import ConfigurationError, DataError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["evaluation", "train"]

_MAX_DRAWS = 10_000
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One question with its known answers.

    Args:
        task: Name of the task that made it.
        length: Nominal length in tokens, the one asked for.
        index: Place among the samples of this task, length and seed.
        seed: The run's seed.
        prompt: The text the model continues.
        answers: What the continuation must hold.
        max_new_tokens: How many tokens the protocol lets the model say.
        num_tokens: Tokens of `prompt` as the model sees them, special tokens included.
        depth: Where the answer stands in the text around it, 0 (start) to 1 (end); None where that means
            nothing.
        metadata: What else the results should record (JSON types only).

    Example:
        >>> Sample("passkey", 1024, 0, 0, "The pass key is", ("7",), 10, 4).answers
        ('7',)
    """

    task: str
    length: int
    index: int
    seed: int
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    num_tokens: int
    depth: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleRequest:
    """Which sample a task is asked to make.

    Args:
        task: Name of the task.
        tokenizer: Measures the prompt.
        length: Nominal length in tokens.
        index: Which sample, from 0.
        seed: The run's seed.
        split: `"evaluation"` or `"train"`.
        options: Every option of the task, resolved.
    """

    task: str
    tokenizer: PreTrainedTokenizerBase
    length: int
    index: int
    seed: int
    split: Split
    options: Mapping[str, Any]

    def rng(self) -> random.Random:
        """Return a fresh generator of random numbers, the same for the same request."""
        return sample_rng(self.task, self.length, self.index, self.seed, self.split)

    def sample(
        self,
        prompt: str,
        answers: tuple[str, ...],
        max_new_tokens: int,
        *,
        num_tokens: int | None = None,
        depth: float | None = None,
        metadata: Mapping[str, Any],
    ) -> Sample:
        """Return the sample; its prompt's tokens are counted where `num_tokens` does not tell them."""
        return Sample(
            task=self.task,
            length=self.length,
            index=self.index,
            seed=self.seed,
            prompt=prompt,
            answers=answers,
            max_new_tokens=max_new_tokens,
            num_tokens=count_tokens(self.tokenizer, prompt) if num_tokens is None else num_tokens,
            depth=depth,
            metadata=metadata,
        )


class Task(ABC):
    """A seeded generator of samples together with its metric.

    A subclass makes samples in `make`, and sets `name`, `metrics` (headline first), `default_options` and,
    whenever its prompts change, a new `version`, so that answers kept from before are not taken for answers
    to the new prompts. `uses_prose` says that the user's own text, where one is given, should surround the
    answer (option `haystack`). `has_zero_length` says that a nominal length of 0 means something: the
    question without text around it.
    """

    name: str
    metrics: ClassVar[tuple[str, ...]]
    default_options: ClassVar[Mapping[str, Any]] = {}
    version: ClassVar[int] = 1
    uses_prose: bool = False
    has_zero_length: bool = False

    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        index: int,
        seed: int,
        *,
        split: Split = "evaluation",
        **options: Any,
    ) -> Sample:
        """Return sample `index` of this length and seed; the same arguments give the same sample everywhere.

        Args:
            tokenizer: Measures the prompt.
            length: Nominal length in tokens.
            index: Which sample, from 0.
            seed: The run's seed.
            split: `"evaluation"` draws held-out values only, `"train"` only the others.
            **options: The task's own, see `default_options`.

        Returns:
            The sample.

        Raises:
            ConfigurationError: for an option that does not exist or cannot have this value, or a length that
                is none.
            DataError: if `length` is too short to hold the question.
        """
        if length or not self.has_zero_length:
            check_length(length)
        chosen = self.resolve_options(options)
        return self.make(SampleRequest(self.name, tokenizer, length, index, seed, split, chosen))

    @abstractmethod
    def make(self, request: SampleRequest) -> Sample:
        """Return the sample asked for; its length is a whole number of tokens, at least 1 (or 0, see above).

        Raises:
            ConfigurationError: for options or a split that do not go together.
            DataError: if the length is too short to hold the question.
        """

    @abstractmethod
    def score(self, sample: Sample, answer_text: str) -> dict[str, float]:
        """Return every metric of the model's continuation, each in [0, 1], headline first."""

    def is_answered(self, sample: Sample, answer_text: str) -> bool:
        """Return whether no further token can change the headline metric, so that generation may stop."""
        return False

    def rule_answers(self, sample: Sample) -> dict[str, str]:
        """Return what trivial rules answer to this sample, for a report to draw as a line beside the models.

        A rule looks at the prompt only, without understanding it. Its answer is scored by `score`, as a
        model's is.

        Args:
            sample: One of this task's, as made or as read back from a record: prompt and metadata suffice.

        Returns:
            Name of the rule, as a report should show it, to its answer. Empty where there is none.
        """
        return {}

    def resolve_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options with defaults filled in.

        Args:
            options: Some of the task's options.

        Returns:
            Every option of the task.

        Raises:
            ConfigurationError: for an option this task does not have.
        """
        for key in options:
            if key not in self.default_options:
                allowed = list(self.default_options)
                raise ConfigurationError(
                    f"Task {self.name!r} has no option {key!r}; it has: {', '.join(allowed) or 'none'}."
                    f"{did_you_mean(key, allowed)}"
                )
        return {**self.default_options, **options}


TASKS: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Make `task` known by its name to `get_task`, and return it."""
    TASKS[task.name] = task
    return task


def get_task(name: str) -> Task:
    """Return the task of that name.

    Args:
        name: A key of `TASKS`.

    Returns:
        The task.

    Raises:
        ConfigurationError: if there is none, naming those there are.

    Example:
        >>> get_task("passkey").metrics[0]
        'accuracy'
    """
    if name not in TASKS:
        raise ConfigurationError(
            f"There is no task {name!r}; there are: {', '.join(sorted(TASKS))}."
            f"{did_you_mean(name, sorted(TASKS))}"
        )
    return TASKS[name]


def held_out(value: str) -> bool:
    """Return whether a key, number or uuid belongs to evaluation: one value in four does, by SHA-256.

    The split depends on the value alone, not on a list or a seed, so training data made anywhere, at any
    time, can never hold an evaluation's value.

    Example:
        >>> share = sum(held_out(str(number)) for number in range(1, 50001)) / 50000
        >>> 0.24 < share < 0.26
        True
    """
    return hashlib.sha256(value.encode()).digest()[0] < 64


def sample_rng(task: str, length: int, index: int, seed: int, split: Split = "evaluation") -> random.Random:
    """Return the random number generator of one sample.

    It hangs on its arguments alone: samples can be made in any order, on any machine, in any number.

    Args:
        task: Name of the task.
        length: Nominal length in tokens.
        index: Which sample.
        seed: The run's seed.
        split: Training draws from a stream of its own.

    Returns:
        A fresh generator.

    Raises:
        ConfigurationError: for a split that does not exist.

    Example:
        >>> first, again = (sample_rng("passkey", 1024, 0, seed=7).random() for _ in range(2))
        >>> first == again
        True
    """
    if split not in get_args(Split):
        raise ConfigurationError(f"split is {split!r}; it must be one of {', '.join(get_args(Split))}.")
    text = "\0".join([task, str(length), str(index), str(seed), split])
    return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest(), "big"))


def draw(make: Callable[[], str], split: Split) -> str:
    """Return the first value of `make()` that belongs to the split.

    Args:
        make: Draws one value.
        split: `"evaluation"` keeps held-out values, `"train"` the others.

    Returns:
        The value.
    """
    for _ in range(_MAX_DRAWS):
        value = make()
        if held_out(value) == (split == "evaluation"):
            return value
    raise AssertionError("a generator of values gave none of this split")


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Return how many tokens the model sees for `text`, special tokens included."""
    return len(tokenizer(text, verbose=False).input_ids)


def check_length(length: int) -> int:
    """Return `length` if it is a positive whole number.

    Raises:
        ConfigurationError: if it is not.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ConfigurationError(f"length is {length!r}; it must be a whole number of tokens, at least 1.")
    return length


def fit_units(count: Callable[[int], int], limit: int, estimate: int) -> int:
    """Return a number of units (characters, words, lines) whose text fills `limit` tokens.

    The text then has exactly `limit` tokens, or one unit more would exceed them. Token counts grow almost
    linearly, so the search goes by secant steps: three or four counts, where a plain binary search needs
    fifteen.

    Args:
        count: Tokens of the text with that many units; non-decreasing but for a token here and there.
        limit: Most tokens allowed.
        estimate: A first guess.

    Returns:
        The number of units, or -1 if not even none fits.

    Example:
        >>> fit_units(lambda units: 10 + 3 * units, limit=20, estimate=1)
        3
        >>> fit_units(lambda units: 30, limit=20, estimate=1)
        -1
    """
    base = count(0)
    if base > limit:
        return -1
    low, low_tokens = 0, base  # fits
    high: int | None = None  # does not
    guess, attempts = max(estimate, 1), 0
    while low_tokens < limit and (high is None or high - low > 1):
        tokens = count(guess)
        per_unit = max((tokens - base) / guess, 1e-6)
        if tokens <= limit:
            low, low_tokens = guess, tokens
        else:
            high = guess
        attempts += 1
        guess = low + max(int((limit - low_tokens) / per_unit), 1)
        if high is not None:
            guess = (low + high) // 2 if attempts > 8 else min(guess, high - 1)
            guess = max(guess, low + 1)
    return low


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], int]:
    """Return the tokens of `prompt + answer` and how many of them belong to the prompt.

    The two are tokenized as one text, as the model met such text in pretraining. Tokenizing the answer alone
    gives other tokens for SentencePiece (a second space in front), and where a token spans the border it
    counts as answer.

    Args:
        tokenizer: Any tokenizer of transformers.
        prompt: The question.
        answer: What follows it.

    Returns:
        Token ids with the special tokens the tokenizer puts in front, and the index of the answer's first
        token.

    Raises:
        DataError: if nothing of the answer is left of its own.
    """
    whole = _encode(tokenizer, prompt + answer)
    start = _common_prefix(whole, _encode(tokenizer, prompt))
    if start >= len(whole):
        raise DataError(f"The tokenizer gives no tokens for the answer {answer!r}; it cannot be trained on.")
    return whole, start


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the tokens of prompts and answers that follow one another, and where the answers are.

    As `encode_pair`, for several: all are tokenized as one text. A token that spans the beginning of an
    answer belongs to it, one that spans its end does not, unless it is the last.

    Args:
        tokenizer: Any tokenizer of transformers.
        pairs: Prompt and answer of each, at least one. Only the first prompt may be long.

    Returns:
        Token ids with the special tokens the tokenizer puts in front, and for each answer the index of its
        first token and that after its last.

    Raises:
        DataError: if nothing of an answer is left of its own.
    """
    whole, borders = encode_pieces(tokenizer, [piece for pair in pairs for piece in pair])
    spans = list(zip(borders[::2], borders[1::2], strict=True))
    for (_, answer), (start, end) in zip(pairs, spans, strict=True):
        if start >= end:
            raise DataError(
                f"The tokenizer gives no tokens for the answer {answer!r}; it cannot be trained on."
            )
    return whole, spans


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the tokens of pieces that follow one another, and where each ends.

    All are tokenized as one text. A token that spans a border belongs to the piece after it.

    Args:
        tokenizer: Any tokenizer of transformers.
        pieces: At least two. Only the first may be long.

    Returns:
        Token ids with the special tokens the tokenizer puts in front, and for each piece the index of the
        token after its last.

    Raises:
        DataError: if nothing is left for the pieces after the first.
    """
    prompt, rest = pieces[0], "".join(pieces[1:])
    whole, first = encode_pair(tokenizer, prompt, rest)
    if len(pieces) == 2:
        return whole, [first, len(whole)]
    # The borders in `rest` are looked for behind the prompt's last line alone, where it leaves the tokens as
    # they are: a long context would be tokenized once for every border.
    front = prompt[prompt.rfind("\n") + 1 :]
    near, near_first = encode_pair(tokenizer, front, rest)
    if near[near_first:] != whole[first:]:
        front, near, near_first = prompt, whole, first
    borders = [first]
    said = front
    for text in pieces[1:-1]:
        said += text
        borders.append(_common_prefix(near, _encode(tokenizer, said)) + first - near_first)
    return whole, [*borders, len(whole)]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, verbose=False).input_ids]


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def choose(value: T, allowed: tuple[T, ...], option: str) -> T:
    """Return `value` if it is allowed.

    Raises:
        ConfigurationError: if it is not, naming the option and what is allowed.
    """
    if value not in allowed:
        raise ConfigurationError(
            f"{option} is {value!r}; it must be one of {', '.join(map(str, allowed))}."
            f"{did_you_mean(str(value), [str(one) for one in allowed])}"
        )
    return value
