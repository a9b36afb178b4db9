"""BABILong: the facts of a bAbI story scattered over prose, and a question that needs one, two or three.

Source: Kuratov et al., "BABILong" (arXiv 2406.10149), `babilong/babilong_utils.py`, `babilong/prompts.py`,
    `babilong/metrics.py` and `data/create_tasks.py` of booydar/babilong.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from lawcat.errors import ConfigurationError, DataError
from lawcat.tasks.babi import BABI_TASKS, GIVING_ACTORS, OBJECTS, PLACES, BabiTask, Story
from lawcat.tasks.babi_reader import babi_source, parse_stories
from lawcat.tasks.babi_simulator import simulate_story
from lawcat.tasks.babi_solver import solve_all
from lawcat.tasks.haystack import NOISE_SENTENCE, TextSource, resolve_source
from lawcat.tasks.sample import (
    Sample,
    SampleRequest,
    Split,
    Task,
    check_length,
    choose,
    count_tokens,
    held_out,
    register_task,
    sample_rng,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 20
PROMPT_TOKENS = 300
"""What BABILong sets aside of a nominal length for instruction, examples and question."""
TOKENS_A_LINE = 8
"""A length of L holds stories of at most (L - 300) / 8 lines, the question's included."""
MIN_SENTENCE_TOKENS = 10
NOISE_SHARES = (4.0, 3.0, 1.0)
"""How many of the training prompts are filled up with noise, have some, and have none."""

_CUTS = (".", "<context>", "<example>")


@dataclass(frozen=True)
class _Question:
    """A story up to one of its questions."""

    facts: tuple[str, ...]
    text: str
    answer: str
    supports: tuple[int, ...]

    @property
    def num_lines(self) -> int:
        return len(self.facts) + 1


@dataclass(frozen=True)
class _Context:
    """Facts in their noise."""

    text: str
    fact_starts: tuple[int, ...]
    num_sentences: int
    repeats: int


