"""The look-ahead memory's own options."""

# No postponed annotations: fairseq turns these dataclasses into a parser.
from dataclasses import dataclass, field

from fairseq.dataclass import ChoiceEnum

from ..base import MemoryOptions
from .windows import WINDOWS


@dataclass
class LookaheadOptions(MemoryOptions):
    lookahead_window: ChoiceEnum(list(WINDOWS)) = field(  # type: ignore[valid-type]
        default="right", metadata={"help": "which side of a memory slot it looks ahead at"}
    )

    def check(self) -> None:
        if str(self.lookahead_window) not in WINDOWS:
            known = ", ".join(WINDOWS)
            raise ValueError(f"unknown --lookahead-window '{self.lookahead_window}'; the known ones are {known}")
