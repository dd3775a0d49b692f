"""Windows of keys that the slots look ahead at, by name."""

from typing import Callable, Dict

from ...attention import LookaheadWindow


def right_window(slots: int, current: int) -> LookaheadWindow:
    """Return the keys to the right of a slot, but those it met in earlier segments: the last ``min(m, N)``."""
    return LookaheadWindow(first=slots - min(slots, current) + 1, both_sides=False)


def full_window(slots: int, current: int) -> LookaheadWindow:
    """Return the keys of `right_window`, on both sides of a slot (the paper's ablation)."""
    return LookaheadWindow(first=slots - min(slots, current) + 1, both_sides=True)


WINDOWS: Dict[str, Callable[[int, int], LookaheadWindow]] = {"right": right_window, "full": full_window}
