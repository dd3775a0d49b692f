"""Infini-attention's own options."""

# No postponed annotations: a host reads the types of the fields.
import math
from dataclasses import dataclass

from ...fields import option
from ..base import MemoryOptions


@dataclass(frozen=True)
class InfiniOptions(MemoryOptions):
    memory_update_rule: str = option(
        "linear",
        "linear adds a segment's values to a matrix of associations, delta adds the values' differences "
        "from the stored values of the same keys",
        ("linear", "delta"),
        fixed=True,
    )
    memory_gate_lr_scale: float = option(
        1.0,
        "a gate's beta as a multiple of the number learned, so that Adam moves beta by as many times --lr",
        fixed=True,
    )

    def check(self) -> None:
        if not 0 < self.memory_gate_lr_scale < math.inf:
            raise ValueError(f"--memory-gate-lr-scale is {self.memory_gate_lr_scale}, it must be above 0 and finite")
