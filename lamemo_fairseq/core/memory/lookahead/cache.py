"""The decoding cache of look-ahead memory, and the refresh of the slots once a segment.

Shapes: B sequences, b of them, N tokens of a segment, m <= M memory slots, C = M + N columns, H heads,
D size of a head, d model width.
"""

from dataclasses import dataclass
from typing import ClassVar, Iterator, List, Optional, Protocol, Tuple, cast

import torch
from torch import Tensor

from ...attention import Attended
from ...decoding.cache import (
    InputLayerCache,
    LayerCache,
    SegmentCache,
    SequencePosition,
    counts,
    select_sequences,
    write_sequences,
)
from ...decoding.interfaces import CachedMemory, Network
from ...kernels.padded import WideRows
from ...layers import DecoderLayer
from ...positions import LayerBias
from .attention import LookaheadSelfAttention
from .windows import LookaheadWindow


class LookingAhead(CachedMemory, Protocol):
    """A memory whose slots look ahead."""

    @property
    def first_ahead(self) -> int: ...
    @property
    def refreshed(self) -> range: ...
    @property
    def cycle(self) -> int: ...
    def window(self, slots: int, current: int) -> LookaheadWindow: ...


@dataclass
class LookaheadLayerCache(LayerCache):
    """Keys, values, and the read-outs and normalisers of slots and tokens; None where slots do not look ahead."""

    past: Optional[Attended]  # [B, H, C, D] and [B, H, C]

    def column_buffers(self) -> Iterator[Tuple[int, Tensor]]:
        yield from super().column_buffers()
        for buffer in self.past or ():
            yield 2, buffer

    def attended(self) -> Optional[Attended]:
        return self.past


@dataclass
class FirstLayerCache(LookaheadLayerCache, InputLayerCache):
    """The cache of the first layer whose slots look ahead, if other layers are below: also the rows that go into it."""


@dataclass
class LookaheadCache(SegmentCache[LookingAhead, LookaheadLayerCache]):
    """The fields of `LookaheadState` for slots and tokens alike, with keys and values.

    `SequencePosition.own` is the number of the segment, modulo K.
    """

    embeddings: Optional[Tensor]  # [B, C, d], if slots look ahead in the first layer

    replayable: ClassVar[bool] = True

    @classmethod
    def empty(cls, memory: LookingAhead, batch_size: int, like: Tensor) -> "LookaheadCache":
        exact, refreshed = torch.promote_types(like.dtype, torch.float32), memory.refreshed
        inputs = like.new_zeros(batch_size, memory.slots + memory.period, like.size(-1)) if refreshed else None
        layers: List[LookaheadLayerCache] = []
        for i in range(memory.config.layers):
            keys, values = LayerCache.zeros(memory, batch_size, like)
            past = None
            if i in refreshed:
                past = Attended(torch.zeros_like(keys), keys.new_zeros(keys.shape[:-1], dtype=exact))
            if inputs is not None and i == memory.first_ahead > 0:
                layers.append(FirstLayerCache(keys, values, inputs=inputs, past=past))
            else:
                layers.append(LookaheadLayerCache(keys, values, past))
        embeddings = None if memory.first_ahead > 0 else inputs
        return cls(
            layers, counts(batch_size, like), counts(batch_size, like), [SequencePosition()] * batch_size, embeddings
        )

    def column_buffers(self) -> Iterator[Tuple[int, Tensor]]:
        yield from super().column_buffers()
        if self.embeddings is not None:
            yield 1, self.embeddings

    def embeddings_buffer(self) -> Optional[Tensor]:
        return self.embeddings

    def inputs_ahead(self, memory: LookingAhead) -> Tensor:
        """Return the rows ``[B, C, d]`` that go into the first layer whose slots look ahead."""
        layer = self.layers[memory.first_ahead]
        inputs = layer.inputs if isinstance(layer, FirstLayerCache) else self.embeddings
        assert inputs is not None
        return inputs

    def next_position(self, position: SequencePosition, network: Network[LookingAhead]) -> SequencePosition:
        segment = (position.own + 1) % network.memory.cycle
        frozen = segment > 0 or not network.memory.refreshed
        return super().next_position(position, network)._replace(own=segment, ready=frozen)

    def refresh(self, sequences: Optional[Tensor], slots: int, first: Tensor, network: Network[LookingAhead]) -> None:
        """Refresh the slots: they depend on the memory and on the segment's first token alone.

        The first token decides the refresh however long the segment will be, so the segment is taken to be whole.
        """
        memory, mem_len = network.memory, network.memory.slots
        window, refreshed = memory.window(slots, memory.period), memory.refreshed
        in_slots = slice(mem_len - slots, mem_len)
        positions = self.positions_of(sequences, slice(mem_len - slots, mem_len + 1), network)
        biases = positions(slots + 1, window.distances(slots), first)
        through = [*zip(network.layers, biases, self.layers, strict=True)]
        for layer, bias, cached in through[: refreshed.start]:
            first = _passed(layer, bias, cached, first, sequences, in_slots)
        x = torch.cat([select_sequences(self.inputs_ahead(memory), sequences)[:, in_slots], first], dim=1)
        for layer, bias, cached in through[refreshed.start : refreshed.stop]:
            x = _refreshed(layer, bias, cached, x, sequences, window, in_slots)
        last, cached = network.layers[-1], self.layers[-1]
        _, k, v = last.self_attn.project(last.attention_input(x[:, :slots]), 0)
        for buffer, new in ((cached.keys, k), (cached.values, v)):
            write_sequences(buffer[:, :, in_slots], sequences, new)


def _passed(
    layer: DecoderLayer,
    bias: LayerBias,
    cached: LookaheadLayerCache,
    x: Tensor,
    sequences: Optional[Tensor],
    in_slots: slice,
) -> Tensor:
    """Pass first tokens ``x [b, 1, d]`` through a layer whose slots are frozen."""
    attention = layer.self_attn

    def attend(normed: Tensor) -> Tuple[WideRows, None]:
        q, k, v = attention.project(normed, 1)
        buffers = ((cached.keys, k), (cached.values, v))
        keys, values = (
            torch.cat([select_sequences(old, sequences)[:, :, in_slots], new], dim=2) for old, new in buffers
        )
        attended = attention.causal(q, keys, values, bias, need_normalizer=False)
        return attention.merge_heads(attended.output), None

    return layer.around(x, attend)[0]


def _refreshed(
    layer: DecoderLayer,
    bias: LayerBias,
    cached: LookaheadLayerCache,
    x: Tensor,
    sequences: Optional[Tensor],
    window: LookaheadWindow,
    in_slots: slice,
) -> Tensor:
    """Pass slots and first tokens ``x [b, m + 1, d]`` through a layer, and write the slots' new read-outs."""
    attention, past, slots = cast(LookaheadSelfAttention, layer.self_attn), cached.past, x.size(1) - 1
    assert past is not None
    stored = Attended(*(select_sequences(buffer, sequences)[:, :, in_slots] for buffer in past))

    def refresh(normed: Tensor) -> Tuple[WideRows, None]:
        q, k, v = attention.project(normed, slots + 1)
        attended = attention.refresh(q, k, v, bias, window, stored)
        written = ((cached.keys, k), (cached.values, v), (past.output, attended.output), (past.normalizer, attended[1]))
        for buffer, new in written:
            write_sequences(buffer[:, :, in_slots], sequences, new[:, :, :slots])
        return attention.merge_heads(attended.output), None

    return layer.around(x, refresh)[0]
