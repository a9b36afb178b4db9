"""The last word of a passage, to be said from everything before it: LAMBADA's form, on any text.

Source: Paperno et al., "The LAMBADA dataset" (arXiv 1606.06031), for the form. Its passages were chosen by
people, who could guess the word from the passage and not from the last sentence; ours are taken as they come,
so that any text will do, and accuracies are lower than on LAMBADA. They compare models on the same text.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from lawcat.errors import ConfigurationError, DataError
from lawcat.tasks.context import split_sentences
from lawcat.tasks.haystack import TextSource, resolve_source
from lawcat.tasks.sample import Sample, SampleRequest, Task, count_tokens, register_task, sample_rng

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD = r"[^\W\d_]+(?:['’-][^\W\d_]+)*"
_ENDING = re.compile(rf"(?P<before>.*\S)\s(?P<word>{_WORD})[.!?…]+[\"'”’)\]]*", re.DOTALL)
_SAID = re.compile(rf"\s*(?P<word>{_WORD})")
# What a word may still go on with: a hyphen or an apostrophe is inside of it if a letter follows.
_UNFINISHED = re.compile(rf"\s*(?:{_WORD}(?:['’-]|[^\W\d_])?)?\ufffd?")

# A stretch of text that one passage is taken from; prose has four to five characters a token.
_CHARS_A_TOKEN = 8
_MAX_ROUNDS = 32
_GOLDEN = (math.sqrt(5) - 1) / 2
_LEAST_SENTENCES = 2
_LEAST_WORDS = 4  # of the last sentence; "he said." is part of one
# Tokens beside the target's own: one that ends it, and some for a word that is spelled in smaller pieces.
_SPARE_TOKENS = 3


class LastWord(Task):
    """The last word of a passage of whole sentences.

    A nominal length of L tokens gives passages that have from L/2 to L tokens before their last word,
    special tokens included, as many whole sentences as fit (at least two). The text is cut into stretches of
    8 L characters, which the seed puts in order; sample i is from the i-th of them that holds a passage, so
    no two overlap. Where a text has too few, it is cut again at other places: no last word comes twice, but
    passages overlap, and `haystack_repeats` in the metadata says how often the text was cut anew.

    Options:
        haystack: The text: a `TextSource`, `"emerson-excerpt"`, a path or a glob, `"hf:owner/name"`. None is
            the built-in excerpt, which has about 100 passages of 128 tokens that do not overlap.
        min_letters: Fewest letters of the last word.
        mentioned: Whether the word has to occur earlier in the passage (upper and lower case alike), as in
            five of six passages of LAMBADA: then a model can win by remembering.

    Metric:
        accuracy: The first word of the continuation is the last word of the passage, upper and lower case
            as there. Punctuation after it does not count; punctuation before it, or a longer word, is wrong.

    Example:
        >>> sample = Sample("last_word", 64, 0, 0, "Lambs eat grass. We have a", ("lamb",), 4, 9)
        >>> LAST_WORD.score(sample, " lamb, and"), LAST_WORD.score(sample, " lambs.")
        ({'accuracy': 1.0}, {'accuracy': 0.0})
    """

    name = "last_word"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    default_options: ClassVar[Mapping[str, Any]] = {"haystack": None, "min_letters": 3, "mentioned": False}
    uses_prose = True

    def resolve_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options with defaults filled in, the haystack as a `TextSource`."""
        chosen = super().resolve_options(options)
        letters, mentioned = chosen["min_letters"], chosen["mentioned"]
        if isinstance(letters, bool) or not isinstance(letters, int) or letters < 1:
            raise ConfigurationError(f"min_letters is {letters!r}; it must be a whole number, at least 1.")
        if not isinstance(mentioned, bool):
            raise ConfigurationError(f"mentioned is {mentioned!r}; it must be true or false.")
        chosen["haystack"] = resolve_source(chosen["haystack"])
        return chosen

    def make(self, request: SampleRequest) -> Sample:
        """Return one passage without its last word; see the class for the options.

        Raises:
            ConfigurationError: for `split="train"`: to train on last words, train on text.
            DataError: if the text has no passage of that length, or not so many.
        """
        if request.split != "evaluation":
            raise ConfigurationError(
                f"last_word has no split {request.split!r}, only 'evaluation': any text teaches it. Train on "
                "text that it is not measured on."
            )
        tokenizer, options = request.tokenizer, request.options
        source: TextSource = options["haystack"]
        which = (request.length, request.seed, options["min_letters"], options["mentioned"])
        known = _known.setdefault(tokenizer, {})
        key = (source.sha256, *which)
        if key not in known:
            known[key] = _Passages(source, *which)
        passage = known[key].get(tokenizer, request.index)
        said = tokenizer(f" {passage.word}", add_special_tokens=False, verbose=False).input_ids
        return request.sample(
            passage.prompt,
            (passage.word,),
            len(said) + _SPARE_TOKENS,
            num_tokens=passage.num_tokens,
            metadata={
                "sentences": passage.num_sentences,
                "mentioned": _mentions(passage.prompt, passage.word),
                "haystack_repeats": passage.round,
            },
        )

    def score(self, sample: Sample, answer_text: str) -> dict[str, float]:
        """Return accuracy; see the class."""
        match = _SAID.match(answer_text)
        return {"accuracy": float(match is not None and match["word"] == sample.answers[0])}

    def is_answered(self, sample: Sample, answer_text: str) -> bool:
        """Return whether the first word is complete, or something else than a word comes first."""
        return _UNFINISHED.fullmatch(answer_text) is None


