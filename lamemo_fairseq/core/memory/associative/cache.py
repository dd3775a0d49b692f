"""The decoding cache of associative memory: new tokens read a layer's matrix, and full segments are written into it.

Memory tokens need no columns, as no token attends to them: they pass through the layers when a segment is full.

Shapes: B sequences, b of them, N tokens of a segment, M memory slots, m memory tokens, H heads, D size of a head,
d model width, F features of a key, k new tokens.
"""

from dataclasses import dataclass
from typing import ClassVar, Optional, Protocol, Tuple, cast

import torch
from torch import Tensor

from ...decoding.cache import LayerCache, SegmentCache, SequencePosition, counts, select_sequences, write_sequences
from ...decoding.interfaces import CachedMemory, Network
from ...kernels.padded import WideRows
from ...layers import DecoderLayer, SelfAttention
from ...positions import LayerBias
from .association import Associations
from .attention import AssociativeSelfAttention


class WithMatrices(CachedMemory, Protocol):
    """A memory whose layers have matrices, and memory tokens that write them."""

    @property
    def features(self) -> int: ...
    def first_tokens(self, like: Tensor) -> Tensor: ...


@dataclass
class AssociativeLayerCache(LayerCache):
    """Keys, values, and the layer's matrix: zeros until the first segment is full, which add nothing."""

    associations: Associations  # of [B, F, d] and [B, F]

    changes_inputs: ClassVar[bool] = True

    def enter(self, attention: SelfAttention, rows: Tensor) -> Tensor:
        return cast(AssociativeSelfAttention, attention).association.read(rows, self.associations)


@dataclass
class AssociativeCache(SegmentCache[WithMatrices, AssociativeLayerCache]):
    """Keys, values and matrices. `SequencePosition.own` is 1 once a segment has been written, else 0."""

    @classmethod
    def empty(cls, memory: WithMatrices, batch_size: int, like: Tensor) -> "AssociativeCache":
        size = (batch_size, memory.features, memory.config.embed_dim)
        exact = torch.promote_types(like.dtype, torch.float32)
        layers = [
            AssociativeLayerCache(
                *LayerCache.zeros(memory, batch_size, like),
                Associations(like.new_zeros(size, dtype=exact), like.new_zeros(size[:2], dtype=exact)),
            )
            for _ in range(memory.config.layers)
        ]
        return cls(layers, counts(batch_size, like), counts(batch_size, like), [SequencePosition()] * batch_size)

    def end_segment(
        self, sequences: Optional[Tensor], position: SequencePosition, network: Network[WithMatrices]
    ) -> None:
        """Pass the memory tokens through the layers over the segment's keys and values, and write the matrices."""
        memory = network.memory
        x = memory.first_tokens(select_sequences(self.layers[0].keys, sequences))
        biases = network.positions(position.slots + memory.period + x.size(1), None, x)
        seen = slice(memory.slots - position.slots, None)
        for layer, bias, cached in zip(network.layers, biases, self.layers, strict=True):
            association = cast(AssociativeSelfAttention, layer.self_attn).association
            past = None
            if position.own:
                past = Associations(*(select_sequences(buffer, sequences) for buffer in cached.associations))
                x = association.read(x, past)
            x = _through(layer, bias, cached, x, sequences, seen)
            for buffer, new in zip(cached.associations, association.write(x, past), strict=True):
                write_sequences(buffer, sequences, new)
        super().end_segment(sequences, position, network)

    def next_position(self, position: SequencePosition, network: Network[WithMatrices]) -> SequencePosition:
        return super().next_position(position, network)._replace(own=1)


def _through(
    layer: DecoderLayer, bias: LayerBias, cached: LayerCache, x: Tensor, sequences: Optional[Tensor], seen: slice
) -> Tensor:
    """Pass memory tokens ``x [b, m, d]``, which see the columns *seen* before them, through a layer."""
    attention = layer.self_attn

    def attend(normed: Tensor) -> Tuple[WideRows, None]:
        q, k, v = attention.project(normed, normed.size(1))
        keys, values = (
            torch.cat([select_sequences(buffer[:, :, seen], sequences), own], dim=2)
            for buffer, own in ((cached.keys, k), (cached.values, v))
        )
        return attention.merge_heads(attention.causal(q, keys, values, bias, need_normalizer=False).output), None

    return layer.around(x, attend)[0]
