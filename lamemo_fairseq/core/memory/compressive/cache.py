"""What decoding keeps of compressive memory, and the compression of the oldest rows once a segment.

Columns of a cache: compressed slots, other slots, tokens.

Shapes: B rows, b of them, N tokens of a segment, S = C + M slots, s <= S of them, c of these compressed, H heads,
D size of a head, d model width.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Dict, List, Optional

import torch
from torch import Tensor

from ...decoding.cache import Network, Place, Record, SegmentCache, put, take
from .attention import usage


@dataclass
class CompressiveCache(SegmentCache):
    """Besides keys and values, the rows that they were projected from."""

    inputs: List[Tensor] = field(default_factory=list)  # a layer: [B, S + N, d]

    columns: ClassVar[Dict[str, int]] = {"inputs": 1}

    @classmethod
    def empty(cls, memory: Any, rows: int, like: Tensor) -> "CompressiveCache":
        base = SegmentCache.empty(memory, rows, like)
        size = (rows, memory.slots + memory.period, like.size(-1))
        return cls(**vars(base), inputs=[like.new_zeros(size) for _ in base.keys])

    def record(self, layer: int) -> Record:
        return Record(inputs=self.inputs[layer])

    def following(self, place: Place, network: Network) -> Place:
        memory = network.memory
        rows = place.slots - place.compressed + memory.period
        leaving = memory.leaving(rows)
        compressed = memory.compressed_after(place.compressed, leaving)
        return Place(0, compressed + rows - leaving, False, compressed)

    def close(self, rows: Optional[Tensor], slots: int, network: Network) -> None:
        """Compress the oldest rows, and move what stays to its new columns."""
        memory, length = network.memory, network.memory.period
        place = self.places[0 if rows is None else int(rows[0])]
        leaving = memory.leaving(slots - place.compressed + length)
        old = slice(place.compressed, place.compressed + leaving)
        count = self.following(place, network).slots

        def held(buffer: Tensor, dim: int) -> Tensor:
            return take(buffer, rows).narrow(dim, memory.slots - slots, slots + length)

        watches = memory.watches and leaving > 0
        biases = network.positions(slots + length, None, self.inputs[0]) if watches else ()
        layers: Any = network.layers
        for i, layer in enumerate(layers):
            attn, inputs = layer.self_attn, held(self.inputs[i], 1)
            new = inputs[:, :0]
            if leaving:
                used = None
                if watches:
                    q, _, _ = attn.project(layer.attention_input(inputs[:, slots:]), length)
                    q, k = biases[i].rotate(q, held(self.keys[i], 2))
                    used = usage(q, k, biases[i].causal, attn.config.span, old)
                new = memory.compressions[i](inputs[:, old], used)
            _, k, v = attn.project(layer.attention_input(new), 0)
            for buffer, dim, made in ((self.inputs[i], 1, new), (self.keys[i], 2, k), (self.values[i], 2, v)):
                before, _, after = held(buffer, dim).tensor_split((old.start, old.stop), dim)
                every = torch.cat([before, made, after], dim)
                kept = every.narrow(dim, every.size(dim) - count, count)
                put(buffer.narrow(dim, memory.slots - count, count), rows, kept)
