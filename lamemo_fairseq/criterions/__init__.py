"""Losses."""

from . import chunked_cross_entropy

__all__ = ["chunked_cross_entropy"]
