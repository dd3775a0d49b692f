"""Where a batch of segments stands in its streams."""

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
    """Names the streams of a batch and its place in them.

    A plain value: it survives worker processes, and moving a batch to a device leaves it alone.
    """

    split: str  # the split that the streams come from
    epoch: int
    num_streams: int  # how many streams the split was cut into, over all ranks
    segment_length: int
    streams: Tuple[int, ...]  # the stream of each row
    index: int  # which segment of its stream, from 0
    last: bool = False  # whether the streams end with it
    ragged: bool = False  # whether some rows are padded on the right

    @property
    def reading(self) -> "Reading":
        """One pass over some streams, told from every other one."""
        return Reading(self.split, self.epoch, self.num_streams, self.segment_length, self.streams)

    def streams_but(self, fine: Tensor) -> List[int]:
        """The streams whose rows are not *fine*, ``[B]`` of booleans."""
        return [stream for stream, ok in zip(self.streams, fine.tolist(), strict=True) if not ok]

    def named_streams(self, streams: Optional[Sequence[int]] = None) -> str:
        """The streams of the batch, or some of them, for a message."""
        named = self.streams if streams is None else streams
        several = "streams" if len(named) > 1 else "stream"
        listed = f"{named[0]}..{named[-1]}" if len(named) > 8 else ", ".join(map(str, named))
        return f"{several} {listed}"


def real_tokens(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return booleans ``[B, N]``, True where ``tokens [B, N]`` in rows of *lengths* ``[B]`` are not padding."""
    return torch.arange(tokens.size(1), device=tokens.device) < lengths.unsqueeze(1)
