"""Tables and pictures of the loss over documents."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from .collect import Collected
from .documents import AGAIN, ALL, FIRST, Mean

Models = Dict[str, Collected]
Lines = List[Dict[str, Any]]

_CLASSES = {ALL: "all tokens", FIRST: "first time in the document", AGAIN: "seen before in the document"}
_DASHES = ("--", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 1)))


class About(NamedTuple):
    """The split that was read, and the rule for its documents."""

    split: str
    documents: str  # the rule that separates documents


def by_position(models: Models, about: About) -> Lines:
    """Return the mean loss at positions 1, 2 to 3, 4 to 7, ... of the documents, by class of token and memory slots."""
    return [
        {
            **_head(name, about, slots, of),
            "from": first,
            "to": last,
            **_tail(mean),
        }
        for name, collected in models.items()
        for slots, losses in collected.curves.items()
        for of, first, last, mean in losses.by_position()
    ]


def by_memory(models: Models, about: About) -> Lines:
    """Return the mean loss of each class of token with each number of memory slots, if several were tried.

    The difference from the loss with the model's own memory has a smaller error than either loss, since both losses are
    over the same tokens.
    """
    lines: Lines = []
    for name, collected in models.items():
        if len(collected.curves) < 2:
            continue
        own_slots, own = next(iter(collected.curves.items()))
        for slots, losses in sorted(collected.curves.items()):
            differences = replace(losses, losses=losses.losses - own.losses).by_class()
            for of, mean in losses.by_class().items():
                more = {"difference": differences[of].loss, "error of the difference": differences[of].error}
                lines.append({**_head(name, about, slots, of), "own": slots == own_slots, **_tail(mean), **more})
    return lines


def _head(name: str, about: About, slots: int, of: str) -> Dict[str, Any]:
    return {"model": name, "split": about.split, "documents": about.documents, "memory slots": slots, "class": of}


def _tail(mean: Mean) -> Dict[str, Any]:
    loss, error, tokens, documents = mean
    return {"loss": loss, "standard error": error, "tokens": tokens, "documents with some": documents}


def by_column(key: str, lines: Lines) -> Dict[Any, Lines]:
    """Group lines by the value of a column, in their order."""
    groups: Dict[Any, Lines] = {}
    for line in lines:
        groups.setdefault(line[key], []).append(line)
    return groups


def draw_by_position(plt: Any, lines: Lines) -> Any:
    """Draw a panel for each class, with a line for each model and length of its memory."""
    figure, panels = _panels(plt, lines)
    for axis, of_class in panels:
        for colour, (name, of_model) in enumerate(by_column("model", of_class).items()):
            for n, (slots, points) in enumerate(by_column("memory slots", of_model).items()):
                style = "-" if n == 0 else _DASHES[(n - 1) % len(_DASHES)]
                x = [(p["from"] * p["to"]) ** 0.5 for p in points]
                y, errors = [p["loss"] for p in points], [p["standard error"] for p in points]
                _line(axis, x, y, errors, f"{name}, {slots} slots", color=f"C{colour}", linestyle=style)
                if n == 0:
                    axis.axhline(_mean(points), color=f"C{colour}", linestyle=":", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("position in the document, tokens\n(bins 1, 2-3, 4-7, ...)")
    figure.axes[0].legend(fontsize=7, handlelength=4)
    _explain(figure, lines, "dotted: the mean over all positions, with the model's own memory")
    return figure


def draw_by_memory(plt: Any, lines: Lines) -> Any:
    """Draw a panel for each class, with a line for each model: the loss minus the loss with the model's own memory."""
    figure, panels = _panels(plt, lines)
    slots = sorted({line["memory slots"] for line in lines})
    for axis, of_class in panels:
        for colour, (name, points) in enumerate(by_column("model", of_class).items()):
            [own] = [point for point in points if point["own"]]
            label = f"{name}: {own['loss']:.3f} bits with {own['memory slots']} slots"
            x, y = [p["memory slots"] for p in points], [p["difference"] for p in points]
            _line(axis, x, y, [p["error of the difference"] for p in points], label, color=f"C{colour}")
            axis.axvline(own["memory slots"], color=f"C{colour}", linestyle=":", linewidth=0.8)
        axis.set_xscale("symlog", base=2, linthresh=1)
        axis.set_xlim(-0.3, 1.5 * slots[-1])
        axis.set_xticks(slots, [str(number) for number in slots], fontsize=8)
        axis.set_xlabel("memory, slots")
        axis.legend(fontsize=7)
    figure.axes[0].set_ylabel("loss minus that with the model's own\nmemory, bits a token")
    _explain(figure, lines, "dotted: the model's own memory, with which the legend gives its loss")
    return figure


def _panels(plt: Any, lines: Lines) -> Tuple[Any, Iterator[Tuple[Any, Lines]]]:
    classes = by_column("class", lines)
    figure, axes = plt.subplots(1, len(classes), figsize=(4 * len(classes), 4.2), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], classes, strict=True):
        axis.set_title(_CLASSES[name], fontsize=9)
    axes[0][0].set_ylabel("loss, bits a token")
    return figure, zip(axes[0], classes.values(), strict=True)


def _line(axis: Any, x: List[float], y: List[float], errors: List[Optional[float]], label: str, **style: Any) -> None:
    bars = [error or 0.0 for error in errors]
    axis.errorbar(x, y, bars, marker=".", markersize=4, label=label, capsize=2, elinewidth=0.8, **style)


def _mean(points: Lines) -> float:
    return float(sum(p["loss"] * p["tokens"] for p in points) / sum(p["tokens"] for p in points))


def _explain(figure: Any, lines: Lines, dotted: str) -> None:
    """Write an explanation of the lines and bars below the panels."""
    documents = max(line["documents with some"] for line in lines)
    several = any(line["standard error"] is not None for line in lines)
    bars = "bars: a standard error over documents" if several else "no bars, which need several documents"
    figure.supxlabel(f"{documents:,} documents: {lines[0]['documents']}; {bars}; {dotted}", fontsize=8)
