"""Give hints that an option was probably forgotten when a text was prepared."""

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from .tokenization import END, SPACE

# Scripts without spaces between words, and a length that no mean length of words exceeds. Divided into words, Chinese
# and Japanese have about two characters a word, Thai and its neighbours five.
_WITHOUT_SPACES = (
    (re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]"), 4),
    (re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff]"), 12),
    (re.compile(""), 25),
)
_SAMPLE = 100_000  # number of different words that are examined
_MOSTLY = 0.25  # of the words of a split
_MARKED = 0.02  # of the symbols of a text


def without_spaces(counts: Mapping[str, int]) -> str | None:
    """Return a hint if words are so long that they must be whole sentences.

    Args:
        counts: how often each word occurs.
    """
    words = [(word, count) for word, count in islice(counts.items(), _SAMPLE) if word != END]
    total = sum(len(word) * count for word, count in words)
    for script, longest in _WITHOUT_SPACES:
        of_it = [(len(word), count) for word, count in words if script.search(word)]
        characters = sum(length * count for length, count in of_it)
        tokens = sum(count for _, count in of_it)
        if 2 * characters > total and characters > longest * tokens:
            return (
                f"the text seems to have no spaces between words: they are {characters / tokens:.0f} characters long "
                "on average, and hardly any will occur again. --bpe sentencepiece finds pieces in such a text, --bpe "
                "bytes takes its bytes"
            )
    return None


def cut_into_pieces(counts: Mapping[str, int]) -> str | None:
    """Return how a text was already cut into pieces of words, so that its words cannot be counted.

    Args:
        counts: how often each symbol occurs.
    """
    total = sum(counts.values())
    goes_on = sum(count for symbol, count in counts.items() if symbol.endswith("@@") and len(symbol) > 2)
    begins = sum(count for symbol, count in counts.items() if symbol.startswith(SPACE))
    for mark, marked in (("@@", goes_on), (SPACE, begins)):
        if marked > _MARKED * total:
            return f"is cut into pieces already ({mark} is at {marked / total:.0%} of them)"
    return None


def single_document(split: str) -> str:
    """Return a hint on a split whose text is a single file, with --documents."""
    return (
        f"{split} has a single document, as --documents takes every file as one: give it more files, or leave "
        "--documents out. If empty lines stand between its documents, train with --documents separator"
    )


def of_the_result(splits: Mapping[str, Any], files: Mapping[str, Any]) -> Iterator[str]:
    """Yield hints on splits that are the same text, or mostly unknown words.

    Args:
        splits, files: as the record has them.
    """
    for split, count in splits.items():
        words = max(1, count["tokens"] - count["lines"])  # ends of lines are never unknown; letters have none
        if split != "train" and files[f"{split}.bin"]["sha256"] == files["train.bin"]["sha256"]:
            yield f"{split} is the same text as train: its loss will say nothing about other text"
        if count["unknown"] > _MOSTLY * words:
            yield (
                f"{split}: {count['unknown'] / words:.0%} of the words are unknown to the dictionary; does it belong "
                "to this text, divided into words in the same way (--tokenizer, --bpe, --srcdict, --threshold, "
                "--nwords)?"
            )
