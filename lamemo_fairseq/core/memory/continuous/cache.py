"""What decoding keeps of a continuous memory, and its update once a segment.

Shapes: B rows, b of them, N tokens of a segment, m <= M memory slots, H heads, D size of a head, J basis functions,
d model width.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Dict, List, Optional

import torch
from torch import Tensor

from ...decoding.cache import Network, Record, SegmentCache, put, take
from .attention import LongTerm


@dataclass
class ContinuousCache(SegmentCache):
    """Besides keys and values, the rows that go into each layer, the signals, and what queries read of them."""

    inputs: List[Tensor] = field(default_factory=list)  # a layer: [B, M + N, d]
    coefficients: List[Tensor] = field(default_factory=list)  # a layer: [B, J, d], float32 or wider
    long_term_keys: List[Tensor] = field(default_factory=list)  # a layer: as in `LongTerm`
    long_term_values: List[Tensor] = field(default_factory=list)
    taken_in: List[Tensor] = field(default_factory=list)  # one: [B, 1] int64

    columns: ClassVar[Dict[str, int]] = {"inputs": 1}

    @classmethod
    def empty(cls, memory: Any, rows: int, like: Tensor) -> "ContinuousCache":
        base, config, basis = SegmentCache.empty(memory, rows, like), memory.config, memory.signal.basis
        exact = torch.promote_types(like.dtype, torch.float32)

        def zeros(*size: int, dtype: torch.dtype = like.dtype) -> List[Tensor]:
            return [like.new_zeros(rows, *size, dtype=dtype) for _ in range(config.layers)]

        return cls(
            **vars(base),
            inputs=zeros(memory.slots + memory.period, config.embed_dim),
            coefficients=zeros(basis.count, config.embed_dim, dtype=exact),
            long_term_keys=zeros(config.heads, 2, config.head_dim, dtype=exact),
            long_term_values=zeros(config.heads, basis.count, config.head_dim),
            taken_in=[torch.zeros(rows, 1, dtype=torch.int64, device=like.device)],
        )

    def record(self, layer: int) -> Record:
        return Record(inputs=self.inputs[layer], context=self._long_term(layer))

    def close(self, rows: Optional[Tensor], slots: int, network: Network) -> None:
        leaving = network.memory.leaving(slots, network.memory.period)
        if leaving > 0:
            self._extend(rows, slots, leaving, network)
        super().close(rows, slots, network)

    def _extend(self, rows: Optional[Tensor], slots: int, leaving: int, network: Network) -> None:
        """Let the signals of *rows* take in what leaves their slots."""
        memory = network.memory

        taken_in = take(self.taken_in[0], rows)
        layers: Any = network.layers
        for i, layer in enumerate(layers):
            attn, inputs = layer.self_attn, take(self.inputs[i], rows)[:, memory.slots - slots :]
            # Queries are not kept: once a segment, they are computed again.
            q, _, _ = attn.project(layer.attention_input(inputs[:, slots:]), memory.period)
            density = attn.locate(q, LongTerm(*(take(held, rows) for held in self._long_term(i))))
            coefficients = memory.signal.extend(
                take(self.coefficients[i], rows), taken_in, inputs[:, :leaving], density
            )
            put(self.coefficients[i], rows, coefficients)
            for buffer, new in zip(self._long_term(i), attn.long_term(coefficients), strict=True):
                put(buffer, rows, new)
        put(self.taken_in[0], rows, taken_in + leaving)

    def _long_term(self, layer: int) -> LongTerm:
        return LongTerm(self.long_term_keys[layer], self.long_term_values[layer])
