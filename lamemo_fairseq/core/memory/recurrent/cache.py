"""What decoding keeps of Transformer-XL's memory."""

from dataclasses import dataclass

from ...decoding.cache import SegmentCache


@dataclass
class RecurrentCache(SegmentCache):
    """Keys and values alone: those of a frozen slot stay what they were when it was a token."""
