"""The cache of token-by-token decoding: keys and values of the memory slots and of the segment's tokens so far.

Every sequence has its own position in its segment, so that prompts of any lengths share a batch. Column c of a buffer
belongs to a slot if c < M, and otherwise to the segment's token c - M. Slots fill the first M columns from the right,
so that they stand next to the tokens. Buffers are written in place and never grow, so that a step can be replayed as a
graph.

Shapes: B sequences, b of them, N tokens of a segment, m <= M memory slots, C = M + N columns, H heads,
D size of a head, d model width, k new tokens.
"""

from dataclasses import dataclass, field
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
from ..layers import DecoderLayer, SelfAttention
from ..names import check_spelling
from ..positions import Positions
from .attention import Columns
from .interfaces import CachedMemory, Network

# A field of a cache: a tensor with the sequences first, a tuple of them with names, or nothing.
Buffers = Union[None, Tensor, Tuple[Tensor, ...]]


class SequencePosition(NamedTuple):
    """The position up to which one sequence has been read."""

    tokens: int = 0  # of its segment, less than N
    slots: int = 0  # m
    ready: bool = False  # whether the slots have been refreshed for this segment
    own: int = 0  # a further count of the memory's cache; sequences with different counts end their segments separately


@dataclass
class LayerCache:
    """The buffers of one layer. A memory that stores more for a layer's tokens extends this class."""

    keys: Tensor  # [B, H, C, D]
    values: Tensor  # [B, H, C, D]

    keeps_inputs: ClassVar[bool] = False  # whether `store_inputs` does something
    changes_inputs: ClassVar[bool] = False  # whether `enter` does something
    joins_heads: ClassVar[bool] = False  # whether `join` does something

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_spelling(cls, LayerCache)

    @classmethod
    def zeros(cls, memory: CachedMemory, batch_size: int, like: Tensor) -> Tuple[Tensor, Tensor]:
        """Return new keys and values."""
        size = (batch_size, memory.config.heads, memory.slots + memory.period, memory.config.head_dim)
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

    def enter(self, attention: SelfAttention, rows: Tensor) -> Tensor:
        """Return the layer's input for ``rows [B, k, d]``, the output of the layer below."""
        return rows

    def store_inputs(self, inputs: Tensor, columns: Columns) -> None:
        """Store the rows ``[B, k, d]`` that go into the layer."""

    def combine(self, attention: SelfAttention, q: Tensor, attended: Attended) -> Tensor:
        """Return the heads that go into the output projection.

        Args:
            attention: the layer's.
            q: ``[B, H, k, D]``.
            attended: of slots and tokens; its normaliser is empty unless there are buffers for it in `attended`.
        """
        return attended.output

    def join(self, attention: SelfAttention, rows: Tensor, heads: Tensor) -> Tensor:
        """Return the heads of `combine` with more heads, if the output projection takes more.

        Args:
            attention: the layer's.
            rows: ``[B, k, d]``, the attention's input.
            heads: ``[B, H, k, D]``.
        """
        return heads


@dataclass
class InputLayerCache(LayerCache):
    """Keys, values and the rows that go into the layer."""

    inputs: Tensor  # [B, C, d]

    keeps_inputs: ClassVar[bool] = True

    def column_buffers(self) -> Iterator[Tuple[int, Tensor]]:
        yield from super().column_buffers()
        yield 1, self.inputs

    def store_inputs(self, inputs: Tensor, columns: Columns) -> None:
        columns.write(self.inputs, inputs, 1)


M = TypeVar("M", bound=CachedMemory)
L = TypeVar("L", bound=LayerCache)


