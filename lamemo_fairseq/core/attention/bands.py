"""Attention within bands of pairs, which backends with a common function for all attentions take.

Shapes: B streams.
"""

from dataclasses import dataclass
from typing import List, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor

from .types import Attended, RelativeBias

UNBOUNDED = 1 << 30


class Band(NamedTuple):
    """The pairs that see each other, and the entries of the table that hold their distance.

    Query i sees key j if ``low <= j - i <= high``; the pair's entry of the table is ``shift + j - i``. It is at least 0
    for all pairs that see each other, also without a table: columns of score gradients are counted from it.
    """

    low: int
    high: int
    shift: int

    @property
    def limits(self) -> Tuple[int, int]:
        return max(self.low, -UNBOUNDED), min(self.high, UNBOUNDED)


@dataclass(frozen=True)
class BandedAttention:
    """The attention of some queries to some keys within a band. The first of a list reads all keys."""

    queries: slice
    keys: slice
    band: Band
    bias: RelativeBias
    first: Optional[Tensor] = None  # [B], the first key that is visible to a stream
    stored: Optional[Attended] = None  # merged with the new read-out
    eps: float = 0.0  # of the merge


def causal_band(
    positions: slice, queries: int, keys: int, bias: RelativeBias, span: Optional[int], nearest: int = 0
) -> BandedAttention:
    """Return the causal attention of the queries at *positions*, the last *queries* of *keys* positions."""
    past = keys - queries  # of query 0
    last = past - nearest
    band = Band(-UNBOUNDED if span is None else last - span + 1, last, queries - 1)
    return BandedAttention(positions, slice(0, keys), band, bias)


def grouped(biases: Sequence[Optional[Tensor]]) -> List[RelativeBias]:
    """Return the biases of several attentions from their fields, one after the other."""
    return [RelativeBias(*biases[n : n + 4]) for n in range(0, len(biases), 4)]
