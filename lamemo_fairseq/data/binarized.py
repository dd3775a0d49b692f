"""Open the files of fairseq-preprocess, and check them before a run of weeks depends on them."""

import io
import os
import shlex
from typing import Any, List, Optional

from fairseq.data import ConcatDataset, Dictionary

from .dictionary import TextDictionary
from .storage import check_files, open_lines, other_format, refuse_format
from .text import read_text
from .text_encoding import PREPROCESS


def load_dictionary(path: str) -> TextDictionary:
    """Load the words of a ``dict.txt``.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is not a dictionary of fairseq's.
    """
    try:
        lines = io.StringIO(read_text(path), newline=None)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"no dictionary at {path}: binarize the text with {PREPROCESS} own --source TEXT --destdir "
            f"{shlex.quote(os.path.dirname(path) or '.')}, or with fairseq-preprocess --only-source"
        ) from error
    dictionary = TextDictionary()
    try:
        dictionary.add_from_file(lines)
    except Exception as error:
        raise ValueError(
            f"{path} is not a dictionary as fairseq-preprocess writes it, a word and its count a line: {error}"
        ) from error
    return dictionary


def load_lines(folder: str, split: str, dictionary: Dictionary, impl: Optional[str], combine: bool) -> Any:
    """Open the lines of a split, an indexed dataset of fairseq.

    Args:
        impl: ``--dataset-impl``; None derives the format from the files.
        combine: join ``split``, ``split1``, ``split2`` and so on.

    Raises:
        FileNotFoundError: there is no such split.
        ValueError: the split is empty or damaged, or its format is not read or not *impl*, or an id is not in the
            dictionary.
    """
    lines = [open_lines(path, len(dictionary), impl) for path in paths_of(folder, split, combine)]
    return lines[0] if len(lines) == 1 else ConcatDataset(lines)


def check_split(folder: str, split: str, impl: Optional[str], combine: bool) -> List[str]:
    """Make the checks of `load_lines` that do not read the ids; return the paths that were checked."""
    paths = paths_of(folder, split, combine)
    for path in paths:
        check_files(path, impl)
    return paths


_CHOICE = (
    "with --train-subset, --valid-subset, --gen-subset, or none with --disable-validation"  # in fairseq's commands
)


def paths_of(folder: str, split: str, combine: bool, choice: str = _CHOICE) -> List[str]:
    """Return the paths of a split without suffixes; to *combine*, also the paths of ``split1`` and so on.

    *choice*: how a command is told of another split, for the error.

    Raises:
        FileNotFoundError: there is no such split.
        ValueError: the split is in a format that is not read.
    """
    path = os.path.join(folder, split)
    if _exists(path):
        return [path, *(os.path.join(folder, part) for part in parts_of(folder, split) if combine)]
    if (form := other_format(path)) is not None:
        refuse_format(path, form)
    there = sorted(f[: -len(".idx")] for f in os.listdir(folder) if f.endswith(".idx"))
    raise FileNotFoundError(
        f"no split '{split}' in {folder}, which holds {', '.join(there) or 'none'}: binarize it with "
        f"{PREPROCESS} own --srcdict dict.txt or fairseq-preprocess --only-source --srcdict dict.txt (or choose "
        f"another {choice})"
    )


def parts_of(folder: str, split: str) -> List[str]:
    """Return the names of the splits that are joined to a split to combine it: ``split1``, ``split2`` and so on."""
    parts: List[str] = []
    while has_split(folder, name := f"{split}{len(parts) + 1}"):
        parts.append(name)
    return parts


def has_split(folder: str, split: str) -> bool:
    """Return whether a data folder has files of a split."""
    return _exists(os.path.join(folder, split))


def _exists(path: str) -> bool:
    return os.path.exists(path + ".idx") or os.path.exists(path + ".bin")
