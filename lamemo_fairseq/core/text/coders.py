"""Text to tokens between spaces and back. Packages that only some coders need are imported when one is built."""

import re
from functools import cached_property, partial
from typing import Callable, Dict, Optional, Protocol, Sequence

from .encoding import CODES, MODEL, TextEncoding

# Words with an apostrophe inside, numbers, and any other mark by itself.
WORD = r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?|\d+|[^\w\s]"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a space in tokens
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
# As fairseq's coder for bytes writes them.
BYTE_SYMBOLS: Dict[int, str] = {b: chr(b) if b in _PRINTABLE else chr(256 + b) for b in range(256)} | {ord(" "): SPACE}
_BYTES = {symbol: byte for byte, symbol in BYTE_SYMBOLS.items()}
_INVALID = 0xFF  # occurs in no UTF-8
_BYTE_PIECES = re.compile(r"(?<!\S)<0x[0-9A-F]{2}>(?: <0x[0-9A-F]{2}>)*(?!\S)")  # runs of SentencePiece's byte pieces


class Coder(Protocol):
    """Text to tokens and back."""

    def encode(self, text: str) -> str:
        """Return tokens between spaces."""

    def decode(self, tokens: str) -> str:
        """Return the text of tokens between spaces."""


class Bytes:
    """A token a byte. Unlike fairseq's coder of this name, this one keeps tabs and runs of spaces."""

    def encode(self, text: str) -> str:
        return " ".join(BYTE_SYMBOLS[byte] for byte in text.encode("utf-8"))

    def decode(self, tokens: str) -> str:
        """Return the text, with U+FFFD for words that are not bytes, and for bytes that are not UTF-8."""
        return bytes(_BYTES.get(symbol, _INVALID) for symbol in tokens.split()).decode("utf-8", "replace")


class Characters:
    """A token a character."""

    def encode(self, text: str) -> str:
        return " ".join(text.replace(" ", SPACE))

    def decode(self, tokens: str) -> str:
        return tokens.replace(" ", "").replace(SPACE, " ")


class Letters(Characters):
    """A token a letter. Text is first reduced to small letters and single spaces, with digits spelt out.

    What follows the last letter is a space, as in the data: texts that are read in pieces would run together.
    """

    def encode(self, text: str) -> str:
        spelt = re.sub("[0-9]", lambda digit: f" {DIGITS[int(digit[0])]} ", text)
        small = re.sub("[A-Z]", lambda c: c[0].lower(), spelt)
        words = re.findall("[a-z]+", small)
        return super().encode(" ".join(words) + " " * (words != [] and not small.endswith(words[-1])))


class Words:
    """Words that match a regular expression. Other characters are dropped."""

    def __init__(self, pattern: str):
        self._find = re.compile(pattern or WORD).finditer

    def encode(self, text: str) -> str:
        return " ".join(match[0] for match in self._find(text))

    def decode(self, tokens: str) -> str:
        return tokens


class Moses:
    """Words of sacremoses' Moses tokenizer, with fairseq's settings."""

    def __init__(self, language: str):
        try:
            from sacremoses import MosesDetokenizer, MosesTokenizer
        except ModuleNotFoundError:
            raise _missing("the Moses tokenizer", "sacremoses") from None
        self._tokenizer, self._detokenizer = MosesTokenizer(language), MosesDetokenizer(language)

    def encode(self, text: str) -> str:
        return str(self._tokenizer.tokenize(text, aggressive_dash_splits=True, return_str=True, escape=True))

    def decode(self, tokens: str) -> str:
        return str(self._detokenizer.detokenize(tokens.split()))


class SentencePieces:
    """Pieces of a SentencePiece model. Decoding needs neither the model nor the package."""

    def __init__(self, model: Optional[str]):
        self._model = model

    @cached_property
    def _encode(self) -> Callable[[str], Sequence[str]]:
        model = _needed(self._model, "a SentencePiece model", MODEL)
        try:
            from sentencepiece import SentencePieceProcessor
        except ModuleNotFoundError:
            raise _missing("pieces of words", "sentencepiece") from None
        processor = SentencePieceProcessor()
        processor.Load(model)
        return partial(processor.Encode, out_type=str)

    def encode(self, text: str) -> str:
        return " ".join(self._encode(text))

    def decode(self, tokens: str) -> str:
        """Return the text, with U+FFFD for pieces of bytes that are not UTF-8."""
        tokens = _BYTE_PIECES.sub(_of_bytes, tokens)
        return tokens.replace(" ", "").replace("\u2581", " ").strip()


def _of_bytes(pieces: "re.Match[str]") -> str:
    return bytes(int(piece[3:5], 16) for piece in pieces[0].split()).decode("utf-8", "replace")


class SubwordNMT:
    """Pieces of words, the last of a word without ``@@``. Decoding needs neither the codes nor the package."""

    def __init__(self, codes: Optional[str]):
        self._codes = codes

    @cached_property
    def _encode(self) -> Callable[[str], str]:
        codes = _needed(self._codes, "the codes of subword-nmt", CODES)
        try:
            from subword_nmt.apply_bpe import BPE
        except ModuleNotFoundError:
            raise _missing("pieces of words", "subword-nmt") from None
        with open(codes, encoding="utf-8") as file:
            process: Callable[[str], str] = BPE(file).process_line
        return process

    def encode(self, text: str) -> str:
        return self._encode(text)

    def decode(self, tokens: str) -> str:
        return (tokens + " ").replace("@@ ", "").rstrip()


def word_coder(encoding: TextEncoding) -> Optional[Coder]:
    """Build the coder for words, None for words that are separated by spaces.

    Raises:
        ModuleNotFoundError: the coder's package is not installed.
    """
    if encoding.tokenizer == "moses":
        return Moses(encoding.source_lang or "en")
    return Words(encoding.pattern) if encoding.tokenizer == "words" else None


def piece_coder(encoding: TextEncoding) -> Optional[Coder]:
    """Build the coder for pieces of words, None for whole words."""
    coders: Dict[str, Callable[[], Coder]] = {
        "sentencepiece": lambda: SentencePieces(encoding.model),
        "subword_nmt": lambda: SubwordNMT(encoding.model),
        "bytes": Bytes,
        "characters": Letters if encoding.normalized else Characters,
    }
    return coders[encoding.pieces]() if encoding.pieces in coders else None


def _needed(model: Optional[str], what: str, name: str) -> str:
    if model is None:
        raise ValueError(f"a text is encoded with {what}: put it into the model's folder as {name}, and load it again")
    return model


def _missing(what: str, package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"{what} of this model's text needs {package}: pip install {package}", name=package)
