"""Write attention, mixing weights and losses of models as CSV files and, with matplotlib, as pictures."""

import csv
import io
import logging
import math
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any, Dict, List, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import document_report
from .collect import Collected
from .document_report import About, Lines, Models, by_column

# Figure 1 of the LaMemo paper, read off the picture to within 3%: mean attention at the given offset into the context.
# Its points are BIN apart.
BIN = 5
OFFSETS = (-100, -80, -65, -50, -40, -30, -20, -15, -10, -5)
PAPER: Dict[str, Sequence[float]] = {
    "LaMemo (paper)": (0.0128, 0.0122, 0.0111, 0.0114, 0.0119, 0.0127, 0.0157, 0.0198, 0.0258, 0.055),
    "Transformer-XL (paper)": (0.0058, 0.0063, 0.0072, 0.0081, 0.0092, 0.0111, 0.0145, 0.0189, 0.0283, 0.09),
}

BLOCKS = 32  # points that the losses by position are averaged to in the picture


def tabulate(models: Models, about: About, paper: bool) -> Dict[str, Lines]:
    """Return the lines of every CSV file, by the names of the files.

    *paper*: add the points of the paper's Figure 1.
    """
    return {
        "attention_by_distance": attention_by_distance(models),
        "attention_by_slot": attention_by_slot(models),
        "figure1": figure1(models, paper),
        "alpha": alpha(models),
        "loss_by_position": loss_by_position(models),
        "loss_by_document_position": document_report.by_position(models, about),
        "loss_by_memory": document_report.by_memory(models, about),
    }


def save(tables: Mapping[str, Lines], folder: Path, about: About) -> List[Path]:
    """Write CSV files, and pictures where matplotlib is installed, over those of former models; return the files.

    Raises:
        OSError: a file cannot be written; the former files are then unchanged.
    """
    contents = csv_files(tables)
    try:
        contents.update(draw(tables, about))
    except ImportError:
        print("no pictures: they need matplotlib (pip install matplotlib)", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder, prefix="unfinished-") as unfinished:
        for name, content in contents.items():
            try:
                Path(unfinished, name).write_bytes(content)
            except OSError as error:  # the error of a full disk names no file
                raise OSError(
                    f"{folder / name} cannot be written: {error.strerror}; {folder} is left as it was"
                ) from error
        files = [Path(unfinished, name).replace(folder / name) for name in contents]
    for former in (folder / f"{name}{suffix}" for name in tables for suffix in (".csv", ".svg", ".png")):
        if former.name not in contents:
            former.unlink(missing_ok=True)
    return files


def csv_files(tables: Mapping[str, Lines]) -> Dict[str, bytes]:
    """Return tables that have lines as CSV, by the names of the files."""
    files = {}
    for name, lines in tables.items():
        if lines:
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
            files[f"{name}.csv"] = text.getvalue().encode()
    return files


def attention_by_distance(models: Models) -> Lines:
    """Return the mean weight of a key by its distance behind the query: over all layers, and of each layer."""
    return _by_layer(models, "by_distance", "distance")


def attention_by_slot(models: Models) -> Lines:
    """Return the mean weight of a memory slot by its offset from the segment, -1 being the youngest."""
    return _by_layer(models, "by_slot", "offset")


