"""Encode prompts as they are typed into word ids. A prompt with hardly any known word gets a warning."""

import logging
import re
from typing import Any, Callable, Iterator, List, Sequence, Tuple

import torch
from fairseq.data import Dictionary
from torch import Tensor

from ..core.text.coders import Bytes, Characters, Words
from .encoders import split_lines

logger = logging.getLogger(__name__)

MOSTLY = 0.5  # share of words


def encode_prompts(
    prompts: Sequence[str], encode: Callable[[str], str], dictionary: Dictionary, line_end: str = ""
) -> List[Tensor]:
    """Return the word ids of prompts, each line of which ends in an end-of-sentence token.

    Args:
        prompts: texts.
        encode: text to tokens between spaces.
        dictionary: the words.
        line_end: the end of a line within a prompt, ``</s>`` by default.
    """
    encoded = []
    for prompt in prompts:
        lines = [encode(line) for line in (prompt.split(line_end) if line_end else split_lines(prompt))]
        ids = [dictionary.encode_line(line, add_if_not_exist=False).long() for line in lines]
        _tell_unknown(prompt, " ".join(lines).split(), dictionary)
        encoded.append(torch.cat(ids))
    return encoded


def _tell_unknown(prompt: str, words: List[str], dictionary: Dictionary) -> None:
    unknown = [word for word in words if word not in dictionary]
    if len(unknown) > MOSTLY * len(words):
        logger.warning(
            "%d of the %d words of the prompt %r are unknown to the dictionary, such as %s: %s",
            len(unknown),
            len(words),
            prompt if len(prompt) <= 60 else prompt[:60] + "...",
            ", ".join(map(repr, unknown[:3])),
            _advice(prompt, dictionary),
        )


def _advice(prompt: str, dictionary: Dictionary) -> str:
    """Return a remedy: the step that the dictionary's text went through but the prompt did not."""
    for what, encode in _ways(dictionary):
        words = encode(prompt).split()
        if words and sum(word not in dictionary for word in words) <= MOSTLY * len(words):
            return what
    if any(symbol.startswith("\u2581") for symbol in dictionary.symbols):
        return "it holds pieces of words: pass --bpe sentencepiece --sentencepiece-model FILE"
    if any(symbol.endswith("@@") for symbol in dictionary.symbols):
        return "it holds pieces of words: pass --bpe subword_nmt or fastbpe with --bpe-codes FILE"
    return "write the prompt like the data's text (dict.txt lists the words)"


def _ways(dictionary: Dictionary) -> Iterator[Tuple[str, Callable[[str], Any]]]:
    apart = Words("").encode
    moses = any(re.match("&[a-z]+;", symbol) for symbol in dictionary.symbols)
    split = "pass --tokenizer moses" if moses else "separate words and punctuation marks by spaces"
    yield "its text was not encoded like this: leave out --tokenizer and --bpe", str
    yield "it has them in small letters: write the prompt in small letters", str.lower
    yield f"it has words apart from punctuation marks: {split}", apart
    yield f"it has small letters, and words apart from punctuation marks: {split}", lambda text: apart(text.lower())
    yield "it holds bytes: pass --bpe bytes", Bytes().encode
    yield "it holds letters: pass --bpe characters", Characters().encode
