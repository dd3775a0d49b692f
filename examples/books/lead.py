"""LaMemo's lead over Transformer-XL against the tokens of a training, at equal tokens and at equal time, as a picture.

    python -m examples.books.lead examples/books/lead.svg

Read the runs of three tables, in the sizes of WikiText-103. A point is the mean over seeds, each compared with the run
of the same seed. Its bar is the standard deviation, if there are several.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from examples.tables import kept
from examples.tables.arguments import ArgumentParser
from examples.tables.plots import pyplot

EXAMPLES = Path(__file__).resolve().parents[1]
# Tables of each text: the length of the training, and the label's horizontal alignment and offset in points.
TEXTS = {
    "97 novels": {
        "novels/words-2-epochs": ("2 epochs", "center", 0),
        "novels/words-8-epochs": ("8 epochs", "right", 6),
    },
    "1,347 books": {"books/words": ("1.6 epochs", "left", -6)},
}
# Opponents of LaMemo, with the label and the colour of their line.
OPPONENTS = {
    "transformer_xl": ("at equal tokens", "#1f77b4"),
    "transformer_xl_longer": ("at equal time", "#d9730d"),
}
PAPER = (2400, 100 * (24.56 - 23.77) / 24.56)  # million tokens, percent; Ji et al. 2022, table 1
# The picture has a page of its own, so that it reads alike on light and dark ones.
TEXT, PAGE = "#24292f", "white"


def leads(table: str, opponent: str) -> tuple[float, list[float]]:
    """Return LaMemo's millions of tokens, and its lead over *opponent* in percent of the test perplexity, by seed."""
    runs = kept.read(EXAMPLES / table / "results" / "runs.jsonl").values()
    by_row = {
        row: {run["run"]["seed"]: run for run in runs if run["run"]["row"] == row} for row in ("lamemo", opponent)
    }
    pairs = [(run, by_row[opponent][seed]) for seed, run in by_row["lamemo"].items() if seed in by_row[opponent]]
    _check(table, pairs)
    training = pairs[0][0]["training"]
    return training["updates"] * training["tokens_an_update"] / 1e6, [
        100 * (1 - lamemo["evaluations"]["test"]["perplexity"] / other["evaluations"]["test"]["perplexity"])
        for lamemo, other in pairs
    ]


def _check(table: str, pairs: Sequence[tuple[kept.Result, kept.Result]]) -> None:
    """Refuse pairs that cannot be compared, or that stand at other points of the picture.

    Raises:
        ValueError: there is no pair, or they differ in more than the model and its updates.
    """
    same = {
        "data": lambda run: run["run"].get("data"),
        "options of the test evaluation": lambda run: run["evaluations"]["test"].get("identity"),
    }
    lengths = {(lamemo["training"]["updates"], lamemo["training"]["tokens_an_update"]) for lamemo, _ in pairs}
    several = ["updates or tokens an update of LaMemo"] if len(lengths) > 1 else []
    several += [name for name, of in same.items() if any(of(run) != of(pairs[0][0]) for pair in pairs for run in pair)]
    if several or not pairs:
        what = f"runs of several {', '.join(several)}" if several else "no seed of both rows"
        raise ValueError(f"examples/{table}/results/runs.jsonl has {what}: a lead is over runs that are alike")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", type=Path)
    args = parser.parse_args()
    plt = pyplot()
    plt.rcParams.update({"text.color": TEXT, "axes.labelcolor": TEXT, "svg.fonttype": "none", "font.size": 10})
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    axis.axhline(0, color=TEXT, linewidth=0.8)
    for opponent, (label, color) in OPPONENTS.items():
        for tables in TEXTS.values():
            tokens, by_seed = zip(*(leads(table, opponent) for table in tables), strict=True)
            spread = [stdev(seeds) if len(seeds) > 1 else 0 for seeds in by_seed]
            axis.errorbar(tokens, list(map(mean, by_seed)), spread, fmt="o-", color=color, capsize=4)
        last = mean(by_seed[-1])
        beside = {"textcoords": "offset points", "va": "center", "color": color}
        axis.annotate(
            f"{label}: {abs(last):.1f}% {'ahead' if last > 0 else 'behind'}", (tokens[-1], last), (10, 0), **beside
        )
    for text, tables in TEXTS.items():
        for table, (epochs, alignment, aside) in tables.items():
            at, by_seed_of_table = leads(table, "transformer_xl")
            top = (at, mean(by_seed_of_table))
            axis.annotate(f"{text},\n{epochs}", top, (aside, 12), textcoords="offset points", ha=alignment)
    axis.plot(*PAPER, "o", color=TEXT, markerfacecolor=PAGE)
    note = f"WikiText-103, the paper's figure,\nat equal tokens: {PAPER[1]:.1f}% ahead"
    axis.annotate(note, PAPER, (-8, -30), textcoords="offset points", ha="right")
    axis.set_xscale("log")
    ticks = [30, 100, 300, 1000, 3000]
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlim(20, 3500)
    axis.margins(y=0.2)
    axis.set_xlabel("tokens that LaMemo's training read, millions")
    axis.set_ylabel("its test perplexity is lower by, percent")
    axis.set_title("LaMemo's lead over Transformer-XL", loc="left", color=TEXT)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.figure, facecolor=PAGE, metadata={"Date": None})


if __name__ == "__main__":
    main()
