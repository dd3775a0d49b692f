"""The decoding cache of a continuous memory, and its update once a segment.

Shapes: B sequences, b of them, N tokens of a segment, m <= M memory slots, C = M + N columns, H heads,
D size of a head, J basis functions, d model width.
"""

from dataclasses import dataclass
from typing import Optional, Protocol, cast

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
from ...layers import SelfAttention
from .attention import ContinuousSelfAttention, LongTerm
from .signal import Signal


class TakingIn(CachedMemory, Protocol):
    """A memory whose signals take in the rows that leave its slots."""

    signal: Signal

    def leaving(self, slots: int, current: int) -> int: ...


@dataclass
class ContinuousLayerCache(InputLayerCache):
    """Keys, values, the rows that go into the layer, the signal, and the signal's keys and values for queries."""

    coefficients: Tensor  # [B, J, d], float32 or wider
    long_term: LongTerm

    def combine(self, attention: SelfAttention, q: Tensor, attended: Attended) -> Tensor:
        return cast(ContinuousSelfAttention, attention).combine(q, attended.output, self.long_term)[0]


@dataclass
class ContinuousCache(SegmentCache[TakingIn, ContinuousLayerCache]):
    """Signals, and the numbers of their rows."""

    taken_in: Tensor  # [B, 1] int64

    @classmethod
    def empty(cls, memory: TakingIn, batch_size: int, like: Tensor) -> "ContinuousCache":
        config, basis, exact = memory.config, memory.signal.basis, torch.promote_types(like.dtype, torch.float32)
        layers = [
            ContinuousLayerCache(
                *LayerCache.zeros(memory, batch_size, like),
                inputs=like.new_zeros(batch_size, memory.slots + memory.period, config.embed_dim),
                coefficients=like.new_zeros(batch_size, basis.count, config.embed_dim, dtype=exact),
                long_term=LongTerm(
                    like.new_zeros(batch_size, config.heads, 2, config.head_dim, dtype=exact),
                    like.new_zeros(batch_size, config.heads, basis.count, config.head_dim),
                ),
            )
            for _ in range(config.layers)
        ]
        begin = counts(batch_size, like), counts(batch_size, like), [SequencePosition()] * batch_size
        return cls(layers, *begin, taken_in=counts(batch_size, like).unsqueeze(1))

    def end_segment(self, sequences: Optional[Tensor], position: SequencePosition, network: Network[TakingIn]) -> None:
        leaving = network.memory.leaving(position.slots, network.memory.period)
        if leaving > 0:
            self._extend(sequences, position.slots, leaving, network)
        super().end_segment(sequences, position, network)

    def _extend(self, sequences: Optional[Tensor], slots: int, leaving: int, network: Network[TakingIn]) -> None:
        """Let the signals of *sequences* take in the rows that leave their slots."""
        memory = network.memory
        taken_in = select_sequences(self.taken_in, sequences)
        for layer, cached in zip(network.layers, self.layers, strict=True):
            attention = cast(ContinuousSelfAttention, layer.self_attn)
            inputs = select_sequences(cached.inputs, sequences)[:, memory.slots - slots :]
            # Queries are not cached: once a segment, they are computed again.
            q, _, _ = attention.project(layer.attention_input(inputs[:, slots:]), memory.period)
            density = attention.locate(
                q, LongTerm(*(select_sequences(buffer, sequences) for buffer in cached.long_term))
            )
            past = select_sequences(cached.coefficients, sequences)
            coefficients = memory.signal.extend(past, taken_in, inputs[:, :leaving], density)
            write_sequences(cached.coefficients, sequences, coefficients)
            for buffer, new in zip(cached.long_term, attention.long_term(coefficients), strict=True):
                write_sequences(buffer, sequences, new)
        write_sequences(self.taken_in, sequences, taken_in + leaving)
