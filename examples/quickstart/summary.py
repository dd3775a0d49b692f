"""Make a table from fairseq's logs: python examples/quickstart/summary.py NAME=FOLDER ...

Each folder holds train.log of fairseq-train, eval.log of fairseq-eval-lm, and without.log, an evaluation of the
model without its memory.
"""

import re
import sys
from pathlib import Path

COLUMNS = {
    "bits per byte": ("eval.log", r"Loss \(base 2\): ([\d.]+)"),
    "without its memory": ("without.log", r"Loss \(base 2\): ([\d.]+)"),
    "parameters": ("train.log", r"num\. shared model params: ([\d,]+)"),
    "training tokens/s": ("train.log", r"\| train \|.*?\| wps ([\d.e+]+)"),
}


def row(folder: Path) -> list[str]:
    """Return the last match of every column's pattern in the folder's logs."""
    cells = []
    for name, (log, pattern) in COLUMNS.items():
        matches = re.findall(pattern, (folder / log).read_text(encoding="utf-8", errors="replace"))
        if not matches:
            sys.exit(f"{folder / log} does not say {name}: did the command before fail?")
        cells.append(f"{float(matches[-1]):,.0f}" if name == "training tokens/s" else matches[-1])
    return cells


def table(rows: list[list[str]]) -> str:
    """Aligned Markdown."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    rows = [["model", *COLUMNS]]
    for argument in arguments:
        name, folder = argument.split("=", 1)
        rows.append([name, *row(Path(folder))])
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
