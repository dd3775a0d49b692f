"""The decoding cache of look-ahead memory, and the refresh of the slots once a segment.

Shapes: B sequences, b of them, N tokens of a segment, m <= M memory slots, C = M + N columns, H heads,
D size of a head, d model width.
"""

from dataclasses import dataclass
from typing import ClassVar, Iterator, Optional, Protocol, Tuple, cast

import torch
from torch import Tensor

from ...attention import Attended
from ...decoding.cache import LayerCache, SegmentCache, SequencePosition, counts, select_sequences, write_sequences
from ...decoding.interfaces import CachedMemory, Network
from ...kernels.padded import WideRows
from ...layers import DecoderLayer
from ...positions import LayerBias
from .attention import LookaheadSelfAttention
from .windows import LookaheadWindow


class LookingAhead(CachedMemory, Protocol):
    """A memory whose slots look ahead."""

    def window(self, slots: int, current: int) -> LookaheadWindow: ...


@dataclass
class LookaheadLayerCache(LayerCache):
    """Keys, values, and the read-outs and normalisers of slots and tokens; None in the last layer."""

    past: Optional[Attended]  # [B, H, C, D] and [B, H, C]

    def column_buffers(self) -> Iterator[Tuple[int, Tensor]]:
        yield from super().column_buffers()
        for buffer in self.past or ():
            yield 2, buffer

    def attended(self) -> Optional[Attended]:
        return self.past


@dataclass
class LookaheadCache(SegmentCache[LookingAhead, LookaheadLayerCache]):
    """The fields of `LookaheadState` for slots and tokens alike, with keys and values."""

    embeddings: Tensor  # [B, C, d]

    replayable: ClassVar[bool] = True

    @classmethod
    def empty(cls, memory: LookingAhead, batch_size: int, like: Tensor) -> "LookaheadCache":
        exact = torch.promote_types(like.dtype, torch.float32)
        layers = []
        for i in range(memory.config.layers):
            keys, values = LayerCache.zeros(memory, batch_size, like)
            refreshed = i < memory.config.layers - 1
            past = Attended(torch.zeros_like(keys), keys.new_zeros(keys.shape[:-1], dtype=exact)) if refreshed else None
            layers.append(LookaheadLayerCache(keys, values, past))
        embeddings = like.new_zeros(batch_size, memory.slots + memory.period, like.size(-1))
        return cls(
            layers, counts(batch_size, like), counts(batch_size, like), [SequencePosition()] * batch_size, embeddings
        )

    def column_buffers(self) -> Iterator[Tuple[int, Tensor]]:
        yield from super().column_buffers()
        yield 1, self.embeddings

    def embeddings_buffer(self) -> Optional[Tensor]:
        return self.embeddings

    def refresh(self, sequences: Optional[Tensor], slots: int, first: Tensor, network: Network[LookingAhead]) -> None:
        """Refresh the slots: they depend on the memory and on the segment's first token alone.

        The first token decides the refresh however long the segment will be, so the segment is taken to be whole.
        """
        memory, mem_len = network.memory, network.memory.slots
        window = memory.window(slots, memory.period)
        positions = self.positions_of(sequences, slice(mem_len - slots, mem_len + 1), network)
        biases = positions(slots + 1, window.distances(slots), first)
        x = torch.cat([select_sequences(self.embeddings, sequences)[:, mem_len - slots : mem_len], first], dim=1)
        for layer, bias, cached in zip(network.layers[:-1], biases, self.layers, strict=False):
            x = _refreshed(layer, bias, cached, x, sequences, window, mem_len)
        last, cached = network.layers[-1], self.layers[-1]
        _, k, v = last.self_attn.project(last.attention_input(x[:, :slots]), 0)
        for buffer, new in ((cached.keys, k), (cached.values, v)):
            write_sequences(buffer[:, :, mem_len - slots : mem_len], sequences, new)


def _refreshed(
    layer: DecoderLayer,
    bias: LayerBias,
    cached: LookaheadLayerCache,
    x: Tensor,
    sequences: Optional[Tensor],
    window: LookaheadWindow,
    mem_len: int,
) -> Tensor:
    """Pass slots and first tokens ``x [b, m + 1, d]`` through a layer, and write the slots' new read-outs."""
    attention, past, slots = cast(LookaheadSelfAttention, layer.self_attn), cached.past, x.size(1) - 1
    assert past is not None
    in_slots = slice(mem_len - slots, mem_len)
    stored = Attended(*(select_sequences(buffer, sequences)[:, :, in_slots] for buffer in past))

    def refresh(normed: Tensor) -> Tuple[WideRows, None]:
        q, k, v = attention.project(normed, slots + 1)
        attended = attention.refresh(q, k, v, bias, window, stored)
        written = ((cached.keys, k), (cached.values, v), (past.output, attended.output), (past.normalizer, attended[1]))
        for buffer, new in written:
            write_sequences(buffer[:, :, in_slots], sequences, new[:, :, :slots])
        return attention.merge_heads(attended.output), None

    return layer.around(x, refresh)[0]
