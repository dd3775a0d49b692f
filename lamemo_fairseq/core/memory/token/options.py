"""The memory tokens' own options."""

# No postponed annotations: a host reads the types of the fields.
from dataclasses import dataclass

from ...fields import option
from ...names import option_name
from ..base import MemoryOptions


@dataclass(frozen=True)
class TokenOptions(MemoryOptions):
    memory_tokens: int = option(10, "memory tokens K that are read before a segment")
    memory_reads_cache: bool = option(False, "let memory tokens attend to the --mem-len cached rows too")
    bptt_segments: int = option(
        1,
        "segments that --tokens-per-sample is read in, gradient flowing between them through the memory "
        "tokens (1: none, so that only what reads memory tokens is trained, not what writes them)",
    )

    def check(self) -> None:
        for name in ("memory_tokens", "bptt_segments"):
            if getattr(self, name) < 1:
                raise ValueError(f"{option_name(name)} is {getattr(self, name)}, it must be at least 1")