def figure1(models: Models, paper: bool) -> Lines:
    """Return the mean attention in bins of five, by offset into the memory and by distance from the query.

    The offset of a bin is that of its farthest key: -5 stands for the offsets -5 .. -1. The weights of a bin are added
    up. If each point of the paper stood for one key, attention would add up to more than there is. The points of the
    *paper*, which are of WikiText-103, are in both columns, since the paper may mean either.
    """
    lines = []
    for name, collected in models.items():
        by_slot, by_distance = _weights(collected, "by_slot")[0], _weights(collected, "by_distance")[0]
        for offset in range(-OFFSETS[0] // BIN * -BIN, 0, BIN):
            line: Dict[str, Any] = {"model": name, "offset": offset, "into memory": None, "from the query": None}
            if -offset <= len(by_slot):
                line["into memory"] = float(by_slot[len(by_slot) + offset :][:BIN].sum())
            if -offset < len(by_distance):
                line["from the query"] = float(by_distance[-offset - BIN + 1 : -offset + 1].sum())
            lines.append(line)
    for name, values in (PAPER if paper else {}).items():
        for offset, value in zip(OFFSETS, values, strict=True):
            lines.append({"model": name, "offset": offset, "into memory": value, "from the query": value})
    return lines


def alpha(models: Models) -> Lines:
    """Return the mean share that a slot keeps of its former content, by layer and segments since it was written."""
    lines = []
    for name, collected in models.items():
        for layer in collected.mixing_layers:
            for age, value in enumerate(collected.mixing.by_age(layer, collected.segment_length).tolist(), start=1):
                lines.append({"model": name, "layer": layer + 1, "age": age, "alpha": value})
    return lines


def loss_by_position(models: Models) -> Lines:
    """Return the mean loss in bits of the tokens at each position in the segment, from 1."""
    lines = []
    for name, collected in models.items():
        counts = collected.losses.counts.tolist()
        for position, bits in enumerate(collected.losses.by_position().tolist(), start=1):
            if counts[position - 1]:
                lines.append({"model": name, "position": position, "loss": bits, "tokens": counts[position - 1]})
    return lines


def _by_layer(models: Models, what: str, column: str) -> Lines:
    lines = []
    for name, collected in models.items():
        weights = _weights(collected, what)
        names = ["mean", *(f"layer {layer + 1}" for layer in collected.attending_layers)]
        first = 0 if what == "by_distance" else -weights.size(1)
        for i, values in enumerate(weights.T.tolist(), start=first):
            known = {of: None if math.isnan(value) else value for of, value in zip(names, values, strict=True)}
            lines.append({"model": name, column: i, **known})
    return _same_columns(lines)


def _same_columns(lines: Lines) -> Lines:
    columns = list(dict.fromkeys(column for line in lines for column in line))
    return [{column: line.get(column) for column in columns} for line in lines]


def _weights(collected: Collected, what: str) -> Tensor:
    """Return mean weights *by_distance* or *by_slot*: over all layers, then of each layer, ``[1 + L, K]``.

    A layer with a store may have more keys than others, which have NaN there. The mean by distance is over the layers
    that have a key there. By slot it is over all layers, so that slots add up to the memory's share of attention.
    """
    layers = [getattr(collected.attention, what)(layer) for layer in collected.attending_layers]
    if not layers:
        return torch.empty(1, 0)
    missing = [max(map(len, layers)) - len(layer) for layer in layers]
    ends = [(0, n) if what == "by_distance" else (n, 0) for n in missing]  # all layers have the youngest keys
    weights = torch.stack([F.pad(layer, end, value=math.nan) for layer, end in zip(layers, ends, strict=True)])
    mean_weights = weights.nanmean(0) if what == "by_distance" else weights.nan_to_num(0).mean(0)
    return torch.cat([mean_weights.unsqueeze(0), weights])


def draw(tables: Mapping[str, Lines], about: About) -> Dict[str, bytes]:
    """Draw the figures as SVG and PNG, by the names of the files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "analysis"  # the same numbers always give the same file
    from matplotlib import pyplot as plt

    drawn = {
        "figure1": ("Attention by offset, mean of layers, heads and queries", _draw_figure1),
        "loss_by_position": ("Loss by position in the segment", _draw_losses),
        "alpha": ("Refreshed memory slots, mean of heads", _draw_alpha),
        "loss_by_document_position": ("Loss by position in the document", document_report.draw_by_position),
        "loss_by_memory": ("Loss by length of the memory", document_report.draw_by_memory),
    }
    files = {}
    for name, (title, of) in drawn.items():
        if not tables[name]:
            continue
        figure = of(plt, tables[name])
        figure.suptitle(f"{title}\n{about.split}", fontsize=10)  # apart, since paths are long, and some pictures narrow
        figure.tight_layout()
        for kind, metadata in (("svg", {"Date": None}), ("png", {})):
            picture = io.BytesIO()
            figure.savefig(picture, format=kind, dpi=150, metadata=metadata)
            files[f"{name}.{kind}"] = picture.getvalue()
        plt.close(figure)
    return files


def _draw_figure1(plt: Any, lines: Lines) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True)
    columns = ("into memory", "from the query")
    seen = [line for line in lines if any(line[column] is not None for column in columns)]
    for axis, column in zip(axes, columns, strict=True):
        # Each model is plotted in both panels, even without points: then its colour is the same, and the legend has all
        # names.
        for name, of_model in by_column("model", seen).items():
            points = [line for line in of_model if line[column] is not None]
            marker = {"LaMemo (paper)": "^", "Transformer-XL (paper)": "v"}.get(name, ".")
            style = {"color": "k", "linestyle": ":"} if name in PAPER else {}
            x, y = [p["offset"] for p in points], [p[column] for p in points]
            axis.plot(x, y, marker=marker, label=name, markersize=4, **style)
        axis.set_xlabel(f"offset {column}, tokens")
    axes[0].set_yscale("log")
    axes[0].set_ylabel(f"mean share of attention\nof {BIN} keys together")
    axes[0].legend(fontsize=8)
    if any(name in PAPER for name in by_column("model", lines)):
        axes[1].set_title("dotted: Figure 1 of the paper, also of WikiText-103", fontsize=8)
    return figure


def _draw_losses(plt: Any, lines: Lines) -> Any:
    figure, axis = plt.subplots(figsize=(6, 3.5))
    sizes = set()
    for name, of_model in by_column("model", lines).items():
        block = -(-len(of_model) // BLOCKS)
        sizes.add(str(block))
        blocks = [of_model[i : i + block] for i in range(0, len(of_model), block)]
        positions = [mean(line["position"] for line in group) for group in blocks]
        axis.plot(
            positions, [_loss(group) for group in blocks], marker=".", label=f"{name}, mean {_loss(of_model):.3f}"
        )
    several = f", mean of {' or '.join(sorted(sizes, key=int))}" if sizes != {"1"} else ""
    axis.set_xlabel(f"position in the segment{several}")
    axis.set_ylabel("loss, bits a token")
    axis.legend(fontsize=8)
    return figure


def _loss(lines: Lines) -> float:
    return sum(line["loss"] * line["tokens"] for line in lines) / sum(line["tokens"] for line in lines)


def _draw_alpha(plt: Any, lines: Lines) -> Any:
    models = by_column("model", lines)
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 3.5), squeeze=False)
    for axis, (name, of_model) in zip(axes[0], models.items(), strict=True):
        for age, of_age in by_column("age", of_model).items():
            axis.plot([p["layer"] for p in of_age], [p["alpha"] for p in of_age], marker=".", label=str(age))
        layers = list(by_column("layer", of_model))
        axis.set_xlabel(f"layer, 1 reads the embeddings\n(those that mix: {layers[0]} to {layers[-1]})")
        axis.set_ylabel("alpha: share that a slot keeps\nof what it held")
        axis.set_ylim(0, 1)
        axis.set_title(name, fontsize=10)
        axis.set_xticks(layers)
        axis.legend(title="segments since written", fontsize=7, title_fontsize=7)
    return figure
