"""Plot a table: quality and cost of its rows, learning curves, lengths at test time. Needs matplotlib."""

import logging
import math
from pathlib import Path
from statistics import mean
from typing import Any, Dict, List, Sequence

from . import render
from .execute import Plan
from .labels import label_ends
from .table import MEASURES, Evaluation, Run, TableError


def pyplot() -> Any:
    """Import matplotlib without a display.

    Raises:
        TableError: matplotlib is not installed.
    """
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        import matplotlib
    except ImportError:
        raise TableError("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "tables"  # the same numbers always give the same file
    matplotlib.rcParams["text.parse_math"] = False  # print a $ in a title as it is
    from matplotlib import pyplot

    return pyplot


def write(plan: Plan, runs: Sequence[Run]) -> List[Path]:
    """Draw the plots for which there are results; return the files. Plots of former results are removed."""
    plt = pyplot()
    results = {name: of_row for name, of_row in render.collect(plan, runs).items() if of_row}
    apart = [f"--scale {scale['asked']['minutes']:g}: no reproduction" for scale in render.scales(plan, results)]
    everything = [result for of_row in results.values() for result in of_row]
    if any(plan.otherwise(result) for result in everything):
        apart.append("other options or data than the table's: see table.md")
    if any(render.stale(plan, result) for result in everything):
        apart.append("other options of evaluations than the table's: see table.md")
    files = []
    for name, draw in {"summary": _summary, "curves": _curves, "memory": _memory}.items():
        file = plan.rendered / f"{name}.svg"
        figure = draw(plt, plan, results)
        if figure is None:
            for former in (file, file.with_suffix(".png")):
                former.unlink(missing_ok=True)
            continue
        if apart:
            figure.text(0.01, 0.005, "; ".join(apart), fontsize=7)
        figure.savefig(file, metadata={"Date": None})
        figure.savefig(file.with_suffix(".png"), dpi=150)
        plt.close(figure)
        files.append(file)
    return files


def _summary(plt: Any, plan: Plan, results: Dict[str, List[render.Result]]) -> Any:
    """Draw quality, a point a seed, beside parameters, tokens/s and memory. Values that are not known are left out."""
    if not results:
        return None
    subset = plan.table.evaluation.subsets[-1]
    costs = [
        ("parameters, millions", 1e-6, lambda _, r: render.trained(r, "parameters")),
        ("training, thousand tokens/s", 1e-3, lambda name, r: render.rates(plan, name, r)),
        ("peak memory, GiB", 1, lambda name, r: render.memory(plan, name, r)),
    ]
    titles = [plan.table.rows[name].title for name in results]
    size = (4 * (1 + len(costs)), 1.2 + 0.35 * len(titles))
    figure, (quality, *axes) = plt.subplots(1, 1 + len(costs), figsize=size, sharey=True, layout="constrained")
    for line, of_row in enumerate(results.values()):
        measured = render.values(plan, of_row, Evaluation(subset))
        drawn = list(filter(math.isfinite, measured))
        quality.plot(drawn, [line] * len(drawn), "o", color="C0", alpha=0.5)
        if drawn:
            quality.annotate(
                f"{mean(measured):,.4g}", (max(drawn), line), (6, -3), textcoords="offset points", fontsize=8
            )
    quality.set_xlabel(f"{subset} {MEASURES[plan.table.measure][1]}\npoints: seeds, number: their mean")
    quality.grid(axis="y", alpha=0.3)
    for axis, (label, unit, figures_of) in zip(axes, costs, strict=True):
        by_line = {line: figures_of(*of_row) for line, of_row in enumerate(results.items())}
        known = {line: unit * mean(measured) for line, measured in by_line.items() if measured}
        bars = axis.barh(list(known), list(known.values()), color="0.6")
        axis.bar_label(bars, fmt="{:,.4g}", padding=2, fontsize=8)
        axis.set_xlabel(label)
    for axis in (quality, *axes):
        axis.margins(x=0.25)
    quality.set_yticks(range(len(titles)), titles)
    quality.invert_yaxis()
    figure.suptitle(plan.table.title, fontsize=10)
    return figure


def _curves(plt: Any, plan: Plan, results: Dict[str, List[render.Result]]) -> Any:
    """Draw validation loss against updates, a line a run."""
    results = {name: [r for r in of_row if r["training"]["curve"]] for name, of_row in results.items()}
    if not any(results.values()):
        return None
    figure, axis = plt.subplots(figsize=(9, _height(results)), layout="constrained")
    named = []
    for number, (name, of_row) in enumerate(results.items()):
        lines = []
        for result in of_row:
            updates, losses = zip(*result["training"]["curve"], strict=True)
            lines += axis.plot(updates, losses, **_style(number))
        named += [(plan.table.rows[name].title, line) for line in lines[:1]]
    axis.set_xlabel("updates")
    axis.set_ylabel("validation loss, bits per token")
    figure.suptitle(f"{plan.table.title}: training, a line a seed", fontsize=10)
    label_ends(axis, named)
    return figure


def _height(rows: Any) -> float:
    """Return a height in inches with room for the names of *rows*."""
    return max(4, 1.2 + 0.16 * len(rows))


def _style(number: int) -> Dict[str, Any]:
    """Return the style of a row's lines: ten colours, then the same with other dashes."""
    return {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4], "marker": "."}


def _memory(plt: Any, plan: Plan, results: Dict[str, List[render.Result]]) -> Any:
    """Draw quality against the memory length at test time.

    Tokens/s and peak memory are left out: evaluations that run side by side, or elsewhere, change both.
    """
    sweep = plan.table.evaluation.memory
    at = [Evaluation(sweep.subset, mem_len=length) for length in sweep.lengths]
    rows = [name for name in results if plan.table.rows[name].sweeps]
    rows = [name for name in rows if any(render.values(plan, results[name], evaluation) for evaluation in at)]
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(9, _height(rows)), layout="constrained")
    named = []
    for number, name in enumerate(rows):
        of_row = render.fullest(results[name], at)
        measured = [render.values(plan, of_row, evaluation) or [math.nan] for evaluation in at]
        spreads = [render.deviation(seeds) if len(seeds) > 1 else 0.0 for seeds in measured]
        drawn = axis.errorbar(
            sweep.lengths, list(map(mean, measured)), spreads, capsize=2, elinewidth=0.8, **_style(number)
        )
        seeds = f" ({len(of_row)} seeds)" if len(of_row) > 1 else ""
        named.append((plan.table.rows[name].title + seeds, drawn.lines[0]))
    axis.set_xlabel("memory length at test time, slots")
    axis.set_ylabel(f"{sweep.subset} {MEASURES[plan.table.measure][1]}\nbars: standard deviation of seeds")
    figure.suptitle(f"{plan.table.title}: other memory lengths at test time", fontsize=10)
    label_ends(axis, named)
    return figure
