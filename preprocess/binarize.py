"""Encoded chunks to a dictionary and to fairseq's binary format.

The files are those of fairseq-preprocess, bit by bit, and are made by its own dictionary and index. The command itself
assigns ids in a Python loop over tokens, and starts on its own part of a text only when its workers have done theirs.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset, best_fitting_int_dtype
from tqdm import tqdm

from .chunks import load, load_counts
from .files import replacing


class SplitCount(NamedTuple):
    """What a split holds."""

    tokens: int
    lines: int
    unknown: int  # tokens that the dictionary does not have, or that the text itself calls unknown


def count_symbols(chunks: Iterable[Path]) -> Counter[str]:
    """How often each symbol occurs."""
    counts: Counter[str] = Counter()
    for path in chunks:
        counts.update(load_counts(path))
    return counts


def make_dictionary(counts: Counter[str], threshold: int, nwords: int, padding_factor: int) -> Dictionary:
    """The dictionary of fairseq-preprocess with these options of it."""
    dictionary = Dictionary()
    for symbol, number in sorted(counts.items()):
        dictionary.add_symbol(symbol, number)
    dictionary.finalize(threshold=threshold, nwords=nwords, padding_factor=padding_factor)
    return dictionary


def load_dictionary(path: Path) -> Dictionary:
    """The dictionary that a file holds.

    Raises:
        ValueError: it holds none.
    """
    try:
        return Dictionary.load(str(path))
    except Exception as error:  # fairseq raises many kinds, this one among them
        raise ValueError(f"--srcdict {path} is not a dictionary: {error}") from error


def write_split(prefix: Path, chunks: Sequence[Path], dictionary: Dictionary) -> SplitCount:
    """Write ``PREFIX.bin`` and ``PREFIX.idx``."""
    dtype = best_fitting_int_dtype(len(dictionary))
    sizes: list[int] = []
    unknown = 0
    with replacing(prefix.with_suffix(".bin")) as file:
        for path in tqdm(chunks, desc=f"writing {prefix.name}", unit="chunk", mininterval=1):
            symbols, ids, lengths = load(path)
            numbers = np.array([dictionary.index(symbol) for symbol in symbols], dtype=dtype)
            tokens = numbers[ids]
            file.write(tokens.tobytes())
            sizes.extend(lengths.tolist())
            unknown += int((tokens == dictionary.unk()).sum())
    part = prefix.with_suffix(".idx.part")
    with MMapIndexedDataset.Index.writer(str(part), dtype) as index:
        index.write(sizes)
    os.replace(part, prefix.with_suffix(".idx"))
    return SplitCount(sum(sizes), len(sizes), unknown)