class BabiLong(Task):
    """One task of BABILong: `babilong_qa1` to `babilong_qa5`.

    A nominal length of L holds L - 300 tokens of facts and noise, and the prompt around them; 0 is the
    benchmark's "0K", the facts alone. The benchmark's 1K means 1,000: write 1000, 2000, 4000 for its lengths
    and 1k, 2k, 4k for powers of two. Stories too long for a length are left out as there, which above all
    makes qa3 at 1K easier than the rest.

    Options:
        noise: The prose between the facts: None or `"emerson-excerpt"` for the built-in excerpt, `"noise"`
            for the noise sentence, a `TextSource`, a path or a glob. BABILong takes PG19's test split.
        babi: A folder of the published bAbI files, such as `tasks_1-20_v1-2/en-10k`: BABILong is made of
            their `*_train.txt`. None makes new stories by the same rules; those of evaluation are never
            those of training.
        length_tokenizer: Name or path of the tokenizer that L is counted in: `"openai-community/gpt2"` for
            the benchmark's own count. None takes the model's.

    Metric:
        accuracy: BABILong's. Of the labels in the first sentence of the answer, those of the question left
            out, exactly the wanted one is there.

    Args:
        qa: bAbI's name of the task.
    """

    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    default_options: ClassVar[Mapping[str, Any]] = {"noise": None, "babi": None, "length_tokenizer": None}
    has_zero_length = True

    def __init__(self, qa: BabiTask) -> None:
        self.name = f"babilong_{qa}"
        self.qa = qa
        self.labels = _LABELS[qa]

    def resolve_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options with defaults filled in, texts as `TextSource`."""
        chosen = super().resolve_options(options)
        chosen["noise"] = resolve_source(chosen["noise"])
        if chosen["babi"] is not None and not isinstance(chosen["babi"], TextSource):
            chosen["babi"] = babi_source(chosen["babi"], self.qa)
        return chosen

    def make(self, request: SampleRequest) -> Sample:
        """Return one prompt; see the class for the options."""
        tokenizer, options, split = request.tokenizer, request.options, request.split
        room = _room(request.length)
        rng = request.rng()
        most_lines = room // TOKENS_A_LINE if room else None
        babi: TextSource | None = options["babi"]
        if babi is None:
            asked = _simulate(self.qa, rng, split, most_lines)
        elif split == "train":
            raise ConfigurationError(
                "The published bAbI files are for evaluation. Leave the option babi out to make new stories."
            )
        else:
            asked = _published(babi, most_lines, request.index, request.seed)
        ruler = (
            tokenizer if options["length_tokenizer"] is None else _load_tokenizer(options["length_tokenizer"])
        )
        noise_tokens = room - sum(_count_pieces(ruler, asked.facts)) if room else 0
        context = _scatter(ruler, asked.facts, options["noise"].text, noise_tokens, rng)
        return request.sample(
            babilong_prompt(self.qa, context.text, asked.text),
            (asked.answer,),
            MAX_NEW_TOKENS,
            depth=context.fact_starts[min(asked.supports)] / len(context.text),
            metadata={
                "question": asked.text,
                "facts": len(asked.facts),
                "noise_sentences": context.num_sentences,
                "haystack_repeats": context.repeats,
                "stories": "simulated" if babi is None else babi.name,
                "last_named": _last_named(self.qa, asked),
            },
        )

    def score(self, sample: Sample, answer_text: str) -> dict[str, float]:
        """Return `accuracy`; see the class.

        Example:
            >>> sample = Sample("babilong_qa1", 0, 0, 0, "", ("office",), 20, 9, None, {"question": "Where?"})
            >>> BABILONG_QA1.score(sample, "Answer: The most recent location of John is office.")
            {'accuracy': 1.0}
        """
        found = self._labels_in(sample, _first_sentence(answer_text))
        return {"accuracy": float(found == {sample.answers[0].lower()})}

    def is_answered(self, sample: Sample, answer_text: str) -> bool:
        """Return whether the first sentence is over, or already holds a wrong label."""
        if any(cut in answer_text.lower() for cut in _CUTS):
            return True
        return bool(self._labels_in(sample, answer_text.lower()) - {sample.answers[0].lower()})

    def rule_answers(self, sample: Sample) -> dict[str, str]:
        """Return the place that the facts name last, other than those in the question.

        In qa5, which asks for people and objects, the last of those that the question's first word admits.
        """
        named = str(sample.metadata.get("last_named") or "")
        rule = "last person or object named" if self.qa == "qa5" else "last place named"
        return {rule: named} if named else {}

    def _labels_in(self, sample: Sample, text: str) -> set[str]:
        question = str(sample.metadata["question"]).lower()
        return {label for label in self.labels if label in text and label not in question}


_LABELS: dict[BabiTask, tuple[str, ...]] = {
    "qa1": PLACES,
    "qa2": PLACES,
    "qa3": PLACES,
    "qa4": PLACES,
    "qa5": tuple(word.lower() for word in (*GIVING_ACTORS, *OBJECTS)),
}

BABILONG_QA1, BABILONG_QA2, BABILONG_QA3, BABILONG_QA4, BABILONG_QA5 = (
    register_task(BabiLong(qa)) for qa in BABI_TASKS
)


def babilong_prompt(qa: BabiTask, context: str, question: str) -> str:
    """Return BABILong's prompt, without a chat template.

    Args:
        qa: bAbI's name of the task.
        context: Facts and noise.
        question: The question.

    Returns:
        Instruction, examples, closing instruction, context and question.

    Example:
        >>> babilong_prompt("qa1", "Mary went to the office.", "Where is Mary?")[-71:]
        '<context>\\nMary went to the office.\\n</context>\\n\\nQuestion: Where is Mary?'
    """
    prompts = _prompts()
    template = str(prompts["template"])
    prompt = template.format(context=context, question=question, **prompts[qa])
    return prompt.strip()


def babilong_training_pair(
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    index: int,
    seed: int,
    *,
    qa: BabiTask,
    text: str | None = None,
    fill: bool = False,
) -> tuple[str, str]:
    """Return a prompt in BABILong's form and its answer for training, of a story that no evaluation makes.

    Half of the prompts are filled up with noise, an eighth have none, and the others some. No facts with
    the same question are ever in both, whatever the seeds; the published files are not looked at.

    Args:
        tokenizer: Measures the text.
        max_tokens: Most tokens of `prompt + answer`, special tokens included.
        index: Which example, from 0.
        seed: The run's seed.
        qa: `"qa1"` to `"qa5"`.
        text: Prose for the noise, from a random place on; it must not be an evaluation's. None means the
            noise sentence of passkey retrieval, again and again.
        fill: Fill all prompts up.

    Returns:
        The prompt and the answer in the form that the prompt asks for: tokenize them as one text
        (`encode_pair`).

    Raises:
        ConfigurationError: for another task.
        DataError: if `max_tokens` cannot hold a story of the task, or the text has no sentence of ten tokens.
    """
    return babilong_training_pairs(tokenizer, max_tokens, index, seed, qa=qa, text=text, fill=fill)[0]


def babilong_training_pairs(
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    index: int,
    seed: int,
    *,
    qa: BabiTask,
    text: str | None = None,
    fill: bool = False,
    questions: int = 1,
    noise_shares: tuple[float, float, float] = NOISE_SHARES,
) -> list[tuple[str, str]]:
    """Return `babilong_training_pair`, and further questions about the same facts with their answers.

    A story of a thousand tokens is a lot to read for the one word that an answer tells. The further questions
    are all of the task that the facts answer at their end, in random order. Where these are too few, simpler
    ones follow, of what the task's answers build on: for qa2 where people are, for qa3 where objects and then
    where people are. No question is, with these facts, one of evaluation. A short sample holds fewer.

    Args:
        tokenizer: Measures the text.
        max_tokens: Most tokens of all prompts and answers, special tokens included.
        index: As for `babilong_training_pair`, and so are the next ones.
        seed: See above.
        qa: See above.
        text: See above.
        fill: See above.
        questions: Most questions; at least 1.
        noise_shares: How many of the prompts are filled up with noise, have some, and have none, relative to
            one another. Where `fill` is set, all are filled up.

    Returns:
        Prompts and answers that follow one another: tokenize them as one text (`encode_pairs`). The first
        prompt is BABILong's, a further one `"\\n\\nQuestion: ..."`.

    Raises:
        ConfigurationError: for another task, no question, or shares that are not three, or below 0, or all 0.
        DataError: as `babilong_training_pair`.
    """
    check_length(max_tokens)
    choose(qa, BABI_TASKS, "qa")
    if isinstance(questions, bool) or not isinstance(questions, int) or questions < 1:
        raise ConfigurationError(f"questions is {questions!r}; it must be a whole number, at least 1.")
    if len(noise_shares) != 3 or min(noise_shares) < 0 or not any(noise_shares):
        raise ConfigurationError(
            f"noise_shares is {noise_shares!r}; give three numbers, none below 0 and not all 0."
        )
    total = sum(noise_shares)
    filled, noisy = noise_shares[0] / total, (noise_shares[0] + noise_shares[1]) / total
    rng = sample_rng(f"babilong_{qa}", max_tokens, index, seed, "train")
    most_lines = (max_tokens - _shortest_prompt(tokenizer, qa)) // 5
    for _ in range(20):
        if most_lines < 3:
            break
        asked = _simulate(qa, rng, "train", most_lines, max_stories=200)
        answer = _training_answer(qa, asked)
        plain = babilong_prompt(qa, " ".join(asked.facts), asked.text)
        further = _further_pairs(qa, asked, rng, questions - 1)
        spare = max_tokens - _count_pairs(tokenizer, [(plain, answer), *further])
        while spare < 0 and further:
            further.pop()
            spare = max_tokens - _count_pairs(tokenizer, [(plain, answer), *further])
        if spare < 0:
            most_lines = len(asked.facts)
            continue
        share = rng.random()
        noise_tokens = 0
        if fill or share < filled:
            noise_tokens = spare
        elif share < noisy:
            noise_tokens = round(spare * rng.random())
        noise = NOISE_SENTENCE if text is None else text
        while noise_tokens > 0:
            context = _scatter(tokenizer, asked.facts, noise, noise_tokens, rng)
            pairs = [(babilong_prompt(qa, context.text, asked.text), answer), *further]
            excess = _count_pairs(tokenizer, pairs) - max_tokens
            if excess <= 0:
                return pairs
            noise_tokens -= excess
        return [(plain, answer), *further]
    raise DataError(
        f"{max_tokens} tokens cannot hold BABILong's prompt of {qa} and a story: the prompt alone takes "
        f"{_shortest_prompt(tokenizer, qa)}. Give at least {_shortest_prompt(tokenizer, qa) + 60} tokens."
    )


def babilong_training_label(answer: str) -> tuple[int, int]:
    """Return where the label is in an answer of `babilong_training_pairs`.

    It is what the story has to be read for: all else in the answer follows from the question.

    Args:
        answer: The answer.

    Returns:
        The index of the label's first character, and that after its last.

    Raises:
        ConfigurationError: for a text that names no label.

    Example:
        >>> answer = "\\nAnswer: The most recent location of Mary is bathroom."
        >>> first, last = babilong_training_label(answer)
        >>> answer[first:last]
        'bathroom'
    """
    found = re.search(r"(\w+)\.?$", answer)
    if found is None:
        raise ConfigurationError(f"{answer!r} is no answer of babilong_training_pairs: it ends in no label.")
    return found.span(1)


# What an answer builds on: where whoever carries the object is, and where the object is at last.
_SIMPLER: dict[BabiTask, tuple[BabiTask, ...]] = {"qa2": ("qa1",), "qa3": ("qa2", "qa1")}


def _further_pairs(qa: BabiTask, asked: _Question, rng: random.Random, most: int) -> list[tuple[str, str]]:
    chosen: list[tuple[str, str]] = []
    for task in (qa, *_SIMPLER.get(qa, ())):
        if len(chosen) == most:
            break
        found = [
            _Question(asked.facts, text, solution.answer, solution.supports)
            for text, solution in solve_all(task, asked.facts).items()
            if text != asked.text and not _is_held_out(asked.facts, text)
        ]
        taken = rng.sample(found, min(most - len(chosen), len(found)))
        chosen += [(_further_prompt(one.text), _training_answer(task, one)) for one in taken]
    return chosen


def _is_held_out(facts: Sequence[str], question: str) -> bool:
    # By content and not by seed alone: short stories come up again and again.
    return held_out("\n".join([*facts, question]))


def _further_prompt(question: str) -> str:
    after_context = str(_prompts()["template"]).rpartition("</context>")[2]
    return after_context.format(question=question)


def _count_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> int:
    return count_tokens(tokenizer, "".join(prompt + answer for prompt, answer in pairs))


def _training_answer(qa: BabiTask, asked: _Question) -> str:
    """Return the answer as the prompt's examples have it, on a line of its own; the label comes last."""
    words = re.findall(r"\w+", asked.text)
    if qa == "qa1":
        said = f"The most recent location of {words[-1]} is {asked.answer}."
    elif qa == "qa2":
        said = f"The {words[-1]} is in the {asked.answer}."
    elif qa == "qa3":
        said = f"Before the {words[-1]} the {words[3]} was in the {asked.answer}."
    else:
        said = asked.answer
    return f"\nAnswer: {said}"


