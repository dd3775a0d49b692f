"""What decoding keeps without a memory."""

from dataclasses import dataclass

from ...decoding.cache import SegmentCache


@dataclass
class EmptyCache(SegmentCache):
    """Keys and values of the segment's own tokens; a new segment finds none."""
