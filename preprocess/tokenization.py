"""Turn text into tokens: bytes, the letters of text8, and words or pieces of lines.

A text is cut into chunks, and every chunk is encoded on its own, in any process. So the tokens of a chunk must not
depend on other chunks. A tokenizer therefore says where a text may be cut.
"""

import io
from abc import ABC, abstractmethod
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamemo_fairseq.core.text.coders import DIGITS, SPACE
from lamemo_fairseq.core.text.encoding import MARK, joined_paragraphs

from .files import Span
from .words import PIECES, WORDS, Encoder

END = "</s>"  # fairseq's end-of-sentence token
LONGEST = 1 << 16  # tokens of a line of bytes; longer ones are stored in several pieces
_END_OF_LINE = rb"(?:\r\n|\r(?!\n)|\n)"  # any that Python knows
LONG_LINE = 1 << 22  # bytes; a longer line is cut between words, so that memory does not grow with it
_SPACE = rb" (?=[^\xef])"  # not before a byte order mark, which is left out where a line begins
ROW = 1 << 10  # tokens of each line that a text of letters is stored in


class Encoded(NamedTuple):
    """The tokens of a text, numbered in a vocabulary of its own."""

    symbols: list[str]
    ids: NDArray[Any]  # [tokens], unsigned
    sizes: NDArray[np.int32]  # [lines], the tokens of each line, its end included


class Boundary(NamedTuple):
    """The positions where a text may be cut: behind a match of *pattern*.

    If no match begins within *reach* bytes, the text may be cut behind a match of *beyond*, or anywhere.
    """

    pattern: bytes
    reach: int | None = None
    where: str = "ends of lines"  # the pattern in words
    beyond: bytes | None = None


class Tokenizer(ABC):
    boundary: ClassVar[Boundary]

    @abstractmethod
    def encode(self, text: bytes, more: bool = False) -> Encoded:
        """Return the tokens of a chunk.

        Args:
            more: whether text follows the chunk, of the same line if the chunk does not end with a line end.

        Raises:
            EncodingError: the chunk has bytes that this tokenizer cannot read.
        """

    def files(self) -> dict[str, Path]:
        """Return the files that belong beside the binarized data, by name."""
        return {}


class EncodingError(ValueError):
    """A text holds bytes that cannot be read, at an offset from its beginning."""

    def __init__(self, what: str, offset: int):
        super().__init__(what, offset)
        self.what = what
        self.offset = offset

    def within(self, text: Span) -> ValueError:
        """Return the same error, with the position in the text's file."""
        return ValueError(
            f"{text.path}: at byte {text.start + self.offset:,} stand {self.what}: save the text as UTF-8 "
            "(iconv -f latin1 -t utf-8, or -f utf-16), or take --bpe bytes, which reads any bytes"
        )


def refuse_nul(text: bytes) -> None:
    """Refuse UTF-16 and binary files, most of which would otherwise pass for text.

    Raises:
        EncodingError: there is a NUL byte.
    """
    if (nul := text.find(b"\0")) >= 0:
        raise EncodingError("NUL bytes, as UTF-16 and binary files have them", nul)


def decoded(text: bytes) -> str:
    """Return the text, decoded from UTF-8.

    Raises:
        EncodingError: the text is not UTF-8, or holds NUL bytes, as UTF-16 and binary files do.
    """
    refuse_nul(text)
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        undecodable = text[error.start : error.end]
        raise EncodingError(f"the bytes {undecodable!r}, which are not UTF-8", error.start) from error


@dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """A token a byte, as one of fairseq's byte symbols; a line feed is the end of a line.

    Where a text ends inside a line, that line gets no end token: there are exactly as many tokens as bytes.
    """

    name: str = "bytes"
    boundary: ClassVar[Boundary] = Boundary(rb"\n", 1 << 20)

    def encode(self, text: bytes, more: bool = False) -> Encoded:
        from .byte_lines import SYMBOLS

        symbols = [END if byte == ord("\n") else SYMBOLS[byte] for byte in range(256)]
        ids = np.frombuffer(text, dtype=np.uint8)
        ends = np.flatnonzero(ids == ord("\n")) + 1
        if len(ends) == 0 or ends[-1] != len(ids):
            ends = np.append(ends, len(ids))
        sizes = np.diff(ends, prepend=0)
        if len(sizes) and sizes.max() > LONGEST:
            sizes = np.concatenate([_rows(size, LONGEST) for size in sizes])
        return Encoded(symbols, ids, sizes.astype(np.int32))


@dataclass(frozen=True)
class LetterTokenizer(Tokenizer):
    """A token a character, of text that has only a to z and spaces, like text8, and so no lines."""

    name: str = "letters"
    boundary: ClassVar[Boundary] = Boundary(rb"", 0)

    def encode(self, text: bytes, more: bool = False) -> Encoded:
        ids = _LETTER_IDS[np.frombuffer(text, dtype=np.uint8)]
        if (wrong := np.flatnonzero(ids == len(_LETTERS))).size:
            offset = int(wrong[0])
            raise EncodingError(f"{text[offset : offset + 1]!r}, which is neither a letter a to z nor a space", offset)
        return Encoded([SPACE, *_LETTERS[1:]], ids, _rows(len(ids), ROW))


