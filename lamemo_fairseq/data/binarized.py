"""Opening what fairseq-preprocess wrote, and looking it over before a run of weeks depends on it."""

import os
import struct
from typing import Any, Optional

import numpy as np
from fairseq.data import Dictionary, data_utils, indexed_dataset
from numpy.typing import NDArray

_HEADER = struct.Struct("<9sQBQ")  # magic, version, code of the dtype, number of lines
_CHUNK = 1 << 24


def load_dictionary(path: str) -> Dictionary:
    """The words of a ``dict.txt``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a dictionary of fairseq's.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"no dictionary at {path}: binarize the text with fairseq-preprocess --only-source --destdir "
            f"{os.path.dirname(path)}"
        )
    try:
        return Dictionary.load(path)
    except Exception as error:
        raise ValueError(
            f"{path} is not a dictionary as fairseq-preprocess writes it, a word and its count a line: {error}"
        ) from error


def load_lines(folder: str, split: str, dictionary: Dictionary, impl: Optional[str], combine: bool) -> Any:
    """The lines of a split, an indexed dataset of fairseq.

    Args:
        combine: join ``split``, ``split1``, ``split2`` and so on.

    Raises:
        FileNotFoundError: there is no such split.
        ValueError: it is empty or damaged, or holds ids of words that the dictionary does not have.
    """
    path = os.path.join(folder, split)
    part, number = path, 0
    while os.path.exists(part + ".idx") or os.path.exists(part + ".bin"):
        _check_files(part, len(dictionary))
        number += 1
        part = f"{path}{number}"
        if not combine:
            break
    try:
        lines = data_utils.load_indexed_dataset(path, dictionary, impl, combine=combine)
    except Exception as error:
        raise _damaged(path, f"fairseq cannot open it ({type(error).__name__}: {error})") from error
    if lines is None:
        there = sorted(f[: -len(".idx")] for f in os.listdir(folder) if f.endswith(".idx"))
        raise FileNotFoundError(
            f"no split '{split}' in {folder}, which holds {', '.join(there) or 'none'}: binarize it with "
            "fairseq-preprocess --only-source --srcdict dict.txt (or choose another with --valid-subset, "
            "--gen-subset, or none with --disable-validation)"
        )
    return lines


def _check_files(path: str, words: int) -> None:
    for end in (".idx", ".bin"):
        if not os.path.exists(path + end):
            raise _damaged(path, f"{end} is missing")
    stored = os.path.getsize(path + ".bin")
    if stored == 0:
        raise ValueError(f"{path} holds no tokens: was the text empty?")
    size = os.path.getsize(path + ".idx")
    with open(path + ".idx", "rb") as file:
        header = file.read(_HEADER.size)
        if header[:9] != indexed_dataset.MMapIndexedDataset.Index._HDR_MAGIC:
            if size < 8:
                raise _damaged(path, f".idx has {size} bytes")
            return  # another format of fairseq's, which checks ids when it reads them
        if size < _HEADER.size:
            raise _damaged(path, f".idx has {size} bytes")
        _, version, code, lines = _HEADER.unpack(header)
        dtype = indexed_dataset._code_to_dtype.get(code)
        if version != 1 or dtype is None:
            raise _damaged(path, f".idx is of an unknown version {version} or kind {code}")
        if not np.issubdtype(dtype, np.integer):
            raise ValueError(f"{path} holds numbers of type {np.dtype(dtype)}, not word ids: {_AGAIN}")
        if size != _HEADER.size + 12 * lines:
            raise _damaged(path, f".idx has {size} bytes, of {_HEADER.size + 12 * lines} for {lines} lines")
        sizes = np.frombuffer(file.read(4 * lines), dtype=np.int32)
        starts = np.frombuffer(file.read(8 * lines), dtype=np.int64)
    width = np.dtype(dtype).itemsize
    ends = np.cumsum(sizes, dtype=np.int64) * width
    if (sizes < 0).any() or not np.array_equal(starts, np.concatenate([[0], ends[:-1]]) if lines else starts):
        raise _damaged(path, ".idx does not say where its lines are")
    expected = int(ends[-1]) if lines else 0
    if stored != expected:
        raise _damaged(path, f".bin has {stored} bytes, of {expected}")
    _check_ids(np.memmap(path + ".bin", dtype=dtype, mode="r"), path, words)


def _check_ids(ids: NDArray[Any], path: str, words: int) -> None:
    for start in range(0, len(ids), _CHUNK):
        check_ids(ids[start : start + _CHUNK], path, words)


def check_ids(ids: NDArray[Any], name: str, words: int) -> None:
    """Refuse ids of words that the dictionary does not have.

    Raises:
        ValueError: naming one.
    """
    if len(ids) == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= words:
        raise ValueError(
            f"{name} holds the word id {low if low < 0 else high}, but dict.txt has {words} words: "
            "binarize the text again with this dictionary (fairseq-preprocess --srcdict)"
        )


_AGAIN = "binarize the text again with fairseq-preprocess"


def _damaged(path: str, why: str) -> ValueError:
    return ValueError(f"{path} is damaged: {why}; {_AGAIN}")
