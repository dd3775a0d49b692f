"""The decoding cache of a memorizing memory.

The tokens of a segment read the store as it was at the segment's beginning. The store is written when the segment is
full.

Shapes: B sequences, b of them, N tokens of a segment, M memory slots, C = M + N columns, S rows of a store, H heads,
D size of a head.
"""

from dataclasses import dataclass
from typing import List, Optional, Protocol, cast

import torch
from torch import Tensor

from ...attention import Attended
from ...decoding.cache import LayerCache, SegmentCache, SequencePosition, counts, select_sequences, write_sequences
from ...decoding.interfaces import CachedMemory, MemorySizes, Network
from ...layers import SelfAttention
from .attention import Store, StoreSelfAttention, appended
from .options import MemorizingOptions


class StoreSizes(MemorySizes, Protocol):
    """Sizes, with the options of the store."""

    @property
    def options(self) -> MemorizingOptions: ...


class WithStore(CachedMemory, Protocol):
    """A memory with a store in one layer."""

    @property
    def config(self) -> StoreSizes: ...
    @property
    def store_layer(self) -> int: ...
    @property
    def reads_slots(self) -> bool: ...


@dataclass
class StoreLayerCache(LayerCache):
    """Keys and values, and the store. Stored rows fill its buffers from the right, as slots do."""

    stored_keys: Tensor  # [B, H, S, D]
    stored_values: Tensor  # [B, H, S, D]
    hidden: Tensor  # [B, S], True for empty rows, and for those that are read as slots
    read_outs: Optional[Attended]  # [B, H, C, D] and [B, H, C], if one softmax joins both

    def attended(self) -> Optional[Attended]:
        return self.read_outs

    def combine(self, attention: SelfAttention, q: Tensor, attended: Attended) -> Tensor:
        store = Store(self.stored_keys, self.stored_values, self.hidden)
        return cast(StoreSelfAttention, attention).combine(q, attended, store)


@dataclass
class MemorizingCache(SegmentCache[WithStore, LayerCache]):
    """Keys and values of slots and tokens, and the store in one layer. `SequencePosition.own` counts stored rows."""

    @classmethod
    def empty(cls, memory: WithStore, batch_size: int, like: Tensor) -> "MemorizingCache":
        layers: List[LayerCache] = []
        for n in range(memory.config.layers):
            keys, values = LayerCache.zeros(memory, batch_size, like)
            if n == memory.store_layer:
                size = (batch_size, memory.config.heads, memory.config.options.store_len, memory.config.head_dim)
                hidden = torch.ones(batch_size, size[2], dtype=torch.bool, device=like.device)
                exact = torch.promote_types(like.dtype, torch.float32)
                joint = Attended(torch.zeros_like(keys), keys.new_zeros(keys.shape[:3], dtype=exact))
                read_outs = None if memory.reads_slots else joint
                layers.append(
                    StoreLayerCache(keys, values, like.new_zeros(size), like.new_zeros(size), hidden, read_outs)
                )
            else:
                layers.append(LayerCache(keys, values))
        return cls(layers, counts(batch_size, like), counts(batch_size, like), [SequencePosition()] * batch_size)

    def end_segment(self, sequences: Optional[Tensor], position: SequencePosition, network: Network[WithStore]) -> None:
        """Push the segment's keys and values onto the store, then move the columns on."""
        memory = network.memory
        cached, size = cast(StoreLayerCache, self.layers[memory.store_layer]), memory.config.options.store_len
        for stored, buffer in ((cached.stored_keys, cached.keys), (cached.stored_values, cached.values)):
            new = select_sequences(buffer, sequences)[:, :, memory.slots :]
            write_sequences(stored, sequences, appended(select_sequences(stored, sequences), new, size))
        after = self.next_position(position, network)
        row = torch.arange(size, device=cached.hidden.device)
        hidden = row < size - after.own
        if not memory.reads_slots:  # these rows are read as slots
            hidden |= row >= size - after.slots
        write_sequences(cached.hidden, sequences, hidden.expand(len(select_sequences(cached.hidden, sequences)), -1))
        super().end_segment(sequences, position, network)

    def next_position(self, position: SequencePosition, network: Network[WithStore]) -> SequencePosition:
        stored = min(network.memory.config.options.store_len, position.own + network.memory.period)
        return super().next_position(position, network)._replace(own=stored)
