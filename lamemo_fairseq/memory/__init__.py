"""Memories by name, one folder each, and the memory of the streams being read."""

from . import empty, lookahead, recurrent  # noqa: F401  (each registers itself)
from .base import MEMORIES, Memory, MemoryConfig, MemoryState
from .incremental import SegmentCache
from .streams import DivergenceError, MissingMemoryError, StreamMemory

__all__ = [
    "MEMORIES",
    "DivergenceError",
    "Memory",
    "MemoryConfig",
    "MemoryState",
    "MissingMemoryError",
    "SegmentCache",
    "StreamMemory",
]
