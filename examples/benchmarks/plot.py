"""Bars of tokens/s from result files of training.py.

python examples/benchmarks/plot.py examples/benchmarks/results/h200.json speed.svg
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("figure", type=Path)
    args = parser.parse_args()
    speeds: dict[str, dict[str, float]] = {}
    devices = set()
    for file in args.results:
        read = json.loads(file.read_text())
        devices.add(f"{read['device']}, {read['versions']}")
        for name, measured in read.items():
            if isinstance(measured, dict) and "tok/s" in measured:
                size, path = name.split(" ")
                speeds.setdefault(size, {})[path] = measured["tok/s"]
    figure, axes = plt.subplots(1, len(speeds), figsize=(4 * len(speeds), 3), squeeze=False)
    for axis, (size, of_path) in zip(axes[0], speeds.items(), strict=True):
        axis.barh(list(of_path), list(of_path.values()), color="0.5")
        axis.set_title(size)
        axis.set_xlabel("tokens/s")
        axis.invert_yaxis()
    figure.suptitle("; ".join(sorted(devices)), fontsize=8)
    figure.tight_layout()
    figure.savefig(args.figure)


if __name__ == "__main__":
    main()
