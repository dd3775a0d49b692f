"""What token-by-token decoding keeps of memory tokens: they are read when a segment begins and written when it is full.

Columns: M of the cache, K of the read block, S of the segment's tokens, so that the slots of a row are its m cached
rows and K memory tokens. The write block needs no columns: no token ever attends to it.

Shapes: B rows, b of them, S tokens of a segment, K memory tokens, m <= M cached rows, H heads, D size of a head,
d model width.
"""

from dataclasses import dataclass, field
from typing import Any, List, Optional

import torch
from torch import Tensor

from ...decoding.cache import Network, Place, SegmentCache, put, take


@dataclass
class TokenCache(SegmentCache):
    """Besides keys and values, the memory tokens that the current segment reads."""

    memory_tokens: List[Tensor] = field(default_factory=list)  # one: [B, K, d]

    @classmethod
    def empty(cls, memory: Any, rows: int, like: Tensor) -> "TokenCache":
        base = SegmentCache.empty(memory, rows, like)
        begin = Place(slots=memory.config.options.memory_tokens)
        base.places = [begin] * rows
        base.sync()
        first = memory.first_tokens(like.new_empty(rows, 0, like.size(-1)))
        return cls(**vars(base), memory_tokens=[first.detach().clone()])

    def open(self, rows: Optional[Tensor], slots: int, first: Tensor, network: Network) -> None:
        """Read the memory tokens: keys and values of the read block."""
        self._pass(rows, slots, network, write=False)

    def close(self, rows: Optional[Tensor], slots: int, network: Network) -> None:
        """Write the memory tokens, and let the segment's last tokens enter the cache."""
        put(self.memory_tokens[0], rows, self._pass(rows, slots, network, write=True))
        mem_len, size = network.memory.config.mem_len, self.memory_tokens[0].size(1)
        for buffer in (*self.keys, *self.values):
            some = take(buffer, rows)
            cached = torch.cat([some[:, :, :mem_len], some[:, :, mem_len + size :]], dim=2)
            put(buffer[:, :, :mem_len], rows, cached[:, :, cached.size(2) - mem_len :])

    def _pass(self, rows: Optional[Tensor], slots: int, network: Network, write: bool) -> Tensor:
        """Pass a block of memory tokens through the layers, the write block or the read block: ``[b, K, d]``."""
        memory, tokens = network.memory, take(self.memory_tokens[0], rows)
        mem_len, size = memory.config.mem_len, tokens.size(1)
        oldest = mem_len + size - slots if memory.config.options.memory_reads_cache else mem_len
        before = slice(oldest, None if write else mem_len)
        biases = network.positions(slots + (memory.period + size if write else 0), range(size), tokens)
        x, layers = tokens, list(network.layers)
        for i, bias in enumerate(biases):
            layer: Any = layers[i]

            def attend(
                normed: Tensor, attn: Any = layer.self_attn, bias: Any = bias, i: int = i
            ) -> tuple[Tensor, None]:
                q, *new = attn.project(normed, size)
                seen = []
                for buffer, own in zip((self.keys[i], self.values[i]), new, strict=True):
                    if not write:
                        put(buffer[:, :, mem_len : mem_len + size], rows, own)
                    seen.append(torch.cat([take(buffer[:, :, before], rows), own], dim=2))
                return attn.merge_heads(attn.block(q, *seen, bias)), None

            x, _ = layer.around(x, attend)
        return x
