"""Registers the task."""

from . import segment_language_modeling

__all__ = ["segment_language_modeling"]
