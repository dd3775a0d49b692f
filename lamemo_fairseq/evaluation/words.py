"""Words of a text that is stored in pieces.

A piece is a symbol of the dictionary. V is their number.
"""

import logging
from dataclasses import dataclass
from typing import List, Optional, Sequence

import torch
from fairseq.data import Dictionary, data_utils
from torch import Tensor

logger = logging.getLogger(__name__)

# The text between words when pieces are written one behind the other, by fairseq's names for --post-process.
_BETWEEN_WORDS = {"sentencepiece": "\u2581", "wordpiece": "_", "letter": "|", "_EOW": "_EOW"}
_GOES_ON = "@@"  # ends a piece whose word goes on
_GOING_ON = ("subword_nmt", "@@ ", "@@")
_SILENCE = "<SIL>"


def check_post_process(name: Optional[str]) -> None:
    """Refuse a ``--post-process`` that fairseq does not know.

    Raises:
        ValueError: the name is not known; the message lists the known names.
    """
    known = (*_GOING_ON, *_BETWEEN_WORDS, "silence", "none")
    if name is not None and name not in known:
        raise ValueError(f"--post-process {name!r} is not known: pass one of {', '.join(map(repr, known))}")


def _check_mark(name: Optional[str], pieces: Sequence[str]) -> None:
    """Refuse a ``--post-process`` for which a whole line would be one word; warn of one that joins nothing."""
    mark = _BETWEEN_WORDS.get(name or "")
    if mark is not None and not any(mark in piece for piece in pieces):
        raise ValueError(
            f"--post-process {name} divides words at '{mark}', which no piece of the dictionary has: leave it out, or "
            "pass the name of the text's own pieces"
        )
    if name in _GOING_ON and not any(piece.endswith(_GOES_ON) for piece in pieces):
        logger.warning("--post-process %r has no effect: no piece of the dictionary ends with %s", name, _GOES_ON)


@dataclass(frozen=True)
class WordUnits:
    """The rules by which pieces are counted as words: a piece begins a word, or goes on with the word before.

    A piece belongs to the word before it if it `joins`, and that word is still open. ``</s>`` is a word.
    """

    name: Optional[str]  # fairseq's name for --post-process
    words: Tensor  # [V] int64, words of which the piece has a part
    joins: Tensor  # [V] bool, whether the piece goes on with a word that is open before it
    closes: Tensor  # [V] bool, whether no word is open behind the piece

    @classmethod
    def of(cls, name: Optional[str], dictionary: Dictionary) -> "WordUnits":
        """Make the units that ``--post-process`` names; without one, every piece is a word.

        Raises:
            ValueError: the name is not known, or no piece has the mark at which it divides words.
        """
        check_post_process(name)
        pieces: List[str] = [dictionary[i] for i in range(len(dictionary))]
        _check_mark(name, pieces)
        words, joins, closes = [1] * len(pieces), [False] * len(pieces), [True] * len(pieces)
        if name in _GOING_ON:
            name = "subword_nmt"  # fairseq joins the pieces under this name only
            joins = [True] * len(pieces)
            closes = [not piece.endswith(_GOES_ON) for piece in pieces]
        elif name in _BETWEEN_WORDS:
            mark = _BETWEEN_WORDS[name]
            words = [sum(map(bool, piece.split(mark))) for piece in pieces]
            joins = [not piece.startswith(mark) for piece in pieces]
            closes = [piece.endswith(mark) for piece in pieces]
        elif name == "silence":
            words = [int(piece.replace(_SILENCE, "") != "") for piece in pieces]
        eos = dictionary.eos()
        words[eos], joins[eos], closes[eos] = 1, False, True
        return cls(name, torch.tensor(words), torch.tensor(joins), torch.tensor(closes))

    def to(self, device: torch.device) -> "WordUnits":
        return WordUnits(self.name, self.words.to(device), self.joins.to(device), self.closes.to(device))

    def begun(self, pieces: Tensor, before: Tensor) -> Tensor:
        """Count the words that begin with each of *pieces*, given the pieces *before* them: int64 of their shape."""
        return self.words[pieces] - (self.joins[pieces] & ~self.closes[before]).long()

    def first_pieces(self, pieces: Tensor, before: Tensor) -> Tensor:
        """Tell which *pieces* ``[T]`` are the first ones of words as `written` joins them: bool ``[T]``.

        A piece without any part of a word, such as a mark alone, goes with the piece after it.
        """
        return ~(self.joins[pieces] & ~self.closes[before]) & self.words[before].bool()

    def written(self, pieces: Sequence[str]) -> str:
        """Return the word that pieces make."""
        return data_utils.post_process(" ".join(pieces), self.name)
