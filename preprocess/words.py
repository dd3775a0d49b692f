"""Encode lines to words, and words to pieces of words: functions from text to tokens between spaces, by name."""

import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

from lamemo_fairseq.core.text.coders import WORD

Encoder = Callable[[str], str]


class Options(Protocol):
    """The options that an encoder may depend on."""

    @property
    def pattern(self) -> str:
        """Regular expression of a word."""

    @property
    def source_lang(self) -> str:
        """Language of the text."""

    @property
    def model(self) -> Path | None:
        """File of a SentencePiece model."""


MakeEncoder = Callable[[Options], Encoder]


def _as_it_is(line: str) -> str:
    return line


def _words(options: Options) -> Encoder:
    find = re.compile(options.pattern or WORD).finditer
    return lambda line: " ".join([match[0] for match in find(line)])


def _moses(options: Options) -> Encoder:
    """Tokenize as fairseq's ``--tokenizer moses`` does: hyphens between words are split, special characters escaped."""
    from sacremoses import MosesTokenizer

    class QuickMosesTokenizer(MosesTokenizer):
        """sacremoses' tokenizer with its tables of letters made once, not anew for every full stop."""

        def __init__(self, lang: str):
            super().__init__(lang)
            self._lower, self._alpha = frozenset(self.IsLower), frozenset(self.IsAlpha)

        def islower(self, text: str) -> bool:
            return self._lower.issuperset(text)

        def isanyalpha(self, text: str) -> bool:
            return not self._alpha.isdisjoint(text)

    tokenize = QuickMosesTokenizer(options.source_lang or "en").tokenize
    return lambda line: tokenize(line, aggressive_dash_splits=True, return_str=True)


def moses_languages() -> list[str]:
    """Return the codes of sacremoses' languages with abbreviations; for any other code it takes the English ones."""
    from sacremoses.corpus import NonbreakingPrefixes

    return sorted(set(NonbreakingPrefixes().available_langs.values()))


def _sentencepiece(options: Options) -> Encoder:
    """Encode as fairseq's ``--bpe sentencepiece`` does."""
    from sentencepiece import SentencePieceProcessor

    try:
        encode = SentencePieceProcessor(model_file=str(options.model)).encode
    except (RuntimeError, OSError) as error:
        raise ValueError(f"--sentencepiece-model {options.model} is not a SentencePiece model: {error}") from error
    return lambda line: " ".join(encode(line, out_type=str))


# Packages that a choice needs. ve-fairseq does not bring them.
_PACKAGES = {"moses": "sacremoses", "sentencepiece": "sentencepiece"}


def versions(tokenizer: str, bpe: str) -> dict[str, str]:
    """Return the versions of the packages that encode lines with these choices.

    Raises:
        ValueError: a package is not installed.
    """
    known = {}
    for option, choice in (("--tokenizer", tokenizer), ("--bpe", bpe)):
        if (package := _PACKAGES.get(choice)) is not None:
            try:
                known[package] = version(package)
            except PackageNotFoundError:
                raise ValueError(f"{option} {choice} needs a package: pip install {package}") from None
    return known


WORDS: dict[str, MakeEncoder] = {"space": lambda options: _as_it_is, "words": _words, "moses": _moses}
PIECES: dict[str, MakeEncoder] = {"none": lambda options: _as_it_is, "sentencepiece": _sentencepiece}
