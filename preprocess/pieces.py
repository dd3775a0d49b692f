"""Train SentencePiece models."""

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .chunks import cut
from .files import Span, no_text, replacing
from .tokenization import EncodingError, LineTokenizer

_PART = 1 << 16
_LONGEST = 1 << 16  # bytes of a sentence
_SHORT = f".{{1,{_LONGEST // 4 - 1}}}"  # characters, of four bytes at most
_SHORT_ENOUGH = re.compile(rf"{_SHORT}(?:\s|$)|{_SHORT}")


@dataclass(frozen=True)
class PieceTraining:
    """The options of training a model.

    Args:
        vocab_size: pieces.
        character_coverage: share of the text's characters that get a piece of their own; the rarest get none.
        byte_fallback: whether a character without a piece is divided into bytes, each a piece, so that none is unknown.
        sample_bytes: of longer texts only this much is read, in pieces evenly spaced over the text.
    """

    vocab_size: int = 8000
    character_coverage: float = 1.0
    sample_bytes: int = 10_000_000
    byte_fallback: bool = False

    def run(self, text: Span, tokenizer: LineTokenizer, model: Path) -> None:
        """Train on the tokenizer's words before they are split, and write the model.

        The same text and options give the same model.

        Raises:
            ValueError: the text is blank, not UTF-8, or cannot give as many pieces.
        """
        from sentencepiece import SentencePieceTrainer

        # A list: SentencePiece would report an error in the middle as its own.
        sample = list(self._sample(text, replace(tokenizer, bpe="none")))
        if not sample:
            raise no_text("train", text)
        written = io.BytesIO()
        # Only if it is asked for: a model's file names the options that it was given.
        options: dict[str, Any] = {"byte_fallback": True} if self.byte_fallback else {}
        try:
            SentencePieceTrainer.train(
                sentence_iterator=iter(sample),
                model_writer=written,
                vocab_size=self.vocab_size,
                character_coverage=self.character_coverage,
                max_sentence_length=_LONGEST,
                minloglevel=2,
                **options,
            )
        except RuntimeError as error:
            raise ValueError(f"--vocab-size {self.vocab_size} {self._remedy(str(error))}") from error
        with replacing(model) as file:
            file.write(written.getvalue())

    def _remedy(self, error: str) -> str:
        """Return the reason of an error of SentencePiece, with the remedy, as the end of a sentence."""
        if match := re.search(r"set it to a value <= (\d+)", error):
            return f"is too large for this text: pass {match[1]} or less"
        if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
            return f"is too small for the characters of this text: pass {match[1]} or more, or --character-coverage .98"
        return f"does not suit SentencePiece: {error}"

    def _sample(self, text: Span, tokenizer: LineTokenizer) -> Iterator[str]:
        every = max(1, -(-text.size // self.sample_bytes))
        words, _ = tokenizer.encoders
        spans = cut(text, tokenizer.boundary, _PART)[::every]
        for span in tqdm(spans, desc=f"training {self.vocab_size} pieces on", unit="part", mininterval=1):
            try:
                lines = tokenizer.lines(span.read())
            except EncodingError as error:
                raise error.within(span) from error
            for line in lines:
                if line.strip():
                    yield from _sentences(words(line))


def _sentences(line: str) -> Iterable[str]:
    """Yield pieces of a line that SentencePiece does not skip for their length, cut at spaces if there are any."""
    if len(line.encode()) <= _LONGEST:
        return [line]
    return (match[0] for match in _SHORT_ENOUGH.finditer(line))
