"""The decoding cache of Infini-attention: keys and values of the unfinished segment, which are written when it is full.

Shapes: B sequences, b of them, N tokens of a segment, H heads, D size of a head.
"""

from dataclasses import dataclass
from typing import Optional, cast

import torch
from torch import Tensor

from ...attention import Attended
from ...decoding.cache import LayerCache, SegmentCache, SequencePosition, counts, select_sequences, write_sequences
from ...decoding.interfaces import CachedMemory, Network
from ...layers import SelfAttention
from .attention import Associations, InfiniSelfAttention


@dataclass
class InfiniLayerCache(LayerCache):
    """Keys and values ``[B, H, N, D]``, and the associations that full segments have written."""

    past: Associations

    def combine(self, attention: SelfAttention, q: Tensor, attended: Attended) -> Tensor:
        return cast(InfiniSelfAttention, attention).combine(q, attended.output, self.past)


class InfiniCache(SegmentCache[CachedMemory, InfiniLayerCache]):
    """A cache without slots. A segment overwrites the columns of the segment before."""

    @classmethod
    def empty(cls, memory: CachedMemory, batch_size: int, like: Tensor) -> "InfiniCache":
        layers = [
            InfiniLayerCache(
                *LayerCache.zeros(memory, batch_size, like),
                empty_associations(batch_size, memory.config.heads, memory.config.head_dim, like),
            )
            for _ in range(memory.config.layers)
        ]
        return cls(layers, counts(batch_size, like), counts(batch_size, like), [SequencePosition()] * batch_size)

    def end_segment(
        self, sequences: Optional[Tensor], position: SequencePosition, network: Network[CachedMemory]
    ) -> None:
        """Write the tokens of *sequences*, whose segments are full."""
        for layer, cached in zip(network.layers, self.layers, strict=True):
            attention = cast(InfiniSelfAttention, layer.self_attn)
            past = Associations(*(select_sequences(buffer, sequences) for buffer in cached.past))
            k, v = (select_sequences(buffer, sequences) for buffer in (cached.keys, cached.values))
            for buffer, new in zip(cached.past, attention.write(past, k, v), strict=True):
                write_sequences(buffer, sequences, new)


def empty_associations(batch_size: int, heads: int, head_dim: int, like: Tensor) -> Associations:
    """Return the associations before the first segment, on the device of *like* and in float32 or wider."""
    exact = torch.promote_types(like.dtype, torch.float32)
    return Associations(
        matrix=like.new_zeros(batch_size, heads, head_dim, head_dim, dtype=exact),
        normalizer=like.new_zeros(batch_size, heads, head_dim, dtype=exact),
        written=torch.zeros(batch_size, 1, dtype=torch.bool, device=like.device),
    )
