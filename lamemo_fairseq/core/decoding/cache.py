"""The cache of token-by-token decoding: keys and values of the memory slots and of the segment's tokens so far.

Every row has its own position in its segment, so that prompts of any lengths share a batch. Column c of a buffer
belongs to a slot if c < M and to the segment's token c - M otherwise; slots stand next to the tokens, at the right end
of the first M columns. Buffers are written in place and never grow, so that a step can be replayed as a graph.

Shapes: B rows, b of them, N tokens of a segment, m <= M memory slots, C = M + N columns, H heads, D size of a head,
d model width, k new tokens.
"""

from dataclasses import dataclass
from typing import (
    Any,
    Callable,
    ClassVar,
    Dict,
    Generic,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    Type,
    TypeVar,
    Union,
)

import torch
from torch import Tensor

from ..attention import Attended
from ..kernels.copies import copy_all
from ..layers import SelfAttention
from .attention import Columns
from .interfaces import CachedMemory, Network

# A field of a cache: a tensor with the rows first, a tuple of them with names, or nothing.
Buffers = Union[None, Tensor, Tuple[Tensor, ...]]


class RowPosition(NamedTuple):
    """How far one row has been read."""

    tokens: int = 0  # of its segment, less than N
    slots: int = 0  # m
    ready: bool = False  # whether the slots have been refreshed for this segment
    own: int = 0  # a number that the memory's cache counts besides; rows that differ in it end their segments apart


@dataclass
class LayerCache:
    """The buffers of one layer. A memory that keeps more of a layer's tokens extends it."""

    keys: Tensor  # [B, H, C, D]
    values: Tensor  # [B, H, C, D]

    keeps_inputs: ClassVar[bool] = False  # whether `store_inputs` does something

    @classmethod
    def zeros(cls, memory: CachedMemory, rows: int, like: Tensor) -> Tuple[Tensor, Tensor]:
        """Return new keys and values."""
        size = (rows, memory.config.heads, memory.slots + memory.period, memory.config.head_dim)
        return like.new_zeros(size), like.new_zeros(size)

    def column_buffers(self) -> Iterator[Tuple[int, Tensor]]:
        """Yield the buffers with one column a slot or token, each after the dimension of its columns."""
        yield 2, self.keys
        yield 2, self.values

    def attended(self) -> Optional[Attended]:
        """Return the buffers ``[B, H, C, D]`` and ``[B, H, C]`` that new tokens' read-outs and normalisers go to.

        None if the memory does not need them.
        """
        return None

    def store_inputs(self, inputs: Tensor, columns: Columns) -> None:
        """Keep the rows ``[B, k, d]`` that go into the layer."""

    def combine(self, attention: SelfAttention, q: Tensor, read_out: Tensor) -> Tensor:
        """Return the heads that go into the output projection.

        Args:
            attention: the layer's.
            q: ``[B, H, k, D]``.
            read_out: ``[B, H, k, D]``, of slots and tokens.
        """
        return read_out


M = TypeVar("M", bound=CachedMemory)
L = TypeVar("L", bound=LayerCache)


