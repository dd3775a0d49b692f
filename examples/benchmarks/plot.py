"""Training speed as bars: this package, the released code and a decoder without memory, on one scale.

    cd examples/benchmarks
    python plot.py results/h200.json results/h200-released.json results/h200.svg

Files are those of `training.py --result`; sizes and paths that are not listed below are left out.
"""

import argparse
import json
import sys
from pathlib import Path

try:
    import matplotlib
except ModuleNotFoundError:
    sys.exit("pictures need matplotlib: pip install matplotlib")

matplotlib.use("svg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.tables.arguments import ArgumentParser

SIZES = {
    "enwik8": "enwik8\n20 x 512 tokens, memory 512",
    "wt103-adaptive": "WikiText-103, adaptive softmax\n64 x 150 tokens, memory 150",
    "wt103-full": "WikiText-103, full softmax\n64 x 150 tokens, memory 150",
}
PATHS = {
    "lamemo-graphs": ("LaMemo", "#1f77b4"),
    "lamemo-released": ("LaMemo, released code", "#8fbbdb"),
    "txl-graphs": ("Transformer-XL", "#d9730d"),
    "txl-released": ("Transformer-XL, released code", "#e8b285"),
    "plain-graphs": ("no memory, flash attention", "#7f8790"),
}
# The picture has a page of its own, so that it reads alike on light and dark ones.
TEXT, PAGE = "#24292f", "white"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("figure", type=Path)
    args = parser.parse_args()
    read = [json.loads(file.read_text()) for file in args.results]
    (device,) = {one["device"] for one in read}
    speeds = {name: of["tok/s"] for one in read for name, of in one.items() if isinstance(of, dict) and "tok/s" in of}
    bars = [(size, path) for size in SIZES for path in PATHS if f"{size} {path}" in speeds]

    plt.rcParams.update({"text.color": TEXT, "axes.labelcolor": TEXT, "svg.fonttype": "none", "font.size": 10})
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.3 * len(bars)))
    largest = max(speeds[f"{size} {path}"] for size, path in bars)
    at, top = 0.0, dict[str, float]()
    for number, (size, path) in enumerate(bars):
        at += 1.0 if number == 0 or bars[number - 1][0] == size else 1.8
        top.setdefault(size, at)
        speed = speeds[f"{size} {path}"]
        name, color = PATHS[path]
        axis.barh(at, speed, height=0.8, color=color)
        axis.text(speed + largest / 100, at, f"{speed:,.0f}  {name}", va="center", color=TEXT)
    for size, first in top.items():
        axis.text(-largest / 40, first, SIZES[size], ha="right", va="top", color=TEXT, linespacing=1.4)
    axis.set_ylim(at + 0.7, 0.3)
    axis.set_xlim(0, largest * 1.35)
    axis.set_axis_off()
    axis.set_title(f"Training speed, tokens per second on one {device}", loc="left", color=TEXT)
    figure.savefig(args.figure, facecolor=PAGE, bbox_inches="tight", pad_inches=0.2, metadata={"Date": None})


if __name__ == "__main__":
    main()