LAST_WORD = register_task(LastWord())


@dataclass(frozen=True)
class _Passage:
    """A passage without its last word, and that word."""

    prompt: str
    word: str
    num_tokens: int
    num_sentences: int
    round: int


@dataclass
class _Passages:
    """The passages of a text in the order of their indices, as far as they were asked for."""

    source: TextSource
    length: int
    seed: int
    min_letters: int
    mentioned: bool
    _found: list[_Passage] = field(default_factory=list)
    _endings: set[tuple[str, str]] = field(default_factory=set)
    _waiting: list[int] = field(default_factory=list)
    _num_rounds: int = 0

    def get(self, tokenizer: PreTrainedTokenizerBase, index: int) -> _Passage:
        """Return passage `index`."""
        while len(self._found) <= index:
            if not self._waiting:
                self._begin_round(index)
            passage = self._take(tokenizer, self._waiting.pop())
            if passage is not None:
                self._found.append(passage)
        return self._found[index]

    def _begin_round(self, index: int) -> None:
        is_hopeless = self._num_rounds > 0 and not self._found
        if is_hopeless or self._num_rounds == _MAX_ROUNDS:
            mentioned = ", which occurs earlier in them" if self.mentioned else ""
            raise DataError(
                f"The text {self.source.name!r} has {len(self._found)} passages of {self.length // 2} to "
                f"{self.length} tokens before a last word of {self.min_letters} letters or more{mentioned}; "
                f"sample {index} was asked for. Give a longer text of whole sentences (haystack), or ask for "
                "fewer samples or another length."
            )
        width = self._width()
        offset = round(width * (self._num_rounds * _GOLDEN % 1))
        self._waiting = list(range(offset, max(len(self.source.text) - width // 2, offset + 1), width))
        rng = sample_rng(LAST_WORD.name, self.length, -1 - self._num_rounds, self.seed)
        rng.shuffle(self._waiting)
        self._num_rounds += 1

    def _width(self) -> int:
        return _CHARS_A_TOKEN * self.length

    def _take(self, tokenizer: PreTrainedTokenizerBase, start: int) -> _Passage | None:
        """Return a passage of the stretch that starts there, or None if it holds none."""
        text = self.source.text
        stop = start + self._width()
        sentences = _sentences(text[start:stop])
        # What is cut off at either end is no sentence.
        sentences = sentences[1 if start > 0 else 0 : -1 if stop < len(text) else None]
        places = list(range(_LEAST_SENTENCES - 1, len(sentences)))
        random.Random(f"{self.seed} {start}").shuffle(places)
        for place in places:
            passage = self._end_at(tokenizer, sentences, place)
            if passage is not None:
                return passage
        return None

    def _end_at(
        self, tokenizer: PreTrainedTokenizerBase, sentences: list[str], place: int
    ) -> _Passage | None:
        last = sentences[place]
        match = _ENDING.fullmatch(last)
        if match is None or len(last.split()) < _LEAST_WORDS:
            return None
        word = match["word"]
        if sum(map(str.isalpha, word)) < self.min_letters:
            return None

        def prompt_from(first: int) -> str:
            return "".join([*sentences[first:place], match["before"]]).lstrip()

        if self.mentioned and not _mentions(prompt_from(0), word):  # before anything is tokenized
            return None

        # The first sentence with which the passage fits, by halves.
        low, high = 0, place - _LEAST_SENTENCES + 2
        while low < high:
            middle = (low + high) // 2
            if count_tokens(tokenizer, prompt_from(middle)) <= self.length:
                high = middle
            else:
                low = middle + 1
        if low > place - _LEAST_SENTENCES + 1:
            return None
        prompt = prompt_from(low)
        num_tokens = count_tokens(tokenizer, prompt)
        ending = (sentences[place - 1].strip(), last.strip())
        if 2 * num_tokens < self.length or ending in self._endings:
            return None
        if (self.mentioned and not _mentions(prompt, word)) or not _survives(tokenizer, word):
            return None
        self._endings.add(ending)
        return _Passage(prompt, word, num_tokens, place - low + 1, self._num_rounds - 1)


# By tokenizer and what else decides.
_known: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[object, ...], _Passages]] = WeakKeyDictionary()


def _sentences(text: str) -> list[str]:
    """Return the sentences of a text, each with what stands before it: a space, or an empty line.

    Lines that a file was wrapped at are no lines of the text.
    """
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        before = "\n\n"
        for sentence in split_sentences(" ".join(paragraph.split())) if paragraph.strip() else []:
            found.append(before + sentence)
            before = " "
    return found


def _mentions(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _survives(tokenizer: PreTrainedTokenizerBase, word: str) -> bool:
    """Return whether a model can say the word: where it comes back changed, as in lower case, none can."""
    tokens = tokenizer(f" {word}", add_special_tokens=False, verbose=False).input_ids
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text.strip() == word
