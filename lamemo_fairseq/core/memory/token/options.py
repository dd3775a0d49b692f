"""The memory tokens' own options."""

# No postponed annotations: a host reads the types of the fields.
from dataclasses import dataclass

from ...fields import option
from ..base import MemoryOptions


@dataclass(frozen=True)
class TokenOptions(MemoryOptions):
    memory_tokens: int = option(10, "memory tokens K that are read before a segment")
    memory_reads_cache: bool = option(False, "let memory tokens attend to the --mem-len cached rows too", fixed=True)

    def check(self) -> None:
        if self.memory_tokens < 1:
            raise ValueError(f"--memory-tokens is {self.memory_tokens}, it must be at least 1")
