"""Registers the task."""

from .. import needs_fairseq  # noqa: F401
from . import segment_language_modeling

__all__ = ["segment_language_modeling"]