@dataclass(frozen=True)
class NormalizedLetterTokenizer(LetterTokenizer):
    """A token a character of any text, made like text8.

    Letters become small, digits are spelt out, and everything else is a space, never more than one in a row (Mahoney's
    wikifil.pl, http://mattmahoney.net/dc/textdata.html).
    """

    name: str = "text8"
    boundary: ClassVar[Boundary] = Boundary(rb"\s", where="spaces")

    def encode(self, text: bytes, more: bool = False) -> Encoded:
        refuse_nul(text)
        for digit, name in _DIGITS.items():
            text = text.replace(digit, name)
        text = text.translate(_SMALL)
        words = text.split()
        # The former chunk ends in the one space between the two.
        return super().encode(b" ".join([*words, b""] if words and text.endswith(b" ") else words))


@dataclass(frozen=True)
class LineTokenizer(Tokenizer):
    """Words or pieces of words of lines in UTF-8, and an end token a line, as fairseq-preprocess counts them.

    Args:
        tokenizer, bpe: names in `words.WORDS` and `words.PIECES`; the latter splits the tokens of the former.
        paragraphs: join lines up to an empty one; empty lines then give no tokens.
        pattern: regular expression of a word, for the tokenizer ``words``.
        source_lang: language, for the tokenizer ``moses``.
        model: file of the SentencePiece model.
    """

    tokenizer: str = "space"
    bpe: str = "none"
    paragraphs: bool = False
    pattern: str = ""
    source_lang: str = ""
    model: Path | None = field(default=None)
    name: str = "lines"
    _lines: ClassVar[Boundary] = Boundary(_END_OF_LINE)
    _blank: ClassVar[Boundary] = Boundary(_END_OF_LINE + rb"[ \t\f\v]*" + _END_OF_LINE, where="empty lines")

    @property
    def boundary(self) -> Boundary:  # type: ignore[override]
        if self.paragraphs:
            return self._blank
        # Words at the sides of a space do not depend on each other; other encoders may look further.
        apart = self.bpe == "none" and (self.tokenizer == "space" or (self.tokenizer == "words" and not self.pattern))
        return self._lines._replace(reach=LONG_LINE, beyond=_SPACE) if apart else self._lines

    @cached_property
    def encoders(self) -> list[Encoder]:
        return [WORDS[self.tokenizer](self), PIECES[self.bpe](self)]

    def lines(self, text: bytes) -> Iterator[str]:
        """Return lines or paragraphs, ended by any of the line ends that Python knows, as in fairseq-preprocess.

        A byte order mark before a line, where texts that begin with one are joined, is left out.
        """
        lines = io.StringIO(decoded(text), newline=None)
        stripped = (line.rstrip("\n").lstrip(MARK) for line in lines)
        return joined_paragraphs(stripped) if self.paragraphs else stripped

    def encode(self, text: bytes, more: bool = False) -> Encoded:
        numbers: defaultdict[str, int] = defaultdict(count().__next__)
        ids, sizes = array("I"), array("i")
        words, pieces = self.encoders
        for line in self.lines(text):
            tokens = pieces(words(line)).split()
            tokens.append(END)
            ids.extend(map(numbers.__getitem__, tokens))
            sizes.append(len(tokens))
        if more and sizes and not text.endswith((b"\n", b"\r")):  # the line goes on
            ids.pop()
            sizes[-1] -= 1
        narrow = np.min_scalar_type(max(len(numbers) - 1, 0))
        return Encoded(
            list(numbers), np.frombuffer(ids, dtype=np.uint32).astype(narrow), np.frombuffer(sizes, dtype=np.int32)
        )

    def files(self) -> dict[str, Path]:
        return {} if self.model is None else {"sentencepiece.bpe.model": self.model}


def _rows(size: int, row: int) -> NDArray[np.int32]:
    """Divide *size* tokens into lines of *row* tokens, the last one shorter."""
    whole, rest = divmod(int(size), row)
    return np.array([row] * whole + [rest] * (rest > 0), dtype=np.int32)


_LETTERS = " abcdefghijklmnopqrstuvwxyz"
_LETTER_IDS = np.full(256, len(_LETTERS), dtype=np.uint8)
_LETTER_IDS[np.frombuffer(_LETTERS.encode(), dtype=np.uint8)] = np.arange(len(_LETTERS))
_SMALL = bytes(ord(chr(b).lower()) if chr(b).isascii() and chr(b).isalpha() else ord(" ") for b in range(256))
_DIGITS = {b"%d" % value: b" %s " % name.encode() for value, name in enumerate(DIGITS)}
