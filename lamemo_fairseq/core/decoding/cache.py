"""What token-by-token decoding keeps: keys and values of the slots and of the segment's tokens so far.

Every row has its own place in its segment, so that prompts of any lengths share a batch. Column c of a buffer
holds a slot if c < M and the segment's token c - M otherwise; slots stand next to the tokens, at the right end of
the first M columns. Buffers are written in place and never grow, so that a step can be replayed as a graph.

Shapes: B rows, N tokens of a segment, m <= M memory slots, H heads, D size of a head, d model width, k new tokens.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..kernels.copies import copy_all
from ..positions import PositionEncoding
from .attention import Columns


class Place(NamedTuple):
    """Where one row stands."""

    tokens: int = 0  # of its segment that it has read, less than N
    slots: int = 0  # m
    open: bool = False  # whether the slots are ready for this segment
    compressed: int = 0  # how many of the slots, the oldest, stand for several rows each


class Network(NamedTuple):
    """What a memory's rows pass through."""

    memory: Any  # a `Memory`
    layers: Sequence[nn.Module]
    positions: PositionEncoding


class Record(NamedTuple):
    """What a layer has to do with a memory besides attending to its slots; None leaves a part out."""

    outputs: Optional[Tensor] = None  # [B, H, M + N, D], to write the read-outs in, before the output projection
    normalizers: Optional[Tensor] = None  # [B, H, M + N], to write their normalisers in; where there are outputs
    inputs: Optional[Tensor] = None  # [B, M + N, d], to write the rows in that go into the layer
    context: Any = None  # what `SelfAttention.combine` adds to the read-outs


@dataclass
class SegmentCache:
    """Base of all caches, and the whole of one whose slots are frozen.

    A memory that refreshes its slots overrides `open`, and `record` for what the refresh needs of the tokens.
    """

    keys: List[Tensor]  # a layer: [B, H, M + N, D]
    values: List[Tensor]
    tokens: Tensor  # [B] int64, as in `places`
    slots: Tensor  # [B] int64, as in `places`
    places: List[Place] = field(default_factory=list)

    # Fields besides keys and values with one column a slot or token, and the dimension of the columns.
    columns: ClassVar[Dict[str, int]] = {}

    # Whether `open` does something, and in tensor operations only, so that it can be replayed as a graph.
    replayable: ClassVar[bool] = False

    @classmethod
    def empty(cls, memory: Any, rows: int, like: Tensor) -> "SegmentCache":
        """The cache of *rows* texts of which nothing has been read; *like* gives device and dtype."""
        config = memory.config
        size = (rows, config.heads, memory.slots + memory.period, config.head_dim)
        return cls(
            keys=[like.new_zeros(size) for _ in range(config.layers)],
            values=[like.new_zeros(size) for _ in range(config.layers)],
            tokens=torch.zeros(rows, dtype=torch.int64, device=like.device),
            slots=torch.zeros(rows, dtype=torch.int64, device=like.device),
            places=[Place()] * rows,
        )

    def open(self, rows: Optional[Tensor], slots: int, first: Tensor, network: Network) -> None:
        """Make the slots ready for a new segment.

        Args:
            rows: ``[b]`` the rows that begin one, None for all.
            slots: m, at least 1, the same for all of them.
            first: ``[b, 1, d]`` the segments' first embeddings.
        """

    def kept_embeddings(self) -> Optional[Tensor]:
        """``[B, M + N, d]``, where tokens' embeddings are kept for the next refresh; None if it needs none."""
        return None

    def record_embeddings(self, embeddings: Tensor, columns: Columns) -> None:
        """Keep new embeddings ``[B, k, d]`` where the next refresh needs them."""
        kept = self.kept_embeddings()
        if kept is not None:
            columns.put(kept, embeddings, 1)

    def record(self, layer: int) -> Record:
        """What a layer records of the tokens, or adds to them."""
        return Record()

    def close(self, rows: Optional[Tensor], slots: int, network: Network) -> None:
        """The segment of *rows*, which had *slots* slots, is full: its last columns become the slots.

        As many of them were compressed in all these rows; `places` still holds where they stood.
        """
        mem_len = network.memory.slots
        for dim, buffers in ((2, self.keys), (2, self.values), *self._recorded()):
            for buffer in buffers:
                kept = take(buffer, rows).narrow(dim, buffer.size(dim) - mem_len, mem_len).clone()
                put(buffer.narrow(dim, 0, mem_len), rows, kept)

    def following(self, place: Place, network: Network) -> Place:
        """Where a row that stood at *place* stands when its segment is full."""
        return Place(0, min(network.memory.slots, place.slots + network.memory.period), False)

    def advance(self, counts: Sequence[int], network: Network, counted: bool = False) -> None:
        """Row b has read ``counts[b]`` more tokens; segments that are full are closed.

        With *counted*, `tokens` has been told already.
        """
        segment_length = network.memory.period
        full: Dict[Tuple[int, int], List[int]] = {}
        for b, count in enumerate(counts):
            if self.places[b].tokens + count == segment_length:
                full.setdefault((self.places[b].slots, self.places[b].compressed), []).append(b)
        for (slots, _), rows in full.items():
            self.close(self.index(rows), slots, network)
        for b, count in enumerate(counts):
            place = self.places[b]
            if place.tokens + count == segment_length:
                self.places[b] = self.following(place, network)
            elif count:
                self.places[b] = place._replace(tokens=place.tokens + count)
        if full or min(counts) < max(counts):
            self.sync()
        elif not counted:  # the host need not tell the device anything
            self.tokens.add_(counts[0])

    def sync(self) -> None:
        """Bring the device's places in line with the host's."""
        self.tokens.copy_(torch.tensor([p.tokens for p in self.places]))
        self.slots.copy_(torch.tensor([p.slots for p in self.places]))

    def index(self, rows: Sequence[int]) -> Optional[Tensor]:
        """Rows as an index, None if they are all."""
        return None if len(rows) == len(self.places) else torch.tensor(rows, device=self.tokens.device)

    def reorder(self, order: Tensor) -> None:
        """Row i goes on from what row ``order[i]`` has read; rows may be repeated and left out."""
        rows = order.tolist()
        if rows == list(range(len(self.places))):
            return
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                setattr(self, f.name, value.index_select(0, order))
            elif f.name != "places":
                setattr(self, f.name, [t.index_select(0, order) for t in value])
        self.places = [self.places[row] for row in rows]

    def copy_(self, other: "SegmentCache") -> None:
        """Hold what *other*, of the same sizes, holds."""
        copy_all(self._tensors(), other._tensors())
        self.places = list(other.places)

    def size(self) -> int:
        """Bytes that are kept."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def _tensors(self) -> List[Tensor]:
        return [t for f in fields(self) for t in _tensors(getattr(self, f.name))]

    def _recorded(self) -> List[Any]:
        return [(dim, _tensors(getattr(self, name))) for name, dim in self.columns.items()]


def take(buffer: Tensor, rows: Optional[Tensor]) -> Tensor:
    """What a buffer ``[B, ..]`` holds of *rows* ``[b]``, None for all of them, which is then no copy."""
    return buffer if rows is None else buffer[rows]


def put(buffer: Tensor, rows: Optional[Tensor], new: Tensor) -> None:
    """Write ``new [b, ..]`` into *rows* of a buffer ``[B, ..]``, in place."""
    buffer.copy_(new) if rows is None else buffer.index_copy_(0, rows, new.to(buffer.dtype))


def _tensors(value: Any) -> List[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)]
