"""Memories for language models, with their layers, kernels and exact state. It needs torch alone."""

from .names import hiding_folder

if (_folder := hiding_folder(__path__[0])) is not None:  # it would break the imports below
    raise ValueError(f"{_folder} hides {_folder.name}.py beside it, a module of this package: rename the folder")

from .config import ModelConfig
from .memory import MEMORIES, DivergenceError, MemoryState, Passage, StreamMemory
from .memory.groups import advance
from .model import LanguageModel
from .positions import POSITIONS
from .reader import Reader, Score, Token
from .text import TextEncoding, Tokenizer

__all__ = [
    "MEMORIES",
    "POSITIONS",
    "DivergenceError",
    "LanguageModel",
    "MemoryState",
    "ModelConfig",
    "Passage",
    "Reader",
    "Score",
    "StreamMemory",
    "TextEncoding",
    "Token",
    "Tokenizer",
    "advance",
]
