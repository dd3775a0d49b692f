"""Count a text as it is before tokenization, for losses per word and per byte.

    python -m preprocess count data-bin/own valid=valid.txt test=test.txt

counts texts for a folder that fairseq-preprocess wrote, or whose texts had been cut into pieces before.
"""

import codecs
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from lamemo_fairseq.core.names import nearest_path
from lamemo_fairseq.data.binarized import load_dictionary, load_lines, paths_of
from lamemo_fairseq.data.original import COUNTED, OriginalText, read_counts

from . import hints
from .files import Span, replacing
from .sources import Source

_BLOCK = 1 << 16  # larger ones take twice the time, since their words leave the processor's cache


class TextCounts(NamedTuple):
    """The counts of a text: see `OriginalText`."""

    words: int
    bytes: int
    lines: int
    ended: bool  # whether its last line has an end


def count_text(text: Span, quiet: bool = False) -> TextCounts:
    """Count in blocks, so that memory does not grow with the text. Bytes that are not UTF-8 are part of a word."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    words = lines = 0
    inside = False  # a word
    block = b""
    with (
        open(text.path, "rb") as file,
        tqdm(
            desc=f"counting {text.path.name}",
            total=text.size,
            unit="B",
            unit_scale=True,
            mininterval=1,
            disable=quiet,
        ) as bar,
    ):
        file.seek(text.start)
        for left in range(text.size, 0, -_BLOCK):
            block = file.read(min(_BLOCK, left))
            lines += block.count(b"\n")
            characters = decoder.decode(block, final=left <= _BLOCK)
            words += len(characters.split())
            if characters:
                words -= inside and not characters[0].isspace()
                inside = not characters[-1].isspace()
            bar.update(len(block))
    return TextCounts(words, text.size, lines, block.endswith(b"\n"))


def count_split(documents: Sequence[Span], tokens: int) -> dict[str, Any]:
    """Return the counts of a split's text, as `OriginalText` has them; *tokens* were made of this text.

    The split's *documents* follow one another in a file. No word reaches from one document into the next.
    """
    text = Span(documents[0].path, documents[0].start, documents[-1].stop)
    whole = text.start == 0 and text.stop == text.path.stat().st_size
    name = text.path.name if whole else f"{text.path.name}, bytes {text.start:,} to {text.stop:,}"
    counts = [count_text(document, quiet=len(documents) > 1) for document in documents]
    words, lines = sum(count.words for count in counts), sum(count.lines for count in counts)
    return asdict(OriginalText(name, words, text.size, lines, tokens))


def count_for(folder: Path, texts: Iterable[str], other_lines: bool = False) -> dict[str, OriginalText]:
    """Count the texts of splits, and write them beside the splits' binarized data.

    Args:
        texts: ``SPLIT=FILE``, compressed or not; several files for a split are joined in order.
        other_lines: whether a split may have other lines than its text.

    Raises:
        ValueError: a text is cut into pieces, or has other lines than the split.
        FileNotFoundError: a split or a file is missing.
    """
    files: dict[str, list[Path]] = {}
    for text in texts:
        split, sign, name = text.partition("=")
        if not (sign and split and name):
            raise ValueError(f"{text}: name a split and its text, such as test=test.txt")
        if not Path(name).is_file():
            raise FileNotFoundError(f"{text}: there is no file {name}{nearest_path(name)}")
        files.setdefault(split, []).append(Path(name))
    dictionary = load_dictionary(str(folder / "dict.txt"))
    counted = read_counts(str(folder), COUNTED)
    for split, parts in files.items():
        paths_of(str(folder), split, combine=False, choice="as SPLIT=TEXT")
        binarized = load_lines(str(folder), split, dictionary, None, combine=False)  # the sizes are a map of its file
        counts = _count_parts(parts, folder)
        text_lines = counts.lines + (not counts.ended)
        if len(binarized) not in (counts.lines, text_lines) and not other_lines:
            raise ValueError(
                f"{split}={parts[0]} has {text_lines:,} lines, and {folder / split} has {len(binarized):,}: name the "
                "text that it was made from, or pass --other-lines if lines were joined or divided"
            )
        name = parts[0].name + (f" and {len(parts) - 1} more" if len(parts) > 1 else "")
        counted[split] = OriginalText(name, *counts[:3], int(binarized.sizes.sum()))
    with replacing(folder / COUNTED) as file:
        entries = {split: asdict(text) for split, text in counted.items()}
        file.write(json.dumps({"originals": entries}, indent=1).encode() + b"\n")
    return {split: counted[split] for split in files}


def _count_parts(parts: Sequence[Path], folder: Path) -> TextCounts:
    with tempfile.TemporaryDirectory(dir=folder, prefix="unpacked-") as unpacked:
        file = Source(parts[0].name, parts[0], tuple(parts[1:])).extracted(Path(unpacked))
        with open(file, "rb") as text:
            beginning = text.read(1 << 20).decode("utf-8", "replace")
        if cut := hints.cut_into_pieces(Counter(beginning.split())):
            raise ValueError(f"{parts[0]} {cut}: name the text as it was before")
        return count_text(Span(file, 0, file.stat().st_size))
