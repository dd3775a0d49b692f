"""A model's answers to the three kinds of requests of evaluation harnesses. Needs the core alone.

Every text is read from an empty memory after ``</s>``, whole: nothing is cut off, however long it is.

Shapes: T words of a text.
"""

from dataclasses import dataclass
from typing import Callable, Iterator, List, Mapping, NamedTuple, Sequence, Tuple, TypeVar

import torch
from torch import Tensor

from ..core import LanguageModel, Tokenizer
from ..core.decoding.drawing import Draw
from ..core.text import END

Request = TypeVar("Request")
WORDS_AT_ONCE = 16  # drawn before texts are searched for the strings that end them
MAX_NEW_WORDS = 256
ONE = ("num_beams", "num_return_sequences")  # of these settings only 1 is served
TAKEN = ("until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "use_cache", *ONE)


class Likelihood(NamedTuple):
    """The natural logarithm of a text's probability, and whether greedy decoding gives this text."""

    log_prob: float
    greedy: bool


@dataclass(frozen=True)
class Settings:
    """The settings with which a text is continued.

    Args:
        until: strings before which the continuation ends.
        count: words to draw at most.
        draw: the choice of a word.
    """

    until: Tuple[str, ...]
    count: int
    draw: Draw

    @classmethod
    def of(cls, given: Mapping[str, object]) -> "Settings":
        """Return the settings that a task gives by name.

        Raises:
            ValueError: a name is not known, or a value makes no sense.
        """
        for name, value in given.items():
            if name not in TAKEN:
                raise ValueError(f"generation setting '{name}' is not served: the known ones are {', '.join(TAKEN)}")
            if name in ONE and value != 1:
                raise ValueError(f"generation setting {name}={value} is not served: pass {name}=1")
        until = given.get("until") or ()
        strings = (until,) if isinstance(until, str) else tuple(map(str, _sequence("until", until)))
        count = _number("max_gen_toks", given.get("max_gen_toks", given.get("max_new_tokens", MAX_NEW_WORDS)))
        temperature = _number("temperature", given.get("temperature", 0.0))
        if not given.get("do_sample", temperature > 0):
            temperature = 0.0
        elif temperature == 0:
            temperature = 1.0
        tops = int(_number("top_k", given.get("top_k", 0))), _number("top_p", given.get("top_p", 1.0))
        draw = Draw(temperature, *tops) if temperature else Draw(temperature)  # without choice, tasks write any top_p
        return cls(tuple(string for string in strings if string), int(count), draw)


class Answers:
    """Answers to requests, in their order.

    Args:
        model: in evaluation mode, with a tokenizer.
        batch_size: texts that are read side by side.
        done: called with the number of requests that have just been answered.

    Raises:
        ValueError: the model has no tokenizer, or the batch size is not positive.
    """

    def __init__(self, model: LanguageModel, batch_size: int = 1, done: Callable[[int], None] = lambda number: None):
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer: its folder needs dict.txt of the model's data")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: pass a positive number")
        self._model, self._tokenizer, self._batch_size, self._done = model, model.tokenizer, batch_size, done

    def continuations(self, pairs: Sequence[Tuple[str, str]]) -> List[Likelihood]:
        """Return the likelihood of each continuation given its context.

        Args:
            pairs: of a context, which may be empty, and a continuation.

        Raises:
            ValueError: the tokenizer drops all of a continuation, which would then be certain.
        """
        words = [split_words(self._tokenizer, *pair) for pair in pairs]
        for (_, text), (_, continuation) in zip(pairs, words, strict=True):
            _refuse_dropped("continuation", text, continuation)
        answers = [Likelihood(0.0, True)] * len(pairs)
        for batch in self._batches([len(context) + len(continuation) for context, continuation in words]):
            reader = self._model.reader(len(batch))
            reader.read([words[number][0] for number in batch])
            scores = reader.score([words[number][1] for number in batch], greedy=True)
            for number, score in zip(batch, scores, strict=True):
                assert score.greedy is not None
                answers[number] = Likelihood(_total(score.log_probs), bool(score.greedy.all()))
            self._done(len(batch))
        return answers

    def documents(self, texts: Sequence[str]) -> List[float]:
        """Return the natural logarithm of each text's probability; its memory is carried along the whole text.

        Raises:
            ValueError: the tokenizer drops all of a text, which would then be certain.
        """
        encoded = [self._tokenizer.encode(text) for text in texts]
        for text, of_text in zip(texts, encoded, strict=True):
            _refuse_dropped("document", text, of_text)
        words = list(map(_after_end, encoded))
        answers = [0.0] * len(texts)
        for batch in self._batches([len(text) for text in words]):
            scores = self._model.score_documents([words[number] for number in batch], num_streams=len(batch))
            for number, log_probs in zip(batch, scores, strict=True):
                answers[number] = _total(log_probs)
            self._done(len(batch))
        return answers

    def continued(self, requests: Sequence[Tuple[str, Settings]]) -> List[str]:
        """Return a continuation of each context, by its settings."""
        answers = [""] * len(requests)
        words = [_after_end(self._tokenizer.encode(context)) for context, _ in requests]
        by_settings: dict[Settings, List[int]] = {}
        for number, (_, settings) in enumerate(requests):
            by_settings.setdefault(settings, []).append(number)
        for settings, numbers in by_settings.items():
            for chosen in self._batches([len(words[number]) for number in numbers]):
                batch = [numbers[entry] for entry in chosen]
                texts = self._continue([words[number] for number in batch], settings)
                for number, text in zip(batch, texts, strict=True):
                    answers[number] = text
                self._done(len(batch))
        return answers

    def _continue(self, contexts: Sequence[Tensor], settings: Settings) -> List[str]:
        reader = self._model.reader(len(contexts))
        reader.read(contexts)
        words = torch.empty(len(contexts), 0, dtype=torch.int64)
        texts = [""] * len(contexts)
        while words.size(1) < settings.count:
            count = min(WORDS_AT_ONCE, settings.count - words.size(1))
            words = torch.cat([words, reader.generate(count, settings.draw).words.cpu()], dim=1)
            texts = [self._tokenizer.decode(row) for row in words]
            if all(_end(text, settings.until) is not None for text in texts):
                break
        return [text[: _end(text, settings.until)] for text in texts]

    def _batches(self, lengths: Sequence[int]) -> Iterator[List[int]]:
        """Yield batches of numbers of texts, those of like lengths together, the longest first."""
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        for start in range(0, len(order), self._batch_size):
            yield order[start : start + self._batch_size]


def split_words(tokenizer: Tokenizer, context: str, continuation: str) -> Tuple[Tensor, Tensor]:
    """Return the words ``[T]`` of a context, after ``</s>``, and of its continuation.

    Both are tokenized together. Spaces between them belong to the continuation; so does a word that begins in the
    context and ends in the continuation.
    """
    stripped = context.rstrip(" ")
    continuation = context[len(stripped) :] + continuation
    before, together = tokenizer.encode(stripped), tokenizer.encode(stripped + continuation)
    length = min(len(before), len(together))
    same = int((before[:length] == together[:length]).long().cumprod(0).sum())
    return _after_end(together[:same]), together[same:]


def _refuse_dropped(what: str, text: str, words: Tensor) -> None:
    if text.strip() and len(words) == 0:
        shown = repr(text if len(text) <= 60 else f"{text[:60]}...")
        raise ValueError(
            f"the model's tokenizer drops the {what} {shown}, which then has no probability: leave the task out"
        )


def _after_end(words: Tensor) -> Tensor:
    return torch.cat([words.new_tensor([END]), words])


def _total(log_probs: Tensor) -> float:
    return float(log_probs.double().sum())


def _end(text: str, until: Sequence[str]) -> int | None:
    """Return the start of the first of the strings in a text, None if it has none of them."""
    starts = [start for string in until if (start := text.find(string)) >= 0]
    return min(starts, default=None)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ValueError(f"generation setting {name} is {value!r}: pass a number, 0 or larger")
    return value


def _sequence(name: str, value: object) -> Sequence[object]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"generation setting {name} is {value!r}: pass a string or a list of strings")
    return value
