"""The decoding cache of compressive memory, and the compression of the oldest rows once a segment.

Columns of a buffer: compressed slots, other slots, tokens.

Shapes: B sequences, b of them, N tokens of a segment, C + M slots, s <= C + M of them in use, c of these compressed,
H heads, D size of a head, d model width.
"""

from typing import Optional, Protocol, Sequence

import torch
from torch import Tensor, nn

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
from ...positions import LayerBias
from .attention import usage


class Compressing(CachedMemory, Protocol):
    """A memory that compresses its oldest rows."""

    compressions: nn.ModuleList

    @property
    def watches(self) -> bool: ...
    def leaving(self, recent: int) -> int: ...
    def compressed_after(self, compressed: int, leaving: int) -> int: ...


class CompressiveCache(SegmentCache[Compressing, InputLayerCache]):
    """`SequencePosition.own` is c, the number of a sequence's slots that are compressed: the oldest ones."""

    @classmethod
    def empty(cls, memory: Compressing, batch_size: int, like: Tensor) -> "CompressiveCache":
        size = (batch_size, memory.slots + memory.period, like.size(-1))
        layers = [
            InputLayerCache(*LayerCache.zeros(memory, batch_size, like), like.new_zeros(size))
            for _ in range(memory.config.layers)
        ]
        return cls(layers, counts(batch_size, like), counts(batch_size, like), [SequencePosition()] * batch_size)

    def next_position(self, position: SequencePosition, network: Network[Compressing]) -> SequencePosition:
        memory = network.memory
        recent = position.slots - position.own + memory.period
        leaving = memory.leaving(recent)
        compressed = memory.compressed_after(position.own, leaving)
        return SequencePosition(slots=compressed + recent - leaving, own=compressed)

    def end_segment(
        self, sequences: Optional[Tensor], position: SequencePosition, network: Network[Compressing]
    ) -> None:
        """Compress the oldest rows, and move the others to their new columns."""
        memory, length, slots = network.memory, network.memory.period, position.slots
        leaving = memory.leaving(slots - position.own + length)
        oldest = slice(position.own, position.own + leaving)
        count = self.next_position(position, network).slots

        def used_columns(buffer: Tensor, dim: int) -> Tensor:
            return select_sequences(buffer, sequences).narrow(dim, memory.slots - slots, slots + length)

        watches = memory.watches and leaving > 0
        biases: Sequence[LayerBias] = network.positions(slots + length, None, self.layers[0].inputs) if watches else ()
        for i, (layer, cached) in enumerate(zip(network.layers, self.layers, strict=True)):
            attn, inputs = layer.self_attn, used_columns(cached.inputs, 1)
            new = inputs[:, :0]
            if leaving:
                used = None
                if watches:
                    q, _, _ = attn.project(layer.attention_input(inputs[:, slots:]), length)
                    q, k = biases[i].rotate(q, used_columns(cached.keys, 2))
                    used = usage(q, k, biases[i].causal, attn.config.span, oldest)
                new = memory.compressions[i](inputs[:, oldest], used)
            _, k, v = attn.project(layer.attention_input(new), 0)
            for buffer, dim, made in ((cached.inputs, 1, new), (cached.keys, 2, k), (cached.values, 2, v)):
                before, _, after = used_columns(buffer, dim).tensor_split((oldest.start, oldest.stop), dim)
                every = torch.cat([before, made, after], dim)
                last = every.narrow(dim, every.size(dim) - count, count)
                write_sequences(buffer.narrow(dim, memory.slots - count, count), sequences, last)
