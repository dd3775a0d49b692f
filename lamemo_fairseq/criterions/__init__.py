"""Losses."""

from .. import needs_fairseq  # noqa: F401
from . import chunked_cross_entropy

FAIRSEQ_CRITERIONS = ("adaptive_loss", "cross_entropy", "label_smoothed_cross_entropy")
"""fairseq's criterions that score every token of a segment by itself."""

__all__ = ["FAIRSEQ_CRITERIONS", "chunked_cross_entropy"]
