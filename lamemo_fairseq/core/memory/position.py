"""The position of a batch of segments in its streams.

Shapes: B streams, N tokens of a segment.
"""

from dataclasses import dataclass
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor


class Reading(NamedTuple):
    """One pass over some streams of a split."""

    split: str
    epoch: int
    num_streams: int
    segment_length: int
    streams: Tuple[int, ...]


@dataclass(frozen=True)
class SegmentPosition:
    """Names the streams of a batch and its position in them.

    It is a plain value: it survives worker processes, and moving a batch to a device leaves it alone.
    """

    split: str  # the split that the streams come from
    epoch: int
    num_streams: int  # streams that the split was cut into, over all ranks
    segment_length: int
    streams: Tuple[int, ...]  # the stream of each entry of the batch
    index: int  # number of the segment in its stream, from 0
    last: bool = False  # the streams end with this segment
    ragged: bool = False  # some streams are padded on the right
    cleared: Tuple[int, ...] = ()  # entries of the batch whose memory is cleared before the segment
    ended: Tuple[int, ...] = ()  # entries that have no tokens from this segment on

    @property
    def reading(self) -> Reading:
        """The pass over the streams that this batch is part of."""
        return Reading(self.split, self.epoch, self.num_streams, self.segment_length, self.streams)

    def streams_but(self, fine: Tensor) -> List[int]:
        """Return the streams that are False in ``fine [B]``."""
        return [stream for stream, ok in zip(self.streams, fine.tolist(), strict=True) if not ok]

    def named_streams(self, streams: Optional[Sequence[int]] = None) -> str:
        """Return the words for the streams of the batch, or for some of them, in a message."""
        named = self.streams if streams is None else streams
        several = "streams" if len(named) > 1 else "stream"
        listed = f"{named[0]}..{named[-1]}" if len(named) > 8 else ", ".join(map(str, named))
        return f"{several} {listed}"


def real_tokens(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return booleans ``[B, N]``, True where ``tokens [B, N]`` of *lengths* ``[B]`` are not padding."""
    return torch.arange(tokens.size(1), device=tokens.device) < lengths.unsqueeze(1)
