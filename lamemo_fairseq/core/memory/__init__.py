"""Memories by name, one folder each, and the memory of the streams being read."""

import importlib
import pkgutil

from ..decoding.cache import FrozenCache, SegmentCache
from .base import MEMORIES, Architecture, Memory, MemoryConfig, MemoryOptions, Passage
from .state import MemoryState
from .streams import DivergenceError, MissingMemoryError, StreamMemory

__all__ = [
    "MEMORIES",
    "Architecture",
    "DivergenceError",
    "FrozenCache",
    "Memory",
    "MemoryConfig",
    "MemoryOptions",
    "MemoryState",
    "MissingMemoryError",
    "Passage",
    "SegmentCache",
    "StreamMemory",
]

for _module in pkgutil.iter_modules(__path__):
    if _module.ispkg:  # a memory, which registers itself
        importlib.import_module(f"{__name__}.{_module.name}")
