"""Write names of lines beside their ends, in their colours, instead of a legend."""

import math
from statistics import mean
from typing import Any, List, Sequence, Tuple

SIZE = 8.0  # points


def label_ends(axis: Any, named: Sequence[Tuple[str, Any]]) -> None:
    """Write each name beside the last finite point of its line, moved apart where names would overlap.

    Names of lines without such a point stand above the axis. The axis needs its final limits and scale: call this last.
    """
    missing = [name for name, line in named if _last_point(line) is None]
    if missing:
        axis.set_title(f"no finite value: {', '.join(missing)}", fontsize=SIZE, loc="left")
    axis.figure.draw_without_rendering()  # the layout decides the height of an axis
    ends = [(name, line, end) for name, line in named if (end := _last_point(line)) is not None]
    ends.sort(key=lambda end: _height(axis, end[2]))
    gap = 1.3 * SIZE / 72 * axis.figure.dpi / axis.get_window_extent().height
    heights = _apart([_height(axis, point) for _, _, point in ends], gap)
    for (name, line, point), height in zip(ends, heights, strict=True):
        axis.annotate(
            name,
            point,
            (1.06, height),
            textcoords="axes fraction",
            annotation_clip=False,
            va="center",
            fontsize=SIZE,
            color=line.get_color(),
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.6, "relpos": (0, 0.5)},
        )


def _last_point(line: Any) -> Any:
    points = zip(line.get_xdata(), line.get_ydata(), strict=True)
    finite = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    return finite[-1] if finite else None


def _height(axis: Any, point: Tuple[float, float]) -> float:
    """Return the height of a point as a fraction of the axis."""
    return float(axis.transAxes.inverted().transform(axis.transData.transform(point))[1])


def _apart(heights: Sequence[float], gap: float) -> List[float]:
    """Move ascending heights at least *gap* apart, as little as possible, and into the axis if there is room."""
    clusters: List[List[float]] = []  # names that touch: the lowest height at which each would stand alone
    for i, height in enumerate(heights):
        clusters.append([height - i * gap])
        while len(clusters) > 1 and mean(clusters[-2]) > mean(clusters[-1]):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    lowest = [mean(cluster) for cluster in clusters for _ in cluster]
    room = max(0.0, 1.0 - gap * (len(lowest) - 1))
    return [min(max(low, 0.0), room) + i * gap for i, low in enumerate(lowest)]
