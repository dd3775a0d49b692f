"""The associative memory's own options."""

# No postponed annotations: a host reads the types of the fields.
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

    def check(self) -> None:
        for name, value in (("tokens", self.associative_tokens), ("dim", self.associative_dim)):
            if value < 1:
                raise ValueError(f"--associative-{name} is {value}, it must be at least 1")
        if not 0 < self.associative_decay <= 1:
            raise ValueError(f"--associative-decay is {self.associative_decay}, it must be above 0 and at most 1")