def _room(length: int) -> int:
    """Return the tokens of facts and noise in a length, 0 for the facts alone."""
    if length == 0 and not isinstance(length, bool):
        return 0
    room = check_length(length) - PROMPT_TOKENS
    if room < 3 * TOKENS_A_LINE:
        raise DataError(
            f"BABILong sets {PROMPT_TOKENS} tokens aside for the prompt and {TOKENS_A_LINE} for each line, "
            f"which leaves nothing of {length}. Ask for 0 (the facts alone) or at least "
            f"{PROMPT_TOKENS + 3 * TOKENS_A_LINE}."
        )
    return room


def _simulate(
    qa: BabiTask, rng: random.Random, split: Split, most_lines: int | None, max_stories: int = 1_000
) -> _Question:
    for _ in range(max_stories):
        story = simulate_story(qa, rng)
        asked = rng.choice(_questions(story))
        if most_lines is not None and asked.num_lines > most_lines:
            continue
        if _is_held_out(asked.facts, asked.text) == (split == "evaluation"):
            return asked
    raise DataError(
        f"Among {max_stories} stories of {qa} none is as short as the {most_lines} lines that this length "
        "holds. Ask for a greater length."
    )


def _questions(story: Story) -> list[_Question]:
    return [
        _Question(story.facts[: one.num_facts], one.text, one.answer, one.supports) for one in story.questions
    ]


