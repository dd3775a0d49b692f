"""The folders that the data argument names: one, or several shards that are trained on in turn."""

import logging
import os
from dataclasses import replace
from itertools import zip_longest
from typing import Any, List

from fairseq import utils
from fairseq.data import Dictionary
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_original_cwd

from ..core.names import nearest_path
from .binarized import has_split, load_dictionary, parts_of
from .text_encoding import PREPROCESS, read_text_encoding

logger = logging.getLogger(__name__)


def data_folders(data: str) -> List[str]:
    """Split the data argument.

    Raises:
        OSError: a folder is not there, or is something else.
        ValueError: the list has an empty entry.
    """
    folders = utils.split_paths(data)
    among = f", one of the {len(folders)} in '{data}'" if len(folders) > 1 else ""
    for folder in folders:
        if not folder.strip():
            raise ValueError(
                f"the data argument '{data}' has an empty entry: name folders, separated by '{os.pathsep}'"
            )
        if not os.path.exists(folder):
            raise FileNotFoundError(
                f"the data folder {folder}{among} is not there"
                + (
                    _seen_from_hydra(folder)
                    or nearest_path(folder)
                    or f": pass the folder that fairseq-preprocess or {PREPROCESS} wrote"
                )
            )
        if not os.path.isdir(folder):
            binarized = os.path.exists(os.path.join(os.path.dirname(folder), "dict.txt"))
            right = "folder that it lies in" if binarized else f"--destdir of {PREPROCESS} own --source {folder}"
            raise NotADirectoryError(f"the data argument {folder}{among} is a file: pass the {right}")
        os.scandir(folder).close()  # raises PermissionError, which names the folder
    return folders


def tell_of_others(folders: List[str], split: str) -> None:
    """Warn of folders whose split is left out, as all splits but those to train on are read from the first one."""
    others = [folder for folder in folders[1:] if has_split(folder, split)]
    if others:
        logger.warning(
            "the split '%s' is read from %s alone, and not from %s: evaluate each folder with a command of its own",
            split,
            folders[0],
            ", ".join(others),
        )


def tell_of_parts(folder: str, split: str, train_subset: str) -> None:
    """Tell of the parts of a split that are left out, as only a split to train on is joined with them.

    A loss of the first part alone would pass for one of all that was trained on.
    """
    parts = parts_of(folder, split)
    if parts and split == train_subset:
        logger.warning(
            "the split '%s' is read without %s, which training joins to it: evaluate each with a command of its own",
            split,
            ", ".join(parts),
        )
    elif parts:
        logger.info("the split '%s' is read without %s", split, ", ".join(parts))


def _seen_from_hydra(folder: str) -> str:
    """Return the end of the message on a path that was meant to begin where fairseq-hydra-train was started."""
    if os.path.isabs(folder) or not HydraConfig.initialized() or os.getcwd() == get_original_cwd():
        return ""
    return f", as hydra runs in another folder, {os.getcwd()}: pass an absolute path, such as task.data=$PWD/{folder}"


def shared_dictionary(folders: List[str]) -> Dictionary:
    """Load the dictionary of the first folder, and check that the others have the same words, made in the same way.

    Raises:
        FileNotFoundError: a folder has no dictionary.
        ValueError: a dictionary cannot be read, or two differ.
    """
    first = folders[0]
    dictionary = load_dictionary(os.path.join(first, "dict.txt"))
    for folder in folders[1:]:
        _check_words(first, dictionary, folder)
        _check_encoding(first, folder)
    return dictionary


def _check_words(first: str, dictionary: Dictionary, folder: str) -> None:
    other = load_dictionary(os.path.join(folder, "dict.txt"))
    if dictionary.symbols == other.symbols:
        return
    pairs = enumerate(zip_longest(dictionary.symbols, other.symbols))
    index, (one, two) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    raise _different(
        first,
        folder,
        f"different dictionaries (word {index} is {_named(one)} in one and {_named(two)} in the other; "
        f"{len(dictionary):,} and {len(other):,} words)",
        f"binarize all of them with one dictionary (--srcdict {os.path.join(first, 'dict.txt')})",
    )


def _check_encoding(first: str, folder: str) -> None:
    one, two = read_text_encoding(first), read_text_encoding(folder)
    if one is None or two is None or replace(one, model=None) == replace(two, model=None):
        return
    names = [name for name in vars(one) if name != "model" and getattr(one, name) != getattr(two, name)]
    what = ", ".join(f"{name} {getattr(one, name)!r} and {getattr(two, name)!r}" for name in names)
    raise _different(first, folder, f"text of different {what}", f"make them with the same options of {PREPROCESS}")


def _different(first: str, folder: str, what: str, remedy: str) -> ValueError:
    return ValueError(f"the data folders {first} and {folder} hold {what}: {remedy}, or train on one of them")


def _named(word: Any) -> str:
    return "missing" if word is None else repr(word)
