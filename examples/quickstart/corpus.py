"""Writes the quickstart's corpus: the reference texts that every CPython carries for its `help()`.

    python examples/quickstart/corpus.py FOLDER

The topics are taken in alphabetical order. Many repeat parts of others, so a paragraph is kept where it
comes first and left out later: no paragraph of the validation or test text stands in the training text.
"""

import sys
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from pydoc_data.topics import topics

SHARES = {"train": 0.90, "valid": 0.05, "test": 0.05}


def paragraphs() -> Iterator[str]:
    """Every paragraph once, whatever its line breaks and indentation, with the empty line after it."""
    seen = set()
    for name in sorted(topics):
        for paragraph in topics[name].strip("\n").split("\n\n"):
            words = tuple(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                yield paragraph.strip("\n") + "\n\n"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [paragraph.encode() for paragraph in paragraphs()]
    ends = list(accumulate(map(len, texts)))
    start, share = 0, 0.0
    for split in SHARES:
        share += SHARES[split]
        stop = bisect_left(ends, share * ends[-1]) + 1
        part = b"".join(texts[start:stop])
        (folder / f"{split}.txt").write_bytes(part)
        print(f"{split}: {len(part):,} bytes")
        start = stop


if __name__ == "__main__":
    main(Path(sys.argv[1]))