@dataclass
class SegmentCache(Generic[M, L]):
    """Base of all caches.

    A memory that refreshes its slots overrides `refresh`. It also overrides `embeddings_buffer` or its `LayerCache`, to
    store the inputs of the refresh.
    """

    layers: List[L]
    tokens: Tensor  # [B] int64, as in `positions`
    slots: Tensor  # [B] int64, as in `positions`
    positions: List[SequencePosition]
    words: Optional[Tensor] = field(default=None, kw_only=True)  # [B, C] int64, if positions depend on them

    # Whether `refresh` does something, and in tensor operations only, so that it can be replayed as a graph.
    replayable: ClassVar[bool] = False
    keeps_features: ClassVar[bool] = False  # whether `store_features` does something

    @classmethod
    def empty(cls, memory: M, batch_size: int, like: Tensor) -> "SegmentCache[M, L]":
        """Return the cache of *batch_size* sequences before their first token; *like* gives device and dtype."""
        raise NotImplementedError

    def refresh(self, sequences: Optional[Tensor], slots: int, first: Tensor, network: Network[M]) -> None:
        """Make the slots ready for a new segment.

        Args:
            sequences: ``[b]`` indices of the sequences that begin a segment, None for all.
            slots: m, at least 1, the same for all of them.
            first: ``[b, 1, d]`` the segments' first embeddings.
        """

    def embeddings_buffer(self) -> Optional[Tensor]:
        """Return the buffer ``[B, C, d]`` of tokens' embeddings for the next refresh; None if it needs none."""
        return None

    def store_embeddings(self, embeddings: Tensor, columns: Columns) -> None:
        """Store new embeddings ``[B, k, d]`` if the next refresh needs them."""
        buffer = self.embeddings_buffer()
        if buffer is not None:
            columns.write(buffer, embeddings, 1)

    def store_features(self, features: Tensor, columns: Columns) -> None:
        """Store the rows ``[B, k, d]`` that come out of the last layer."""

    def column_buffers(self) -> Iterator[Tuple[int, Tensor]]:
        """Yield the buffers with one column a slot or token, each after the dimension of its columns."""
        for layer in self.layers:
            yield from layer.column_buffers()
        if self.words is not None:
            yield 1, self.words

    def positions_of(self, sequences: Optional[Tensor], columns: slice, network: Network[M]) -> Positions:
        """Return the positions of the rows in some columns of *sequences* ``[b]``, None standing for all."""
        if self.words is None:
            return network.positions
        return network.positions.of(select_sequences(self.words, sequences)[:, columns])

    def end_segment(self, sequences: Optional[Tensor], position: SequencePosition, network: Network[M]) -> None:
        """Turn the last columns of full segments into the slots of the next.

        Args:
            sequences: ``[b]`` indices of the sequences that end a segment, None for all.
            position: the position that all of them have, but for the count of tokens.
        """
        mem_len = network.memory.slots
        for dim, buffer in self.column_buffers():
            last = select_sequences(buffer, sequences).narrow(dim, buffer.size(dim) - mem_len, mem_len).clone()
            write_sequences(buffer.narrow(dim, 0, mem_len), sequences, last)

    def next_position(self, position: SequencePosition, network: Network[M]) -> SequencePosition:
        """Return the position of a sequence whose segment, read up to *position*, has become full."""
        return SequencePosition(slots=min(network.memory.slots, position.slots + network.memory.period))

    def advance(self, counts: Sequence[int], network: Network[M], counted: bool = False) -> None:
        """Count ``counts[b]`` more tokens of sequence b, and end segments that are full.

        With *counted*, `tokens` has been increased already.
        """
        length = network.memory.period
        full: Dict[Tuple[int, int], List[int]] = {}
        for b, count in enumerate(counts):
            if self.positions[b].tokens + count == length:
                full.setdefault((self.positions[b].slots, self.positions[b].own), []).append(b)
        for sequences in full.values():
            self.end_segment(self.index(sequences), self.positions[sequences[0]], network)
        for b, count in enumerate(counts):
            position = self.positions[b]
            if position.tokens + count == length:
                self.positions[b] = self.next_position(position, network)
            elif count:
                self.positions[b] = position._replace(tokens=position.tokens + count)
        if full or min(counts) < max(counts):
            self.sync()
        elif not counted:  # no copy to the device is needed
            self.tokens.add_(counts[0])

    def sync(self) -> None:
        """Copy the host's positions to the device."""
        self.tokens.copy_(torch.tensor([p.tokens for p in self.positions]))
        self.slots.copy_(torch.tensor([p.slots for p in self.positions]))

    def index(self, sequences: Sequence[int]) -> Optional[Tensor]:
        """Return numbers of sequences as an index, None if they are all."""
        return None if len(sequences) == len(self.positions) else torch.tensor(sequences, device=self.tokens.device)

    def reorder(self, order: Tensor) -> None:
        """Let sequence i go on from the tokens of sequence ``order[i]``; sequences may be repeated and left out."""
        sources = order.tolist()
        if sources == list(range(len(self.positions))):
            return
        for owner, name, value in self._fields():
            setattr(owner, name, _map(value, lambda t: t.index_select(0, order)))
        self.positions = [self.positions[source] for source in sources]

    def copy_(self, other: "SegmentCache[M, L]") -> None:
        """Take over the state of *other*, which has the same sizes."""
        copy_all(self.tensors(), other.tensors())
        self.positions = list(other.positions)

    def size(self) -> int:
        """Return the bytes of all buffers."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> List[Tensor]:
        """Return all buffers, in a fixed order."""
        return [t for _, _, value in self._fields() for t in _tensors(value)]

    def _fields(self) -> Iterator[Tuple[object, str, Buffers]]:
        """Yield the owner, name and value of every field that holds buffers.

        Raises:
            ValueError: a field is none that `reorder` could follow.
        """
        for owner in (self, *self.layers):
            for name, value in vars(owner).items():
                if name not in ("layers", "positions"):
                    self._check_field(f"{type(owner).__name__}.{name}", value)
                    yield owner, name, value

    def _check_field(self, name: str, value: object) -> None:
        if value is None:
            return
        batch = len(self.positions)
        for part in value if isinstance(value, tuple) and hasattr(value, "_fields") else (value,):
            if not isinstance(part, Tensor) or part.shape[:1] != (batch,):
                kind = list(part.shape) if isinstance(part, Tensor) else f"of type {type(part).__name__}"
                raise ValueError(
                    f"{name} is {kind}: a field of a cache is a tensor with the {batch} sequences first, a NamedTuple "
                    "of such tensors, or None, so that reorder takes the rows of every sequence along"
                )

    def check(self, batch_size: int, layers: int, columns: int) -> None:
        """Refuse what `empty` must not return for B sequences, so many layers of a model, and C columns.

        Raises:
            ValueError: a field is none that `reorder` could follow, there are not as many layers or positions, two
                fields are one buffer, or a buffer has another number of columns. Shipped caches never raise it.
        """
        name = type(self).__name__
        if len(self.layers) != layers:
            raise ValueError(f"{name}.empty returned {len(self.layers)} layers: return one for each of {layers} layers")
        if len(self.positions) != batch_size:
            raise ValueError(
                f"{name}.empty returned {len(self.positions)} positions for {batch_size} sequences: return "
                "[SequencePosition()] * batch_size"
            )
        buffers = self.tensors()
        if len({*map(id, buffers)}) < len(buffers):
            raise ValueError(f"{name}.empty returned one buffer twice: make new ones for every field of every layer")
        for dim, buffer in self.column_buffers():
            if buffer.size(dim) != columns:
                raise ValueError(
                    f"{name}.column_buffers yields a buffer {list(buffer.shape)} with columns in dimension {dim}: "
                    f"make {columns} of them, memory.slots + memory.period"
                )


AnyCache = SegmentCache[Any, Any]


class AnyMemory(CachedMemory, Protocol):
    """A memory with its cache."""

    @property
    def cache(self) -> Type[AnyCache]: ...
    def fill_cache(
        self, cache: AnyCache, parts: Sequence[Tuple[Tensor, ...]], layers: Sequence[DecoderLayer]
    ) -> None: ...


class FrozenCache(SegmentCache[CachedMemory, LayerCache]):
    """Keys and values alone: those of a frozen slot do not change after the slot was a token."""

    @classmethod
    def empty(cls, memory: CachedMemory, batch_size: int, like: Tensor) -> "FrozenCache":
        layers = [LayerCache(*LayerCache.zeros(memory, batch_size, like)) for _ in range(memory.config.layers)]
        return cls(layers, counts(batch_size, like), counts(batch_size, like), [SequencePosition()] * batch_size)


def fill_slots(
    cache: AnyCache, parts: Sequence[Tuple[Tensor, ...]], layers: Sequence[DecoderLayer], slots: int
) -> None:
    """Write keys and values of each layer's rows ``[B, M, d]``, as they go into it, into the M = *slots* columns."""
    for layer, cached, (rows,) in zip(layers, cache.layers, parts, strict=True):
        fill_slots_of_layer(cached, layer, rows, slots)


