"""The memory tokens' own options."""

# No postponed annotations: fairseq turns these dataclasses into a parser.
from dataclasses import dataclass, field

from ...names import option_name
from ..base import MemoryOptions


@dataclass
class TokenOptions(MemoryOptions):
    memory_tokens: int = field(default=10, metadata={"help": "memory tokens K that are read before a segment"})
    memory_reads_cache: bool = field(
        default=False, metadata={"help": "let memory tokens attend to the --mem-len cached rows too"}
    )
    bptt_segments: int = field(
        default=1,
        metadata={
            "help": "segments that --tokens-per-sample is read in, gradient flowing between them through the memory "
            "tokens (1: none, so that only what reads memory tokens is trained, not what writes them)"
        },
    )

    def check(self) -> None:
        for name in ("memory_tokens", "bptt_segments"):
            if getattr(self, name) < 1:
                raise ValueError(f"{option_name(name)} is {getattr(self, name)}, it must be at least 1")
