"""Windows of keys that the slots look ahead at, by name.

Shapes: B streams, N current tokens, m memory slots.
"""

from typing import Callable, Dict, NamedTuple, Optional

from torch import Tensor


class LookaheadWindow(NamedTuple):
    """The key positions that the memory slots attend to when they look ahead.

    Slots stand at positions 0 .. m-1 and the first current token at m. The keys are the positions ``first .. m``;
    ``both_sides`` lets a slot see those on its left as well. There are as many keys as current tokens, at most
    m. A stream that ends before the others in its batch looks ahead at fewer keys.
    """

    first: int
    both_sides: bool
    lengths: Optional[Tensor] = None  # [B], current tokens that are not padding; None if none is padding

    def distances(self, slots: int) -> range:
        """Return the signed distances ``key - slot`` that *slots* slots meet, masked pairs left out."""
        return range(self.first - (slots - 1) if self.both_sides else 1, slots + 1)


def right_window(slots: int, current: int) -> LookaheadWindow:
    """Return the keys to the right of a slot, without those that it met in earlier segments: the last ``min(m, N)``."""
    return LookaheadWindow(first=slots - min(slots, current) + 1, both_sides=False)


def full_window(slots: int, current: int) -> LookaheadWindow:
    """Return the keys of `right_window`, on both sides of a slot (the paper's ablation)."""
    return LookaheadWindow(first=slots - min(slots, current) + 1, both_sides=True)


WINDOWS: Dict[str, Callable[[int, int], LookaheadWindow]] = {"right": right_window, "full": full_window}