@dataclass
class SegmentCache(Generic[M, L]):
    """Base of all caches.

    A memory that refreshes its slots overrides `refresh`, and `embeddings_buffer` or its `LayerCache` for what the
    refresh needs of the tokens.
    """

    layers: List[L]
    tokens: Tensor  # [B] int64, as in `positions`
    slots: Tensor  # [B] int64, as in `positions`
    positions: List[RowPosition]

    # Whether `refresh` does something, and in tensor operations only, so that it can be replayed as a graph.
    replayable: ClassVar[bool] = False

    @classmethod
    def empty(cls, memory: M, rows: int, like: Tensor) -> "SegmentCache[M, L]":
        """Return the cache of *rows* texts of which nothing has been read; *like* gives device and dtype."""
        raise NotImplementedError

    def refresh(self, rows: Optional[Tensor], slots: int, first: Tensor, network: Network[M]) -> None:
        """Make the slots ready for a new segment.

        Args:
            rows: ``[b]`` the rows that begin one, None for all.
            slots: m, at least 1, the same for all of them.
            first: ``[b, 1, d]`` the segments' first embeddings.
        """

    def embeddings_buffer(self) -> Optional[Tensor]:
        """Return ``[B, C, d]``, where tokens' embeddings are kept for the next refresh; None if it needs none."""
        return None

    def store_embeddings(self, embeddings: Tensor, columns: Columns) -> None:
        """Keep new embeddings ``[B, k, d]`` if the next refresh needs them."""
        buffer = self.embeddings_buffer()
        if buffer is not None:
            columns.write(buffer, embeddings, 1)

    def column_buffers(self) -> Iterator[Tuple[int, Tensor]]:
        """Yield the buffers of all layers with one column a slot or token, each after the dimension of its columns."""
        for layer in self.layers:
            yield from layer.column_buffers()

    def end_segment(self, rows: Optional[Tensor], position: RowPosition, network: Network[M]) -> None:
        """Turn the last columns of full segments into the slots of the next.

        Args:
            rows: ``[b]`` the rows that end one, None for all.
            position: that of all of them, apart from the tokens.
        """
        mem_len = network.memory.slots
        for dim, buffer in self.column_buffers():
            last = select_rows(buffer, rows).narrow(dim, buffer.size(dim) - mem_len, mem_len).clone()
            write_rows(buffer.narrow(dim, 0, mem_len), rows, last)

    def next_position(self, position: RowPosition, network: Network[M]) -> RowPosition:
        """Return the position of a row whose segment, read up to *position*, has become full."""
        return RowPosition(slots=min(network.memory.slots, position.slots + network.memory.period))

    def advance(self, counts: Sequence[int], network: Network[M], counted: bool = False) -> None:
        """Count ``counts[b]`` more tokens of row b, and end segments that are full.

        With *counted*, `tokens` has been increased already.
        """
        length = network.memory.period
        full: Dict[Tuple[int, int], List[int]] = {}
        for b, count in enumerate(counts):
            if self.positions[b].tokens + count == length:
                full.setdefault((self.positions[b].slots, self.positions[b].own), []).append(b)
        for rows in full.values():
            self.end_segment(self.index(rows), self.positions[rows[0]], network)
        for b, count in enumerate(counts):
            position = self.positions[b]
            if position.tokens + count == length:
                self.positions[b] = self.next_position(position, network)
            elif count:
                self.positions[b] = position._replace(tokens=position.tokens + count)
        if full or min(counts) < max(counts):
            self.sync()
        elif not counted:  # the host need not tell the device anything
            self.tokens.add_(counts[0])

    def sync(self) -> None:
        """Copy the host's positions to the device."""
        self.tokens.copy_(torch.tensor([p.tokens for p in self.positions]))
        self.slots.copy_(torch.tensor([p.slots for p in self.positions]))

    def index(self, rows: Sequence[int]) -> Optional[Tensor]:
        """Return rows as an index, None if they are all."""
        return None if len(rows) == len(self.positions) else torch.tensor(rows, device=self.tokens.device)

    def reorder(self, order: Tensor) -> None:
        """Let row i go on from what row ``order[i]`` has read; rows may be repeated and left out."""
        rows = order.tolist()
        if rows == list(range(len(self.positions))):
            return
        for part, name, value in self._fields():
            setattr(part, name, _map(value, lambda t: t.index_select(0, order)))
        self.positions = [self.positions[row] for row in rows]

    def copy_(self, other: "SegmentCache[M, L]") -> None:
        """Take over what *other*, of the same sizes, has read."""
        copy_all(self.tensors(), other.tensors())
        self.positions = list(other.positions)

    def size(self) -> int:
        """Return the bytes of all buffers."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> List[Tensor]:
        """Return all buffers, in one order."""
        return [t for _, _, value in self._fields() for t in _tensors(value)]

    def _fields(self) -> Iterator[Tuple[object, str, Buffers]]:
        """Yield the owner, name and value of every field that holds buffers."""
        for part in (self, *self.layers):
            for name, value in vars(part).items():
                if name not in ("layers", "positions"):
                    yield part, name, value


AnyCache = SegmentCache[Any, Any]


class AnyMemory(CachedMemory, Protocol):
    """A memory with its cache."""

    @property
    def cache(self) -> Type[AnyCache]: ...


class FrozenCache(SegmentCache[CachedMemory, LayerCache]):
    """Keys and values alone: those of a frozen slot stay what they were when it was a token."""

    @classmethod
    def empty(cls, memory: CachedMemory, rows: int, like: Tensor) -> "FrozenCache":
        layers = [LayerCache(*LayerCache.zeros(memory, rows, like)) for _ in range(memory.config.layers)]
        return cls(layers, counts(rows, like), counts(rows, like), [RowPosition()] * rows)


def counts(rows: int, like: Tensor) -> Tensor:
    """Return zeros ``[B]``, int64."""
    return torch.zeros(rows, dtype=torch.int64, device=like.device)


def select_rows(buffer: Tensor, rows: Optional[Tensor]) -> Tensor:
    """Return *rows* ``[b]`` of a buffer ``[B, ..]``; all of them, without a copy, if it is None."""
    return buffer if rows is None else buffer[rows]


def write_rows(buffer: Tensor, rows: Optional[Tensor], new: Tensor) -> None:
    """Write ``new [b, ..]`` into *rows* of a buffer ``[B, ..]``, in place."""
    buffer.copy_(new) if rows is None else buffer.index_copy_(0, rows, new.to(buffer.dtype))


def _tensors(buffers: Buffers) -> Sequence[Tensor]:
    return (buffers,) if isinstance(buffers, Tensor) else buffers or ()


def _map(buffers: Buffers, fn: Callable[[Tensor], Tensor]) -> Buffers:
    if isinstance(buffers, Tensor):
        return fn(buffers)
    return None if buffers is None else type(buffers)(*map(fn, buffers))
