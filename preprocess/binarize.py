"""Turn encoded chunks into a dictionary and fairseq's binary format.

The files are those of fairseq-preprocess, bit by bit, and are made by its own dictionary and index. That command itself
assigns ids in a Python loop over tokens. Its main process starts on its own share of a text only when its workers have
finished.
"""

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset, best_fitting_int_dtype
from tqdm import tqdm

from lamemo_fairseq.core.text.encoding import MARK
from lamemo_fairseq.data import binarized
from lamemo_fairseq.data.documents import RECORD

from .chunks import Chunk, load, load_counts
from .files import Span, replacing
from .tokenization import END


class SplitCount(NamedTuple):
    """The counts of a split."""

    tokens: int
    lines: int
    unknown: int  # tokens that the dictionary does not have, or that are <unk> in the text itself


def count_symbols(chunks: Iterable[Path]) -> Counter[str]:
    """Count how often each symbol occurs."""
    counts: Counter[str] = Counter()
    for path in chunks:
        counts.update(load_counts(path))
    return counts


def make_dictionary(counts: Counter[str], threshold: int, nwords: int, padding_factor: int) -> Dictionary:
    """Return the dictionary that fairseq-preprocess makes with these options."""
    dictionary = Dictionary()
    for symbol, number in sorted(counts.items()):
        dictionary.add_symbol(symbol, number)
    dictionary.finalize(threshold=threshold, nwords=nwords, padding_factor=padding_factor)
    return dictionary


def load_dictionary(path: Path) -> Dictionary:
    """Return the dictionary in a file, as the task reads it.

    Raises:
        ValueError: the file holds no dictionary.
    """
    try:
        return binarized.load_dictionary(str(path))
    except ValueError as error:
        raise ValueError(f"--srcdict {error}") from error


def save_dictionary(dictionary: Dictionary, path: Path) -> None:
    """Write ``dict.txt`` so that reading it gives the same words at the same ids.

    fairseq does not write the flag of words that occur again, as its own symbols do in RoBERTa's dictionary. fairseq
    then cannot read its own file.

    Raises:
        ValueError: the first word begins with a byte order mark, which no reader takes for a part of the word.
    """
    if any(word.startswith(MARK) for word in dictionary.symbols[dictionary.nspecial :][:1]):
        raise ValueError(
            "the commonest word of the text begins with U+FEFF, a byte order mark, with which dict.txt cannot begin: "
            "remove this character from the text, or take --bpe bytes"
        )
    before = set(dictionary.symbols[: dictionary.nspecial])
    with replacing(path) as file:
        for word, count in list(zip(dictionary.symbols, dictionary.count, strict=True))[dictionary.nspecial :]:
            file.write(f"{word} {count}{' #fairseq:overwrite' * (word in before)}\n".encode())
            before.add(word)
    assert binarized.load_dictionary(str(path)).symbols == dictionary.symbols


def write_documents(prefix: Path, documents: Sequence[Span], chunks: Sequence[Chunk]) -> None:
    """Write ``PREFIX.documents``: the number of lines of each document, one a line."""
    lines = [0] * len(documents)
    ends = [document.stop for document in documents]
    for chunk in chunks:
        lines[bisect_left(ends, chunk.text.stop)] += len(load(chunk.encoded).sizes)
    with replacing(prefix.with_suffix(RECORD)) as file:
        file.write("".join(f"{count}\n" for count in lines).encode())


def write_split(prefix: Path, chunks: Sequence[Path], dictionary: Dictionary) -> SplitCount:
    """Write ``PREFIX.bin`` and ``PREFIX.idx``."""
    dtype = best_fitting_int_dtype(len(dictionary))
    sizes: list[int] = []
    unknown, unknown_ids = 0, [dictionary.unk(), dictionary.index(dictionary.unk_word)]
    with replacing(prefix.with_suffix(".bin")) as file:
        for path in tqdm(chunks, desc=f"writing {prefix.name}", unit="chunk", mininterval=1):
            symbols, ids, lengths = load(path)
            numbers = np.array([dictionary.index(symbol) for symbol in symbols], dtype=dtype)
            tokens = numbers[ids]
            if dictionary.index(END) != dictionary.eos():  # </s> is a word too, and ends of lines are not this word
                ends = np.cumsum(lengths) - 1
                tokens[ends[tokens[ends] == dictionary.index(END)]] = dictionary.eos()
            file.write(tokens.tobytes())
            sizes.extend(lengths.tolist())
            unknown += int(np.isin(tokens, unknown_ids).sum())
    part = prefix.with_suffix(".idx.part")
    with MMapIndexedDataset.Index.writer(str(part), dtype) as index:
        index.write(sizes)
    os.replace(part, prefix.with_suffix(".idx"))
    return SplitCount(sum(sizes), len(sizes), unknown)
