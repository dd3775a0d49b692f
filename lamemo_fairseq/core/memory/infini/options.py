"""Infini-attention's own options."""

# No postponed annotations: a host reads the types of the fields.
from dataclasses import dataclass

from ...fields import option
from ..base import MemoryOptions

UPDATE_RULES = ("linear", "delta")


@dataclass(frozen=True)
class InfiniOptions(MemoryOptions):
    memory_update_rule: str = option(
        "linear",
        "values that a segment adds to a matrix of associations: its own, or with delta their differences "
        "from those that its keys read",
        UPDATE_RULES,
    )

    def check(self) -> None:
        if str(self.memory_update_rule) not in UPDATE_RULES:
            known = ", ".join(UPDATE_RULES)
            raise ValueError(f"unknown --memory-update-rule '{self.memory_update_rule}'; the known ones are {known}")
