"""The associative memory's own options."""

# No postponed annotations: a host reads the types of the fields.
import math
from dataclasses import dataclass

from ...fields import option
from ..base import MemoryOptions


@dataclass(frozen=True)
class AssociativeOptions(MemoryOptions):
    associative_tokens: int = option(16, "memory tokens m behind every segment, from which a layer's matrix is written")
    associative_dim: int = option(64, "width of the keys of a layer's matrix, which has six times as many rows")
    associative_decay: float = option(
        1.0,
        "factor on a layer's matrix and normaliser before every write, so that old segments fade (the paper: 1)",
        fixed=True,
    )
    associative_value_lr_scale: float = option(
        1.0,
        "W_V, the map of values, as a multiple of the numbers learned, so that Adam moves it by as many times --lr",
        fixed=True,
    )

    def check(self) -> None:
        for name, value in (("tokens", self.associative_tokens), ("dim", self.associative_dim)):
            if value < 1:
                raise ValueError(f"--associative-{name} is {value}, it must be at least 1")
        if not 0 < self.associative_decay <= 1:
            raise ValueError(f"--associative-decay is {self.associative_decay}, it must be above 0 and at most 1")
        if not 0 < self.associative_value_lr_scale < math.inf:
            raise ValueError(
                f"--associative-value-lr-scale is {self.associative_value_lr_scale}, it must be above 0 and finite"
            )
