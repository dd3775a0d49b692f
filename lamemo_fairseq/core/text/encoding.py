"""The way in which a text became tokens."""

import re
from dataclasses import asdict, dataclass, fields
from typing import Dict, Iterable, Iterator, List, Optional

from ..fields import Values
from ..names import did_you_mean

TOKENIZERS = ("space", "words", "moses", "none")
MODEL, CODES = "sentencepiece.bpe.model", "bpe.codes"  # names in a folder, whatever the files were called before
MARK = "\ufeff"  # the byte order mark that some editors write before a text
_LINE_END = re.compile("\r\n|\r|\n")
PIECES = ("none", "sentencepiece", "subword_nmt", "bytes", "characters")


@dataclass(frozen=True)
class TextEncoding:
    """The way in which a text became tokens.

    Args:
        tokenizer: ``space``, ``words`` or ``moses``; ``none`` for bytes and letters, which are no words.
        pieces: ``none``, ``sentencepiece``, ``subword_nmt``, ``bytes`` or ``characters``.
        pattern: regular expression of a word for the tokenizer ``words``, empty for its own.
        source_lang: language for the tokenizer ``moses``, else empty.
        model: path of the file that the pieces need: a SentencePiece model, or the codes of subword-nmt.
        model_sha256: its checksum, as recorded.
        normalized: whether the text was first reduced to small letters and spaces, like text8.
        paragraphs: whether the lines of a paragraph, up to an empty line, were joined.
    """

    tokenizer: str = "space"
    pieces: str = "none"
    pattern: str = ""
    source_lang: str = ""
    model: Optional[str] = None
    model_sha256: str = ""
    normalized: bool = False
    paragraphs: bool = False

    @property
    def file_name(self) -> Optional[str]:
        """The name in a folder of the file that the pieces need, None if they need none."""
        return {"sentencepiece": MODEL, "subword_nmt": CODES}.get(self.pieces)

    @property
    def unit(self) -> str:
        """What a token is, in the plural: bytes, characters, or else words or pieces of them, here ``words``."""
        return self.pieces if self.pieces in ("bytes", "characters") else "words"

    def lines(self, text: str) -> List[str]:
        """Return the lines of a text, as the data's were found: with any line ends, and without byte order marks.

        To bytes, both are text, and only a line feed ends a line. A text that is reduced to letters is one line. With
        `paragraphs`, a paragraph is a line, and the last one ends if the text ends with the end of a line.
        """
        if self.normalized:
            return [text]
        if self.pieces == "bytes":
            return text.split("\n")
        lines = [line.lstrip(MARK) for line in _LINE_END.split(text)]
        if not self.paragraphs:
            return lines
        return [*joined_paragraphs(lines), *([] if lines[-1].strip() else [""])]  # no words yet of the next one

    @property
    def line_end(self) -> str:
        """What stands between two lines."""
        return "\n\n" if self.paragraphs else "\n"

    def to_dict(self) -> Dict[str, object]:
        """Return plain values by name; the path of the model is left out, as a folder has its own.

        Without `paragraphs` its name is left out too, so that versions from before that option can read the values.
        """
        left_out = {"model"} if self.paragraphs else {"model", "paragraphs"}
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    @classmethod
    def from_dict(cls, values: Values, model: Optional[str] = None) -> "TextEncoding":
        """Return the encoding that `to_dict` has written.

        Args:
            values: by name.
            model: path of the file that the pieces need.

        Raises:
            ValueError: a name, a tokenizer or a kind of pieces is not known.
        """
        known = [f.name for f in fields(cls) if f.name != "model"]
        for name in values:
            if name not in known:
                hint = did_you_mean(str(name), known)
                raise ValueError(f"unknown name '{name}' in a text's encoding" + (f"; {hint}" if hint else ""))
        encoding = cls(**values, model=model)
        for what, name, names in (("tokenizer", encoding.tokenizer, TOKENIZERS), ("pieces", encoding.pieces, PIECES)):
            if name not in names:
                raise ValueError(f"unknown {what} '{name}' in a text's encoding: the known ones are {', '.join(names)}")
        return encoding


def joined_paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Join lines up to an empty one; empty lines are left out."""
    paragraph: List[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield " ".join(paragraph)
            paragraph = []
    if paragraph:
        yield " ".join(paragraph)
