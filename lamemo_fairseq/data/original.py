"""Counts of the text that a split was made from: its words, bytes and lines before tokenization.

``python -m preprocess`` writes these counts into ``preprocess.json``. ``python -m preprocess count`` writes them into
``original.json``, for data of fairseq-preprocess; `read_original` prefers ``original.json``.
"""

import json
import os
from dataclasses import dataclass
from typing import Dict, Optional

from .text_encoding import PREPROCESS, RECORD

COUNTED = "original.json"
WHITE_SPACE = "between white space in the original text"


@dataclass(frozen=True)
class OriginalText:
    """The counts of the text of a split, as the files have them under ``originals``.

    Args:
        text: its file's name.
        words: counted between white space, as by Python's ``str.split`` and ``wc -w``, or a published count.
        bytes: of the text as it was encoded, ends of lines included.
        lines: line feeds, as ``wc -l`` counts them.
        tokens: of the binarized split; they tell whether the counts belong to the split.
        counted: how the words were counted.
    """

    text: str
    words: int
    bytes: int
    lines: int
    tokens: int
    counted: str = WHITE_SPACE

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if name not in ("text", "counted")}
        wrong = [f"{name} {value!r}" for name, value in numbers.items() if type(value) is not int or value < 0]
        if wrong:
            raise ValueError(f"it says {', '.join(wrong)}")


def read_original(folder: str, split: str) -> Optional[OriginalText]:
    """Return the counts of the text of a split, None if the folder has none.

    Raises:
        ValueError: the counts are damaged.
    """
    return read_counts(folder, COUNTED).get(split) or read_counts(folder, RECORD).get(split)


def read_counts(folder: str, name: str) -> Dict[str, OriginalText]:
    """Return the counts that a file of the folder has, by split.

    Raises:
        ValueError: the counts are damaged.
    """
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            originals = json.load(file).get("originals", {})  # records of former versions have none
        return {split: OriginalText(**counts) for split, counts in originals.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): remove it, and count again with {counting(folder)}"
        ) from error


def counting(folder: str, split: str = "SPLIT") -> str:
    """Return the command that counts a text."""
    return f"`{PREPROCESS} count {folder} {split}=TEXT`"
