"""fairseq's storage formats: a split is a file of ids, ``.bin``, and an index of its lines, ``.idx``."""

import os
import struct
from typing import Any, Callable, Dict, List, NamedTuple, NoReturn, Optional, Tuple

import numpy as np
import torch
from fairseq.data import FairseqDataset, indexed_dataset
from fairseq.data.huffman import HuffmanMMapIndex
from fairseq.data.indexed_dataset import MMapIndexedDataset
from numpy.typing import NDArray
from torch import Tensor

from .text_encoding import PREPROCESS

_CHUNK = 1 << 24
_AGAIN = f"binarize the text again with {PREPROCESS} or fairseq-preprocess"


class Index(NamedTuple):
    """The lines of a split according to its index. The lines lie one behind the other in the file."""

    dtype: Any
    sizes: NDArray[Any]  # [lines]
    shift: int  # stored numbers minus ids


class OlderLines(FairseqDataset):
    """The lines of fairseq's older format, which ``--dataset-impl lazy`` and ``cached`` write: every id plus 1.

    fairseq's own readers seek in a file that the processes of a data loader share, or want to be told beforehand what
    will be read. Here the file is mapped into memory.
    """

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        index = _read_older(path)
        self.sizes = index.sizes
        self.ends: NDArray[np.int64] = np.cumsum(self.sizes, dtype=np.int64)
        self.stored = np.memmap(path + ".bin", dtype=index.dtype, mode="r")

    def __reduce__(self) -> Tuple[Any, ...]:
        return OlderLines, (self.path,)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.part(index, 0, int(self.sizes[index])))

    def part(self, index: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the ids ``start .. stop-1`` of a line, int64."""
        begin = int(self.ends[index] - self.sizes[index])
        return self.stored[begin + start : begin + stop].astype(np.int64) - 1


def open_lines(path: str, words: int, impl: Optional[str]) -> Any:
    """Open ``PATH.bin`` and ``PATH.idx``, whatever their format.

    Args:
        words: size of the dictionary.
        impl: ``--dataset-impl``, if it was given.

    Raises:
        ValueError: the files are damaged or empty, or their format is not read or not *impl*, or an id is not in the
            dictionary.
    """
    index, form = _checked(path, impl)
    stored = np.memmap(path + ".bin", dtype=index.dtype, mode="r")
    for start in range(0, len(stored), _CHUNK):
        chunk = stored[start : start + _CHUNK]
        check_ids(chunk.astype(np.int64) - index.shift if index.shift else chunk, path, words)
    return form.open(path)


def check_files(path: str, impl: Optional[str]) -> None:
    """Make the checks of `open_lines` that do not read the ids."""
    _checked(path, impl)


def check_ids(ids: NDArray[Any], name: str, words: int) -> None:
    """Refuse ids of words that the dictionary does not have.

    Raises:
        ValueError: an id is not in the dictionary; the message names it.
    """
    if len(ids) == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= words:
        raise ValueError(
            f"{name} holds the word id {low if low < 0 else high}, but dict.txt has {words} words: "
            f"binarize the text again with this dictionary ({PREPROCESS} own --srcdict DICT, or fairseq-preprocess "
            "--srcdict DICT)"
        )


def other_format(path: str) -> Optional[str]:
    """Return the name of a format of fairseq's that has no index, if a split is stored in it."""
    folder, split = os.path.split(path)
    for name in sorted(os.listdir(folder)):
        # With --only-source, fairseq-preprocess calls both languages None.
        if name in (split, f"{split}.None-None") and os.path.isfile(os.path.join(folder, name)):
            return "raw"
        if name == f"{split}.fasta":
            return "fasta"
    return None


def refuse_format(path: str, name: str) -> NoReturn:
    """Refuse data of a format that is not read."""
    raise ValueError(
        f"{path} is stored in fairseq's format {name}, which this task does not read: binarize the text again with "
        "fairseq-preprocess --dataset-impl mmap"
    )


def _checked(path: str, impl: Optional[str]) -> Tuple[Index, "_Format"]:
    for end in (".idx", ".bin"):
        if not os.path.exists(path + end):
            raise _damaged(path, f"{end} is missing")
    stored = os.path.getsize(path + ".bin")
    if stored == 0:
        raise ValueError(f"{path} holds no tokens: was the text empty?")
    with open(path + ".idx", "rb") as file:
        begin = file.read(max(map(len, _FORMATS)))
    form = next((form for magic, form in _FORMATS.items() if begin.startswith(magic)), None)
    if form is None:
        if begin.startswith(HuffmanMMapIndex._HDR_MAGIC):
            refuse_format(path, "huffman")
        raise _damaged(path, f".idx of {os.path.getsize(path + '.idx'):,} bytes begins like no index of fairseq's")
    if impl is not None and impl not in form.names:
        raise ValueError(
            f"--dataset-impl {impl}: {path} was written with {' or '.join(form.names)}: leave the option out, and the "
            "format is told from the files"
        )
    index = form.read(path)
    expected = int(index.sizes.sum(dtype=np.int64)) * np.dtype(index.dtype).itemsize
    if stored != expected:
        raise _damaged(path, f".bin has {stored} bytes, of {expected}")
    return index, form


_MMAP_HEADER = struct.Struct("<9sQBQ")  # magic, version, code of the dtype, number of lines


def _read_mmap(path: str) -> Index:
    content = np.memmap(path + ".idx", mode="r")
    (lines,), dtype = _header(path, _MMAP_HEADER)
    _check_length(path, len(content), _MMAP_HEADER.size + 12 * lines, lines)
    sizes, starts = _numbers(content, _MMAP_HEADER.size, (np.int32, lines), (np.int64, lines))
    ends = np.cumsum(sizes, dtype=np.int64) * np.dtype(dtype).itemsize
    _check_offsets(path, sizes, starts, np.concatenate([[0], ends])[:-1])
    return Index(dtype, sizes, 0)


_OLDER_HEADER = struct.Struct("<8s5Q")  # magic, version, code and size of the dtype, number of lines and of dimensions


def _read_older(path: str) -> Index:
    content = np.memmap(path + ".idx", mode="r")
    (width, lines, dimensions), dtype = _header(path, _OLDER_HEADER)
    _check_length(path, len(content), _OLDER_HEADER.size + 8 * (2 * (lines + 1) + dimensions), lines)
    offsets = (np.int64, lines + 1)
    firsts, starts, sizes = _numbers(content, _OLDER_HEADER.size, offsets, offsets, (np.int64, dimensions))
    if width != np.dtype(dtype).itemsize or dimensions != lines:
        raise _damaged(path, ".idx does not say where its lines are")
    _check_offsets(path, sizes, firsts, np.arange(lines + 1))
    _check_offsets(path, sizes, starts, np.concatenate([[0], np.cumsum(sizes)]))
    return Index(dtype, sizes, 1)


def _header(path: str, header: struct.Struct) -> Tuple[List[int], Any]:
    """Return the numbers of a header after magic, version and code, and the dtype that the code stands for."""
    with open(path + ".idx", "rb") as file:
        content = file.read(header.size)
    if len(content) < header.size:
        raise _damaged(path, f".idx has {len(content)} bytes")
    _, version, code, *numbers = header.unpack(content)
    dtype = indexed_dataset._code_to_dtype.get(code)
    if version != 1 or dtype is None:
        raise _damaged(path, f".idx is of an unknown version {version} or kind {code}")
    if not np.issubdtype(dtype, np.integer):
        raise ValueError(f"{path} holds numbers of type {np.dtype(dtype)}, not word ids: {_AGAIN}")
    return numbers, dtype


def _check_length(path: str, size: int, expected: int, lines: int) -> None:
    if size != expected:
        raise _damaged(path, f".idx has {size} bytes, of {expected} for {lines} lines")


def _numbers(content: NDArray[Any], offset: int, *fields: Tuple[Any, int]) -> Any:
    for dtype, count in fields:
        yield np.frombuffer(content, dtype, count, offset)
        offset += np.dtype(dtype).itemsize * count


def _check_offsets(path: str, sizes: NDArray[Any], offsets: NDArray[Any], expected: NDArray[Any]) -> None:
    if (sizes < 0).any() or not np.array_equal(offsets, expected):
        raise _damaged(path, ".idx does not say where its lines are")


def _damaged(path: str, why: str) -> ValueError:
    return ValueError(f"{path} is damaged: {why}; {_AGAIN}")


class _Format(NamedTuple):
    names: Tuple[str, ...]  # values of --dataset-impl
    read: Callable[[str], Index]
    open: Callable[[str], Any]


_FORMATS: Dict[bytes, _Format] = {  # by what their indices begin with
    MMapIndexedDataset.Index._HDR_MAGIC: _Format(("mmap",), _read_mmap, MMapIndexedDataset),
    indexed_dataset.IndexedDataset._HDR_MAGIC: _Format(("lazy", "cached"), _read_older, OlderLines),
}
