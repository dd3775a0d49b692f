"""A model's tokenizer: text to word ids and back, and its files in a model's folder.

Shapes: T words of a text.
"""

import hashlib
import io
import json
import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .coders import Coder, piece_coder, word_coder
from .encoding import TextEncoding

logger = logging.getLogger(__name__)

DICTIONARY, ENCODING = "dict.txt", "text.json"
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # fairseq's own, which come before the words of dict.txt
END, UNKNOWN = 2, 3
FORMAT = 1  # of text.json
MOSTLY = 0.5  # share of unknown words above which a text gets a warning; bytes and characters may all be known


class Tokenizer:
    """Text to word ids and back. The end of a line is the word ``</s>``, and every text begins after one.

    Args:
        words: those of the text, each once. One that is spelt like a special symbol, as ``<unk>`` in WikiText, is that
            symbol, and gets no other id.
        encoding: how the text of the model's data became tokens.
        counts: of the words, which ``dict.txt`` has beside them; 1 each if left out.

    Raises:
        ValueError: a word occurs twice, or no text has it.
    """

    def __init__(
        self, words: Sequence[str], encoding: Optional[TextEncoding] = None, counts: Optional[Sequence[int]] = None
    ):
        self.encoding = TextEncoding() if encoding is None else encoding
        for word in words:
            if word.split() != [word]:
                raise ValueError(
                    f"no text has the word {word!r}, as spaces and ends of lines stand between words: leave it out"
                )
        numbers = [1] * len(words) if counts is None else counts
        own = [(word, count) for word, count in zip(words, numbers, strict=True) if word not in SPECIAL]
        self._number([word for word, _ in own], [count for _, count in own], "pass each word once")

    @classmethod
    def of_dictionary(
        cls, words: Sequence[str], counts: Sequence[int], encoding: Optional[TextEncoding] = None
    ) -> "Tokenizer":
        """Return the tokenizer of a ``dict.txt``, whose every word has an id, also one that no text has.

        A word that is spelt like a special symbol replaces it, as fairseq's ``#fairseq:overwrite`` says.

        Raises:
            ValueError: a word occurs twice.
        """
        tokenizer = cls((), encoding)
        tokenizer._number(words, counts, f"put back the {DICTIONARY} of the model's data")
        return tokenizer

    def _number(self, words: Sequence[str], counts: Sequence[int], remedy: str) -> None:
        self.symbols: List[str] = [*SPECIAL, *words]
        self._counts = list(counts)
        self._ids: Dict[str, int] = {}
        for number, symbol in enumerate(self.symbols):
            if number >= len(SPECIAL) and self._ids.get(symbol, 0) >= len(SPECIAL):
                raise ValueError(f"the dictionary holds {symbol!r} twice: {remedy}")
            self._ids[symbol] = number

    def __len__(self) -> int:
        """Return the number of words, V."""
        return len(self.symbols)

    def check_size(self, words: int) -> None:
        """Refuse a model with another number of *words*.

        Raises:
            ValueError: with both numbers and the remedy.
        """
        if len(self) != words:
            raise ValueError(
                f"the tokenizer has {len(self):,} words, {len(SPECIAL)} special ones among them, and the model "
                f"{words:,}: set model.tokenizer to that of the model's data"
            )

    def encode(self, text: str) -> Tensor:
        """Return the word ids ``[T]`` of a text, int64: ``</s>`` for every end of a line, none at the text's end.

        In a text that is reduced to letters and spaces, as text8, the end of a line is a space. Where the data's lines
        are paragraphs, empty lines end them, and so does an end of a line at the text's end.
        """
        lines = [self._tokens(line) for line in self.encoding.lines(text)]
        self._tell_unknown(text, [token for line in lines for token in line])
        ids = [self.number(token) for line in lines for token in (*line, SPECIAL[END])]
        return torch.tensor(ids[:-1], dtype=torch.int64)

    def number(self, token: str) -> int:
        """Return the id of a token, that of ``<unk>`` if it is unknown."""
        return self._ids.get(token, UNKNOWN)

    def decode(self, ids: Union[Tensor, Iterable[int]]) -> str:
        """Return the text of word ids ``[T]``.

        Raises:
            ValueError: the dictionary lacks an id.
        """
        lines: List[List[str]] = [[]]
        for number in ids.tolist() if isinstance(ids, Tensor) else ids:
            if not 0 <= number < len(self):
                raise ValueError(f"there is no word {number}: the dictionary has the ids 0 to {len(self) - 1}")
            if number == END:
                lines.append([])
            else:
                lines[-1].append(self.symbols[number])
        return self.encoding.line_end.join(self._text(" ".join(line)) for line in lines)

    def save(self, folder: Union[str, Path]) -> None:
        """Write ``dict.txt``, ``text.json`` and, if there is one, the file that the pieces need.

        Raises:
            ValueError: a word has an end of a line in it.
            OSError: the folder cannot be written, or the file of the pieces is no longer there.
        """
        folder, encoding = Path(folder), self.encoding
        words = self.symbols[len(SPECIAL) :]
        if odd := [word for word in words if "\n" in word or "\r" in word]:
            raise ValueError(f"{DICTIONARY} has a word a line, and the vocabulary holds {odd[0]!r}: rename it")
        if encoding.model is not None and (name := encoding.file_name) is not None:
            content = Path(encoding.model).read_bytes()
            encoding = replace(encoding, model_sha256=hashlib.sha256(content).hexdigest())
            (folder / name).write_bytes(content)
        lines = "".join(
            f"{word} {count}{' #fairseq:overwrite' * (word in SPECIAL)}\n"
            for word, count in zip(words, self._counts, strict=True)
        )
        (folder / DICTIONARY).write_text(lines, encoding="utf-8", newline="\n")
        text = json.dumps({"format": FORMAT, **encoding.to_dict()}, indent=2) + "\n"
        (folder / ENCODING).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Union[str, Path]) -> "Tokenizer":
        """Return the tokenizer of a folder. Without ``text.json``, words are those between spaces.

        Raises:
            FileNotFoundError: there is no ``dict.txt``.
            ValueError: a file is damaged, or not the one that the text was encoded with.
        """
        folder = Path(folder)
        words, counts = _read_dictionary(folder / DICTIONARY)
        encoding = _read_encoding(folder)
        try:
            return cls.of_dictionary(words, counts, encoding)
        except ValueError as error:
            raise ValueError(f"{folder / DICTIONARY}: {error}") from None

    @cached_property
    def _coders(self) -> List[Coder]:
        return [coder for coder in (word_coder(self.encoding), piece_coder(self.encoding)) if coder is not None]

    def _tokens(self, line: str) -> List[str]:
        for coder in self._coders:
            line = coder.encode(line)
        return line.split()

    def _text(self, tokens: str) -> str:
        for coder in reversed(self._coders):
            tokens = coder.decode(tokens)
        return tokens

    def _tell_unknown(self, text: str, tokens: Sequence[str]) -> None:
        unknown, unit = [token for token in tokens if token not in self._ids], self.encoding.unit
        if len(unknown) > (MOSTLY * len(tokens) if unit == "words" else 0):
            shown = ", ".join(map(repr, list(dict.fromkeys(unknown))[:3]))
            logger.warning(
                "%d of the %d %s of the text %r are unknown to the dictionary, such as %s: write it like "
                "the data's text (dict.txt lists the %s)",
                *(len(unknown), len(tokens), unit, text if len(text) <= 60 else text[:60] + "...", shown, unit),
            )


