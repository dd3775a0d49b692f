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
        "linear adds a segment's values to a matrix of associations, delta adds the values' differences "
        "from the stored values of the same keys",
        UPDATE_RULES,
    )

    def check(self) -> None:
        if str(self.memory_update_rule) not in UPDATE_RULES:
            known = ", ".join(UPDATE_RULES)
            raise ValueError(f"unknown --memory-update-rule '{self.memory_update_rule}'; the known ones are {known}")
