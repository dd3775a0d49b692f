"""A small text in three splits, and the command run over it."""

import json
from pathlib import Path

import numpy as np
import pytest
from fairseq.data import Dictionary

from lamemo_fairseq.data.binarized import load_lines
from lamemo_fairseq.data.streams import TokenSequence
from preprocess.__main__ import main
from preprocess.prepare import RECORD

SPLITS = ("train", "valid", "test")


def prose(lines, seed):
    """Lines of words with a long tail, marks and empty lines among them."""
    generator = np.random.default_rng(seed)
    words = [
        *["the", "of", "and", "to"],
        *(f"w{i}é" if i % 7 == 0 else f"word{i}" for i in range(300)),
        "<unk>",
        "Mr.",
        ",",
    ]
    text = []
    for _ in range(lines):
        picked = (generator.zipf(1.3, generator.integers(0, 15)) - 1) % len(words)
        text.append(" ".join(words[i] for i in picked) + "\n")
    return "".join(text).encode()


TEXTS = {"train": prose(300, 1), "valid": prose(40, 2), "test": prose(50, 3)}


def write(path: Path, text: bytes) -> Path:
    path.write_bytes(text)
    return path


def write_texts(folder: Path) -> Path:
    folder.mkdir()
    for split, text in TEXTS.items():
        write(folder / f"{split}.txt", text)
    return folder


def own(texts, destdir, *options, workers=1):
    chunk = ("--chunk-bytes", "2000")
    main(["own", "--source", str(texts), "--destdir", str(destdir), "--workers", str(workers), *chunk, *options])
    return contents(destdir)


def refused(*arguments):
    """The message that ends the command."""
    with pytest.raises(SystemExit) as error:
        main(list(map(str, arguments)))
    return str(error.value)


def contents(folder):
    """The files of a folder, but for the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def tokens_of(folder, split):
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    sequence = TokenSequence(load_lines(str(folder), split, dictionary, None, False), len(dictionary), split)
    return [dictionary[i] for i in sequence.read(0, len(sequence))]


def counts_of(folder):
    record = json.loads((folder / RECORD).read_text())
    return {split: count["tokens"] for split, count in record["splits"].items()}