@lru_cache(maxsize=8)
def _all_published(source: TextSource) -> list[_Question]:
    return [asked for story in parse_stories(source.text, source.name) for asked in _questions(story)]


@lru_cache(maxsize=32)
def _published_in_order(source: TextSource, most_lines: int | None, seed: int) -> list[_Question]:
    fitting = [
        asked for asked in _all_published(source) if most_lines is None or asked.num_lines <= most_lines
    ]
    sample_rng(source.name, 0, 0, seed).shuffle(fitting)
    return fitting


def _published(source: TextSource, most_lines: int | None, index: int, seed: int) -> _Question:
    fitting = _published_in_order(source, most_lines, seed)
    if not fitting:
        raise DataError(
            f"No story of {source.name} is as short as the {most_lines} lines that this length holds. Ask "
            "for a greater length."
        )
    if index >= len(fitting):
        raise DataError(
            f"{source.name} has {len(fitting)} questions for this length, and sample {index + 1} was asked "
            "for. Ask for fewer samples, or leave the option babi out to make new stories."
        )
    return fitting[index]


def _last_named(qa: BabiTask, asked: _Question) -> str:
    """Return the label that a reader without understanding would answer."""
    labels: Sequence[str] = PLACES
    if qa == "qa5":
        labels = OBJECTS if asked.text.startswith("What") else GIVING_ACTORS
    in_question = set(re.findall(r"\w+", asked.text))
    for fact in reversed(asked.facts):
        for word in reversed(re.findall(r"\w+", fact)):
            if word in labels and word not in in_question:
                return str(word)
    return ""


