"""Continuing prompts and scoring texts, with the memory cached."""

from .. import needs_fairseq  # noqa: F401
from .generator import PromptGenerator
from .hub import LanguageModelHub
from .prompts import PromptDataset
from .scorer import StreamingScorer

__all__ = ["LanguageModelHub", "PromptDataset", "PromptGenerator", "StreamingScorer"]
