"""The look-ahead memory's own options."""

# No postponed annotations: a host reads the types of the fields.
from dataclasses import dataclass

from ...fields import option
from ..base import MemoryOptions
from .windows import WINDOWS


@dataclass(frozen=True)
class LookaheadOptions(MemoryOptions):
    lookahead_window: str = option("right", "side of a memory slot that it looks at: its right, or both", list(WINDOWS))

    def check(self) -> None:
        if str(self.lookahead_window) not in WINDOWS:
            known = ", ".join(WINDOWS)
            raise ValueError(f"unknown --lookahead-window '{self.lookahead_window}'; the known ones are {known}")