def _first_sentence(text: str) -> str:
    text = text.lower()
    return text[: min((place for cut in _CUTS if (place := text.find(cut)) >= 0), default=len(text))]


def _scatter(
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[str],
    noise: str,
    noise_tokens: int,
    rng: random.Random,
) -> _Context:
    """Return the facts in their order at random places between the sentences of the noise."""
    sentences, repeats = _noise_sentences(tokenizer, noise, noise_tokens, rng)
    places = sorted(rng.randrange(len(sentences) + 1) for _ in facts)
    pieces: list[str] = []
    starts: list[int] = []
    position = done = 0
    for number in range(len(sentences) + 1):
        while done < len(facts) and places[done] == number:
            starts.append(position)
            pieces.append(facts[done])
            position += len(facts[done]) + 1
            done += 1
        if number < len(sentences):
            pieces.append(sentences[number])
            position += len(sentences[number]) + 1
    return _Context(" ".join(pieces), tuple(starts), len(sentences), repeats)


def _noise_sentences(
    tokenizer: PreTrainedTokenizerBase, text: str, num_tokens: int, rng: random.Random
) -> tuple[list[str], int]:
    """Return sentences of so many tokens in all, the last one cut, and how often the text had to start over.

    From a random place on. Shorter sentences than ten tokens are left out, as is the one that the place falls
    into.
    """
    if num_tokens <= 0:
        return [], 0
    if text == NOISE_SENTENCE:
        unit = _count_pieces(tokenizer, [text])[0]
        sentences = [text] * (num_tokens // unit)
        rest = _trim(tokenizer, text, num_tokens % unit)
        return sentences + ([rest] if rest else []), 0
    position = rng.randrange(max(1, len(text)))
    kept: list[str] = []
    left, passed, is_cut = num_tokens, 0, position > 0
    while left:
        # Five characters a token is a little more than English prose has; what is missing comes next time.
        window = text[position : position + 5 * left + 1_000]
        at_end = position + len(window) >= len(text)
        spans = _sentence_spans(window)
        # The last sentence goes on after the window and begins the next; one longer than a window is cut.
        is_long = len(spans) < 2 and not at_end
        whole = spans[int(is_cut) : len(spans) if at_end or is_long else -1]
        counts = _count_pieces(tokenizer, [window[begin:end] for begin, end in whole])
        step = len(window) if at_end or is_long else spans[-1][0]
        for (begin, end), tokens in zip(whole, counts, strict=True):
            if tokens < MIN_SENTENCE_TOKENS:
                continue
            if tokens < left:
                kept.append(window[begin:end])
                left -= tokens
                continue
            rest = _trim(tokenizer, window[begin:end], left)
            kept += [rest] if rest else []
            left, step = 0, end
            break
        passed += step
        position, is_cut = (0, False) if at_end else (position + step, is_long)
        if not kept and left and passed >= 2 * len(text):
            raise DataError(
                f"The text for noise has no sentence of {MIN_SENTENCE_TOKENS} tokens or more. Give prose."
            )
    return kept, (passed - 1) // len(text)


def _sentence_spans(text: str) -> list[tuple[int, int]]:
    import punkt  # here, since it takes a tenth of a second

    # Without a model, as BABILong has it: "Mr." ends a sentence.
    splitter = punkt.PunktSentenceTokenizer(punkt.PunktParameters())
    return [(int(begin), int(end)) for begin, end in splitter.span_tokenize(text)]


# By tokenizer: what goes in front of a piece so that it is tokenized as inside a text.
_fronts: WeakKeyDictionary[PreTrainedTokenizerBase, str] = WeakKeyDictionary()


def _front(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer not in _fronts:
        inside = _encode(tokenizer, "One The house")[len(_encode(tokenizer, "One")) :]
        # SentencePiece puts the space there by itself, and a second one would be a token more.
        _fronts[tokenizer] = "" if _encode(tokenizer, "The house") == inside else " "
    return _fronts[tokenizer]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False).input_ids]


