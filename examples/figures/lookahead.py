"""Draw who attends to whom in one segment of LaMemo: `python examples/figures/lookahead.py lookahead.svg`."""

import sys

try:
    import matplotlib
except ModuleNotFoundError:
    sys.exit("pictures need matplotlib: pip install matplotlib")

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

SLOTS, CURRENT = 4, 4
MEMORY, TOKEN, PAST, AHEAD = "#dbe7f5", "#fbe5c8", "#8a8f98", "#c0392b"


def draw(path: str) -> None:
    figure, axes = plt.subplots(figsize=(9, 4.3))
    for i in range(SLOTS + CURRENT):
        slot = i < SLOTS
        box = FancyBboxPatch((i - 0.36, -0.3), 0.72, 0.6, boxstyle="round,pad=0.04", linewidth=1, edgecolor="#444444")
        box.set_facecolor(MEMORY if slot else TOKEN)
        axes.add_patch(box)
        name = f"$m_{{{i + 1}}}$" if slot else f"$x_{{{i - SLOTS + 1}}}$"
        axes.text(i, 0, name, ha="center", va="center", fontsize=13)
    for query in range(SLOTS, SLOTS + CURRENT):
        for key in range(query):
            arc(axes, query, key, above=True, color=PAST)
    for slot in range(SLOTS):
        for key in range(slot + 1, SLOTS + 1):
            arc(axes, slot, key, above=False, color=AHEAD)
    axes.set_title("One segment of LaMemo: who attends to whom", fontsize=12)
    axes.text(3.5, 2.45, "causal attention: current tokens $x$ look back", color="#5d626b", fontsize=11, ha="center")
    axes.text(1.6, -1.75, "look-ahead attention: memory slots $m$ look forward,", color=AHEAD, fontsize=11, ha="center")
    axes.text(1.6, -2.15, "up to the first current token", color=AHEAD, fontsize=11, ha="center")
    axes.text(6.0, -1.15, "a slot mixes what it held, $o$, with what it saw, $c$", fontsize=11, ha="center")
    axes.text(6.0, -1.65, r"$o \leftarrow \alpha\,o + (1-\alpha)\,c$", fontsize=13, ha="center")
    axes.text(6.0, -2.15, r"one $\alpha$ a slot and head, in every layer but the last", fontsize=11, ha="center")
    axes.set_xlim(-0.7, SLOTS + CURRENT - 0.3)
    axes.set_ylim(-2.4, 3.0)
    axes.set_axis_off()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def arc(axes, start: int, end: int, above: bool, color: str) -> None:
    y = 0.36 if above else -0.36
    bow = 0.4 if start > end else -0.4  # away from the boxes, whichever way the arrow points
    bow = bow if above else -bow
    arrow = FancyArrowPatch(
        (start, y), (end, y), connectionstyle=f"arc3,rad={bow}", arrowstyle="-|>", mutation_scale=9, color=color, lw=0.9
    )
    axes.add_patch(arrow)


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "lookahead"
    draw(sys.argv[1] if len(sys.argv) > 1 else "lookahead.svg")