def _read_dictionary(path: Path) -> Tuple[List[str], List[int]]:
    """Return the words of a ``dict.txt``, and their counts.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is not a dictionary.
    """
    try:
        lines = io.StringIO(path.read_bytes().decode("utf-8"), newline=None).readlines()
        entries = [line.rstrip().removesuffix(" #fairseq:overwrite").rsplit(" ", 1) for line in lines]
        return [word for word, _ in entries], [int(count) for _, count in entries]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no dictionary at {path}: copy dict.txt of the model's data there") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a dictionary with a word and its count a line: {error}") from error


def _read_encoding(folder: Path) -> TextEncoding:
    path = folder / ENCODING
    if not path.is_file():
        return TextEncoding()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        written = values.pop("format")
        encoding = TextEncoding.from_dict(values)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; copy it again, or convert the checkpoint again") from error
    if written != FORMAT:
        raise ValueError(f"{path} has format {written}, this version reads {FORMAT}: install a newer one")
    model = None if encoding.file_name is None else folder / encoding.file_name
    if model is None or not model.is_file():  # decoding works without it
        return encoding
    if encoding.model_sha256 and hashlib.sha256(model.read_bytes()).hexdigest() != encoding.model_sha256:
        raise ValueError(f"{model} is not the file that the text was encoded with: put that back")
    return replace(encoding, model=str(model))
