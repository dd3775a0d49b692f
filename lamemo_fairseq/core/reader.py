"""Texts read piece by piece: scored and continued, with the memory carried from one piece to the next.

Shapes: B texts, T words of a piece, k of them at a time, n new words.
"""

from typing import Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from .decoder import MemoryDecoder
from .decoding.drawing import Adjustment, Draw
from .decoding.sampler import Continuation, Sampler
from .decoding.state import TOKENS_AT_ONCE, DecodingState
from .segments import read_into
from .text import END, Tokenizer

Text = Union[str, Tensor]  # a string, or word ids [T]


class Score(NamedTuple):
    """The words of a text that were scored, and the log-probability of each given all words before it."""

    words: Tensor  # [T] int64
    log_probs: Tensor  # [T], natural logarithms, float32 or wider
    greedy: Optional[Tensor] = None  # [T] bool, whether a word is the most probable one, if asked for


class Token(NamedTuple):
    """A word that has been drawn."""

    word: int
    symbol: str  # as in the dictionary; without a tokenizer, the digits of the id
    log_prob: float


class Reader:
    """B texts that a model reads piece by piece, each with a memory of its own.

    However a text is cut into pieces, its words get the log-probabilities that they have in the whole text. The first
    word of a text has no word before it and is not scored. A text that begins as a string begins with ``</s>``.

    Args:
        decoder: a model in evaluation mode.
        tokenizer: for texts that are strings; None if there are none.
        batch_size: B.

    Raises:
        ValueError: the model is in training mode, the tokenizer is another model's, or B is not positive.
    """

    def __init__(self, decoder: MemoryDecoder, tokenizer: Optional[Tokenizer] = None, batch_size: int = 1):
        if decoder.training:
            raise ValueError("a text is read without dropout: call model.eval() first")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, it must be positive")
        if tokenizer is not None:
            tokenizer.check_size(decoder.config.vocabulary_size)
        self.decoder, self.tokenizer = decoder, tokenizer
        self._state = DecodingState(decoder, batch_size)
        # The last word of each text, which the state has not read yet; [0] before the first.
        self._last = [self._state.cache.tokens.new_empty(0)] * batch_size
        self._sampler: Optional[Sampler] = None  # sampler of the last call, stored for its graphs

    def __len__(self) -> int:
        """Return the number of texts, B."""
        return len(self._last)

    @torch.no_grad()
    def read(self, texts: Union[Text, Sequence[Text]]) -> None:
        """Read the next pieces of the texts, of any lengths, without scoring them.

        Raises:
            ValueError: there are not B pieces, a word id is not known, or a string is given without a tokenizer.
        """
        tokens, counts = self._padded(self._pieces(texts))
        if max(counts) > 0:
            for _ in read_into(self._state, self.decoder, tokens[:, :-1], counts):
                pass

    @torch.no_grad()
    def score(self, texts: Union[Text, Sequence[Text]], greedy: bool = False) -> List[Score]:
        """Read the next pieces of the texts, and return the scores of their words; errors as for `read`.

        A bounded number of scores is computed at a time, so that a piece may have any length.

        Args:
            texts: as for `read`.
            greedy: also return whether each word is the most probable one.
        """
        pieces = self._pieces(texts)
        tokens, counts = self._padded(pieces)
        log_probs = [tokens.new_empty(len(self), 0, dtype=torch.float32)]
        best = [tokens.new_empty(len(self), 0)]
        for read, features in read_into(self._state, self.decoder, tokens, counts, TOKENS_AT_ONCE):
            log_probs.append(self.decoder.target_log_probs(features, tokens[:, read.start + 1 : read.stop + 1]))
            if greedy:  # a word at a time, as the scores of all words are many
                best += [self.decoder.log_probs(word).argmax(-1) for word in features.split(1, dim=1)]
        scored = zip(pieces, torch.cat(log_probs, dim=1), torch.cat(best, dim=1), counts, strict=True)
        return [
            Score(piece[1:], row[:n], piece[1:] == likeliest[:n] if greedy else None)
            for piece, row, likeliest, n in scored
        ]

    def generate(self, count: int, draw: Optional[Draw] = None, seed: Optional[int] = None) -> Continuation:
        """Continue each text by n = *count* words, which then belong to the text.

        Args:
            count: n.
            draw: the choice of a word, by default a draw from all.
            seed: of this call's own random numbers; None uses torch's.

        Raises:
            ValueError: a text has no word yet, or n is negative.
        """
        if count < 0:
            raise ValueError(f"count is {count}: pass the number of new words")
        with RandomNumbers(seed, self._device):
            drawn = self._sampler_for(draw or Draw()).go_on(self._last_words(), count)
        if count:
            self._last = list(drawn.words[:, -1:])
        return drawn

    def stream(
        self, count: Optional[int] = None, draw: Optional[Draw] = None, seed: Optional[int] = None
    ) -> Iterator[Token]:
        """Continue the one text, and yield each word as soon as it is drawn; arguments as for `generate`.

        With None for *count*, words are drawn for as long as the caller asks. Further pieces may be read in between.

        Raises:
            ValueError: there are several texts, or the text has no word yet; raised with the first word.
        """
        if len(self) != 1:
            raise ValueError(f"stream continues one text, and this reader has {len(self)}: call generate")
        sampler, numbers = self._sampler_for(draw or Draw()), RandomNumbers(seed, self._device)
        drawn = 0
        while count is None or drawn < count:
            with numbers:
                words, log_probs = sampler.go_on(self._last_words(), 1)
            self._last, drawn = [words[0]], drawn + 1
            word = int(words)
            yield Token(word, str(word) if self.tokenizer is None else self.tokenizer.symbols[word], float(log_probs))

    def reorder(self, order: Sequence[int]) -> None:
        """Let text i go on from the words that text ``order[i]`` has read. Texts may be repeated and left out.

        Raises:
            ValueError: a number is none of a text, or there are no numbers.
        """
        unknown = [text for text in order if not 0 <= text < len(self)]
        if unknown or not len(order):
            raise ValueError(
                f"order {f'has {unknown[0]}' if unknown else 'is empty'}: pass numbers of texts, 0 to {len(self) - 1}"
            )
        self._sampler = None  # its graphs write into the former tensors
        self._state.reorder(torch.tensor(order, device=self._device))
        self._last = [self._last[source] for source in order]

    def copy(self) -> "Reader":
        """Return a reader that has read the same texts, and goes on apart from this one."""
        twin = Reader(self.decoder, self.tokenizer, len(self))
        twin._state.copy_(self._state)
        twin._last = list(self._last)
        return twin

    def _sampler_for(self, draw: Draw) -> Sampler:
        if self._sampler is None or not self._sampler.serves(self._state, draw, Adjustment()):
            self._sampler = Sampler(self._state, draw)
        return self._sampler

    @property
    def _device(self) -> torch.device:
        return self._state.cache.tokens.device

    def _last_words(self) -> Tensor:
        """Return the last word of each text, ``[B]``."""
        if min(map(len, self._last)) == 0:
            raise ValueError("generate continues at least one text of at least one word: begin a text with its </s>")
        return torch.cat(self._last)

    def _pieces(self, texts: Union[Text, Sequence[Text]]) -> List[Tensor]:
        """Return the word ids ``[1 + T]`` of pieces after the last words of their texts; ``[T]`` if a text is empty."""
        given = listed(texts)
        if len(given) != len(self):
            raise ValueError(
                f"the reader reads {len(self)} texts, and pieces of {len(given)} were given: pass a piece of each"
            )
        pieces = [
            torch.cat([last, word_ids(self.decoder, self.tokenizer, text, begins=len(last) == 0).to(self._device)])
            for text, last in zip(given, self._last, strict=True)
        ]
        self._last = [piece[-1:] for piece in pieces]
        return pieces

    def _padded(self, pieces: Sequence[Tensor]) -> Tuple[Tensor, List[int]]:
        """Return the pieces in one tensor, and the number of each piece's words that another word follows."""
        return nn.utils.rnn.pad_sequence(list(pieces), batch_first=True), [max(len(piece) - 1, 0) for piece in pieces]


