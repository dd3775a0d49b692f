"""Plots of a table: a bar a row, learning curves, lengths at test time. Needs matplotlib."""

import logging
from pathlib import Path
from statistics import mean
from typing import Any, Dict, List, Sequence, Tuple

from . import render
from .execute import Plan
from .table import MEASURES, Evaluation, Run, TableError


def pyplot() -> Any:
    """matplotlib without a display.

    Raises:
        TableError: it is not installed.
    """
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        import matplotlib
    except ImportError:
        raise TableError("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "tables"  # the same file from the same figures
    from matplotlib import pyplot

    return pyplot


def write(plan: Plan, runs: Sequence[Run]) -> List[Path]:
    """Draw what there are results for; returns the files."""
    plt = pyplot()
    results = {name: found for name, found in render.collect(plan, runs).items() if found}
    if not results:
        return []
    drawn = {"summary": _summary, "curves": _curves, "memory": _memory}
    files = []
    for name, draw in drawn.items():
        figure = draw(plt, plan, results)
        if figure is not None:
            if plan.scale:
                figure.text(0.01, 0.005, f"--scale {plan.scale['asked']['minutes']:g}: no reproduction", fontsize=7)
            figure.tight_layout()
            files.append(plan.rendered / f"{name}.svg")
            figure.savefig(files[-1], metadata={"Date": None})
            figure.savefig(files[-1].with_suffix(".png"), dpi=150)
            plt.close(figure)
    return files


def _summary(plt: Any, plan: Plan, results: Dict[str, List[render.Result]]) -> Any:
    """Quality, parameters, tokens/s and memory side by side."""
    subset = plan.table.evaluation.subsets[-1]
    panels = [
        (f"{subset} {MEASURES[plan.table.measure][1]}", lambda _, r: render.values(plan, r, Evaluation(subset))),
        ("parameters", lambda _, r: render.trained(r, "parameters")),
        ("training tokens/s", lambda name, r: render.rates(plan, name, r)),
        ("peak memory, GiB", lambda name, r: render.memory(plan, name, r)),
    ]
    titles = [plan.table.rows[name].title for name in results]
    height = 1.2 + 0.35 * len(titles)
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), height), sharey=True)
    for axis, (label, figures) in zip(axes, panels, strict=True):
        bars = axis.barh(titles, [mean(figures(*found) or [0]) for found in results.items()], color="0.5")
        axis.bar_label(bars, fmt="{:,.4g}", padding=2, fontsize=8)
        axis.set_xlabel(label)
        axis.margins(x=0.2)
    axes[0].invert_yaxis()
    figure.suptitle(plan.table.title, fontsize=10)
    return figure


def _curves(plt: Any, plan: Plan, results: Dict[str, List[render.Result]]) -> Any:
    """Validation loss against updates, a line a run."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for number, (name, found) in enumerate(results.items()):
        for i, result in enumerate(found):
            updates, losses = zip(*result["training"]["curve"] or [(0, float("nan"))], strict=True)
            label = plan.table.rows[name].title if i == 0 else None
            axis.plot(updates, losses, color=f"C{number}", label=label, marker=".")
    axis.set_xlabel("updates")
    axis.set_ylabel("valid loss, bits per token")
    axis.legend(fontsize=8)
    axis.set_title(plan.table.title, fontsize=10)
    return figure


def _memory(plt: Any, plan: Plan, results: Dict[str, List[render.Result]]) -> Any:
    """Quality, tokens/s and peak memory of evaluation against the memory length at test time."""
    sweep = plan.table.evaluation.memory
    rows = [name for name in results if plan.table.rows[name].sweeps]
    if not sweep.lengths or not rows:
        return None
    panels: List[Tuple[str, Sequence[str]]] = [
        (MEASURES[plan.table.measure][1], (MEASURES[plan.table.measure][0],)),
        ("tokens/s", ("tokens_per_second",)),
        ("peak memory, GiB", ("device_memory_gib", "host_memory_gib")),
    ]
    at = [Evaluation(sweep.subset, mem_len=length) for length in sweep.lengths]
    fullest = {name: render.fullest(results[name], at) for name in rows}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.5))
    for axis, (label, keys) in zip(axes, panels, strict=True):
        for name, found in fullest.items():
            points = []
            for evaluation in at:
                figures = next((v for v in (render.values(plan, found, evaluation, key) for key in keys) if v), None)
                points.append(render.finite(mean(figures) if figures else None))
            axis.plot(sweep.lengths, points, marker=".", label=plan.table.rows[name].title)
        axis.set_xlabel("memory length at test time")
        axis.set_ylabel(f"{sweep.subset} {label}")
        if keys != panels[0][1]:
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    axes[0].legend(fontsize=8)
    figure.suptitle(plan.table.title, fontsize=10)
    return figure
