"""Encode prompts as they are typed into word ids.

A prompt gets a warning if most of its words are unknown, or any of its bytes or characters.
"""

import logging
import re
from typing import Callable, Iterator, List, Optional, Sequence, Tuple

import torch
from fairseq.data import Dictionary
from torch import Tensor

from ..core.text import TextEncoding
from ..core.text.coders import BYTE_SYMBOLS, SPACE, Bytes, Characters, Words
from ..core.text.tokenizer import MOSTLY
from .encoders import PromptCoding, split_lines

logger = logging.getLogger(__name__)

HARDLY = 0.1  # share of a dictionary's symbols

Encode = Callable[[str], str]
_BYTE_SYMBOLS = set(BYTE_SYMBOLS.values())


def encode_prompts(
    prompts: Sequence[str],
    encode: Encode,
    dictionary: Dictionary,
    coding: Optional[PromptCoding] = None,
    by_word: bool = True,
) -> List[Tensor]:
    """Return the word ids of prompts, each line of which ends in an end-of-sentence token.

    Args:
        prompts: texts.
        encode: text to tokens between spaces.
        dictionary: the words.
        coding: the coders behind *encode*, and how the data's text was encoded; None if that is not known.
        by_word: whether the word ``</s>`` ends a line within a prompt, or a line end does.
    """
    unit = "words" if coding is None else coding.unit
    limit = MOSTLY if unit == "words" else 0  # of all that is written, words alone may be in no data
    encoded = []
    for prompt in prompts:
        lines = [encode(line) for line in _lines(prompt, by_word, coding)]
        ids = [dictionary.encode_line(line, add_if_not_exist=False).long() for line in lines]
        words = " ".join(lines).split()
        unknown = [word for word in words if word not in dictionary]
        if len(unknown) > limit * len(words):
            logger.warning(
                "%d of the %d %s of the prompt %r are unknown to the dictionary, such as %s: %s",
                len(unknown),
                len(words),
                unit,
                prompt if len(prompt) <= 60 else prompt[:60] + "...",
                ", ".join(map(repr, list(dict.fromkeys(unknown))[:3])),
                _advice(prompt, encode, dictionary, coding, limit),
            )
        encoded.append(torch.cat(ids))
    return encoded


def _lines(prompt: str, by_word: bool, coding: Optional[PromptCoding]) -> List[str]:
    """Return the lines of a prompt, as the data's were found if their ends are not words of it."""
    if by_word:
        return split_lines(prompt)
    record = None if coding is None or not coding.follows_record else coding.record
    as_bytes = coding is not None and isinstance(coding.coder("bpe"), Bytes)
    return (record or TextEncoding(pieces="bytes" if as_bytes else "none")).lines(prompt)


def _advice(prompt: str, encode: Encode, dictionary: Dictionary, coding: Optional[PromptCoding], limit: float) -> str:
    """Return a remedy: the step that the dictionary's text went through but the prompt did not."""
    recorded = coding is not None and coding.record is not None
    if coding is not None and recorded and not coding.follows_record:
        return "its text was not encoded like this: leave out --tokenizer and --bpe"
    for what, changed in _ways(encode, dictionary, recorded):
        words = changed(prompt).split()
        if words and sum(word not in dictionary for word in words) <= limit * len(words):
            return what
    if not recorded and _share(dictionary, lambda symbol: symbol.startswith(SPACE) and symbol != SPACE) > HARDLY:
        return "it holds pieces of words: pass --bpe sentencepiece --sentencepiece-model FILE"
    if not recorded and _share(dictionary, lambda symbol: symbol.endswith("@@")) > HARDLY:
        return "it holds pieces of words: pass --bpe subword_nmt or fastbpe with --bpe-codes FILE"
    return "write the prompt like the data's text (dict.txt lists the words)"


def _ways(encode: Encode, dictionary: Dictionary, recorded: bool) -> Iterator[Tuple[str, Encode]]:
    """Yield remedies, each with the tokens that the prompt then has.

    A recorded encoding is not guessed: only the prompt's own text can be at fault.
    """
    apart = Words("").encode
    moses = any(re.match("&[a-z]+;", symbol) for symbol in dictionary.symbols)
    split = "pass --tokenizer moses" if moses else "separate words and punctuation marks by spaces"
    if not recorded:
        yield "its text was not encoded like this: leave out --tokenizer and --bpe", str
    yield "it has them in small letters: write the prompt in small letters", lambda text: encode(text.lower())
    yield f"it has words apart from punctuation marks: {split}", lambda text: encode(apart(text))
    yield (
        f"it has small letters, and words apart from punctuation marks: {split}",
        lambda text: encode(apart(text.lower())),
    )
    # Dictionaries of words have letters too.
    if not recorded and _share(dictionary, _BYTE_SYMBOLS.__contains__) >= 1 - HARDLY:
        yield "it holds bytes: pass --bpe bytes", Bytes().encode
    if not recorded and _share(dictionary, lambda symbol: len(symbol) == 1) >= 1 - HARDLY:
        yield "it holds letters: pass --bpe characters", Characters().encode


def _share(dictionary: Dictionary, is_one: Callable[[str], bool]) -> float:
    """Return the share of a dictionary's symbols, apart from fairseq's own, for which *is_one* holds."""
    symbols = [symbol for symbol in dictionary.symbols[dictionary.nspecial :] if not symbol.startswith("madeupword")]
    return sum(map(is_one, symbols)) / max(1, len(symbols))
