"""Write a small corpus that needs no download: Python's own language reference, which CPython carries.

python examples/quickstart/corpus.py FOLDER   writes train.txt, valid.txt and test.txt
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics


def split(lines: list[str]) -> dict[str, list[str]]:
    """The first 90 % to train on, 5 % to choose on, 5 % to report."""
    first, second = len(lines) * 90 // 100, len(lines) * 95 // 100
    return {"train": lines[:first], "valid": lines[first:second], "test": lines[second:]}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(topics[name] for name in sorted(topics)).splitlines()
    for name, part in split(lines).items():
        (folder / f"{name}.txt").write_text("\n".join(part) + "\n", encoding="utf-8")
        print(f"{name}: {sum(len(line.encode()) + 1 for line in part):,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