def fill_slots_of_layer(cached: LayerCache, layer: DecoderLayer, rows: Tensor, slots: int) -> None:
    """Write one layer's keys and values as `fill_slots` does."""
    _, k, v = layer.self_attn.project(layer.attention_input(rows), 0)
    cached.keys[:, :, :slots].copy_(k)
    cached.values[:, :, :slots].copy_(v)


def counts(batch_size: int, like: Tensor) -> Tensor:
    """Return zeros ``[B]``, int64."""
    return torch.zeros(batch_size, dtype=torch.int64, device=like.device)


def select_sequences(buffer: Tensor, sequences: Optional[Tensor]) -> Tensor:
    """Return *sequences* ``[b]`` of a buffer ``[B, ..]``; the whole buffer, without a copy, for None."""
    return buffer if sequences is None else buffer[sequences]


def write_sequences(buffer: Tensor, sequences: Optional[Tensor], new: Tensor) -> None:
    """Write ``new [b, ..]`` into *sequences* of a buffer ``[B, ..]``, in place."""
    buffer.copy_(new) if sequences is None else buffer.index_copy_(0, sequences, new.to(buffer.dtype))


def _tensors(buffers: Buffers) -> Sequence[Tensor]:
    return (buffers,) if isinstance(buffers, Tensor) else buffers or ()


def _map(buffers: Buffers, fn: Callable[[Tensor], Tensor]) -> Buffers:
    if isinstance(buffers, Tensor):
        return fn(buffers)
    return None if buffers is None else type(buffers)(*map(fn, buffers))
