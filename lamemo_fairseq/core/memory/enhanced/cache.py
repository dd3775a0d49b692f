"""The decoding cache of enhanced recurrence.

A token attends to tokens of its segment by a layer's inputs, and to slots by the layer's outputs. So the keys and
values of tokens are projected anew when a segment ends.

Shapes: B sequences, b of them, N tokens of a segment, M memory slots, C = M + N columns, d model width, k new tokens.
"""

from dataclasses import dataclass
from typing import ClassVar, Optional

from torch import Tensor

from ...decoding.attention import Columns
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


@dataclass
class EnhancedCache(SegmentCache[CachedMemory, InputLayerCache]):
    """Keys and values of slots and tokens, and the outputs of all layers for the tokens."""

    features: Tensor  # [B, C, d], the last layer's outputs

    keeps_features: ClassVar[bool] = True

    @classmethod
    def empty(cls, memory: CachedMemory, batch_size: int, like: Tensor) -> "EnhancedCache":
        size = (batch_size, memory.slots + memory.period, like.size(-1))
        layers = [
            InputLayerCache(*LayerCache.zeros(memory, batch_size, like), like.new_zeros(size))
            for _ in range(memory.config.layers)
        ]
        positions = [SequencePosition()] * batch_size
        return cls(layers, counts(batch_size, like), counts(batch_size, like), positions, like.new_zeros(size))

    def store_features(self, features: Tensor, columns: Columns) -> None:
        columns.write(self.features, features, 1)

    def end_segment(
        self, sequences: Optional[Tensor], position: SequencePosition, network: Network[CachedMemory]
    ) -> None:
        """Project the outputs of the tokens that become slots, and move the columns on."""
        new = slice(max(network.memory.slots, network.memory.period), None)  # the last min(M, N) columns
        # The input of a layer is the output of the layer below.
        outputs = [*(cached.inputs for cached in self.layers[1:]), self.features]
        for layer, cached, output in zip(network.layers, self.layers, outputs, strict=True):
            rows = select_sequences(output, sequences)[:, new]
            _, k, v = layer.self_attn.project(layer.attention_input(rows), 0)
            for buffer, projected in ((cached.keys, k), (cached.values, v)):
                write_sequences(buffer[:, :, new], sequences, projected)
        super().end_segment(sequences, position, network)