def _count_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str]) -> list[int]:
    if not pieces:
        return []
    front = _front(tokenizer)
    encoded = tokenizer([front + piece for piece in pieces], add_special_tokens=False, verbose=False)
    return [len(tokens) for tokens in encoded.input_ids]


def _trim(tokenizer: PreTrainedTokenizerBase, text: str, num_tokens: int) -> str:
    tokens = _encode(tokenizer, _front(tokenizer) + text)[:num_tokens]
    # A character of several tokens may be cut through.
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False)).strip().rstrip("\ufffd")


@lru_cache(maxsize=2)
def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"length_tokenizer is {name!r}, which cannot be loaded: {str(error).strip().splitlines()[0]} "
            "Give a name on the hub, a folder, or None for the model's own."
        ) from error
    return tokenizer


@lru_cache(maxsize=1)
def _prompts() -> dict[str, Any]:
    text = files("lawcat.tasks").joinpath("data/babilong_prompts.json").read_text(encoding="utf-8")
    prompts: dict[str, Any] = json.loads(text)
    return prompts


# By tokenizer: the tokens of a task's prompt with nothing in it.
_shortest: WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, int]] = WeakKeyDictionary()


def _shortest_prompt(tokenizer: PreTrainedTokenizerBase, qa: BabiTask) -> int:
    known = _shortest.setdefault(tokenizer, {})
    if qa not in known:
        known[qa] = count_tokens(tokenizer, babilong_prompt(qa, "", "Who?") + "\nAnswer: office")
    return known[qa]