def listed(texts: Union[Text, Iterable[Text]]) -> List[Text]:
    """Return one text, or several, as a list.

    Raises:
        ValueError: there is no text, such as a number.
    """
    if isinstance(texts, (str, Tensor)):
        return [texts]
    if not isinstance(texts, Iterable):
        raise ValueError(
            f"a text is a string or a tensor [T] of word ids, not a {type(texts).__name__}: pass one, or a list of them"
        )
    return list(texts)


def word_ids(decoder: MemoryDecoder, tokenizer: Optional[Tokenizer], text: Text, begins: bool = True) -> Tensor:
    """Return the word ids ``[T]`` of a text, int64 on its device; a string that *begins* a text comes after ``</s>``.

    Raises:
        ValueError: a word id is not known, a string is given without a tokenizer, or *text* is neither.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError(
                "this model has no tokenizer: pass word ids, or set model.tokenizer = Tokenizer.load(FOLDER), "
                "which reads dict.txt there"
            )
        ids = tokenizer.encode(text)
        text = torch.cat([ids.new_tensor([END]), ids]) if begins else ids
    if not isinstance(text, Tensor):
        raise ValueError(f"a text is a string or a tensor [T] of word ids, not a {type(text).__name__}")
    if text.dim() != 1 or not _has_integers(text):
        raise ValueError(f"a text is a string or a tensor [T] of word ids, not {text.dtype} {list(text.shape)}")
    check_known(decoder, text, "a text has")
    return text.to(torch.int64)


def check_segment(tokens: Tensor, what: str = "a segment is") -> None:
    """Refuse what is no segment.

    Args:
        what: the beginning of the error.

    Raises:
        ValueError: *tokens* are no tensor ``[B, N]`` of integers, or there are none.
    """
    if not isinstance(tokens, Tensor):
        raise ValueError(f"{what} a tensor [B, N] of word ids, not a {type(tokens).__name__}")
    if tokens.dim() == 2 and not tokens.numel():
        raise ValueError(
            f"{what} a tensor [B, N] of word ids, and this one is {list(tokens.shape)}: read no further than the text, "
            "or a longer one"
        )
    if tokens.dim() != 2 or not _has_integers(tokens):
        raise ValueError(f"{what} a tensor [B, N] of word ids, not {tokens.dtype} {list(tokens.shape)}")


def _has_integers(ids: Tensor) -> bool:
    return not (ids.is_floating_point() or ids.dtype == torch.bool)


def check_known(decoder: MemoryDecoder, ids: Tensor, what: str) -> None:
    """Refuse word ids that a model does not know.

    Args:
        what: the beginning of the error.

    Raises:
        ValueError: an id is below 0, or not below the model's number of words.
    """
    words = decoder.config.vocabulary_size
    if ((ids < 0) | (ids >= words)).any():
        lowest, highest = int(ids.min()), int(ids.max())
        raise ValueError(f"{what} the word ids {lowest} to {highest}, and the model those from 0 to {words - 1}")


class RandomNumbers:
    """A context with random numbers of its own, drawn from a seed; without a seed, torch's random numbers.

    On leaving, torch's own random numbers go on as if the context had drawn none. Entered again, the context goes on
    where it was left.
    """

    def __init__(self, seed: Optional[int], device: torch.device):
        self._seed, self._device = seed, device
        self._inside: Optional[List[Tensor]] = None
        self._outside: List[Tensor] = []

    def __enter__(self) -> None:
        if self._seed is None:
            return
        self._outside = self._states()
        if self._inside is not None:
            self._restore(self._inside)
            return
        torch.default_generator.manual_seed(self._seed)
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                torch.cuda.manual_seed(self._seed)

    def __exit__(self, *error: object) -> None:
        if self._seed is not None:
            self._inside = self._states()
            self._restore(self._outside)

    def _states(self) -> List[Tensor]:
        of_device = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return [torch.get_rng_state(), *of_device]

    def _restore(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, self._device)
