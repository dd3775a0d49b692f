"""The decoding cache of memory tokens: they are read when a segment begins and written when it is full.

Columns: M of the cache, K of the read block, N of the segment's tokens. The slots of a sequence are its m cached rows
and K memory tokens. The write block needs no columns: no token ever attends to it.

Shapes: B sequences, b of them, N tokens of a segment, K memory tokens, m <= M cached rows, H heads, D size of a head,
d model width.
"""

from dataclasses import dataclass
from typing import Optional, Protocol, Tuple, cast

import torch
from torch import Tensor

from ...decoding.cache import LayerCache, SegmentCache, SequencePosition, counts, select_sequences, write_sequences
from ...decoding.interfaces import CachedMemory, MemorySizes, Network
from ...kernels.padded import WideRows
from ...layers import DecoderLayer
from ...positions import LayerBias
from .attention import TokenSelfAttention
from .options import TokenOptions


class TokenSizes(MemorySizes, Protocol):
    """Sizes, with the options of memory tokens."""

    @property
    def options(self) -> TokenOptions: ...


class WithTokens(CachedMemory, Protocol):
    """A memory that begins with learned memory tokens."""

    @property
    def config(self) -> TokenSizes: ...
    def first_tokens(self, like: Tensor) -> Tensor: ...


@dataclass
class TokenCache(SegmentCache[WithTokens, LayerCache]):
    """Keys, values, and the memory tokens that the current segment reads."""

    memory_tokens: Tensor  # [B, K, d]

    @classmethod
    def empty(cls, memory: WithTokens, batch_size: int, like: Tensor) -> "TokenCache":
        layers = [LayerCache(*LayerCache.zeros(memory, batch_size, like)) for _ in range(memory.config.layers)]
        begin = SequencePosition(slots=memory.config.options.memory_tokens)
        first = memory.first_tokens(like.new_empty(batch_size, 0, like.size(-1))).detach().clone()
        return cls(layers, counts(batch_size, like), counts(batch_size, like), [begin] * batch_size, first)

    def refresh(self, sequences: Optional[Tensor], slots: int, first: Tensor, network: Network[WithTokens]) -> None:
        """Read the memory tokens: keys and values of the read block."""
        self._pass(sequences, slots, network, write=False)

    def end_segment(
        self, sequences: Optional[Tensor], position: SequencePosition, network: Network[WithTokens]
    ) -> None:
        """Write the memory tokens, and let the segment's last tokens enter the cache."""
        write_sequences(self.memory_tokens, sequences, self._pass(sequences, position.slots, network, write=True))
        mem_len, size = network.memory.config.mem_len, self.memory_tokens.size(1)
        for _, buffer in self.column_buffers():
            columns = select_sequences(buffer, sequences)
            cached = torch.cat([columns[:, :, :mem_len], columns[:, :, mem_len + size :]], dim=2)
            write_sequences(buffer[:, :, :mem_len], sequences, cached[:, :, cached.size(2) - mem_len :])

    def _pass(self, sequences: Optional[Tensor], slots: int, network: Network[WithTokens], write: bool) -> Tensor:
        """Pass a block of memory tokens through the layers, the write block or the read block: ``[b, K, d]``."""
        memory, x = network.memory, select_sequences(self.memory_tokens, sequences)
        mem_len, size = memory.config.mem_len, x.size(1)
        oldest = mem_len + size - slots if memory.config.options.memory_reads_cache else mem_len
        before = slice(oldest, None if write else mem_len)
        own = None if write else slice(mem_len, mem_len + size)
        biases = network.positions(slots + (memory.period + size if write else 0), range(size), x)
        for layer, bias, cached in zip(network.layers, biases, self.layers, strict=True):
            x = _through(layer, bias, cached, x, sequences, before, own)
        return x


def _through(
    layer: DecoderLayer,
    bias: LayerBias,
    cached: LayerCache,
    x: Tensor,
    sequences: Optional[Tensor],
    before: slice,
    own: Optional[slice],
) -> Tensor:
    """Pass a block ``x [b, K, d]``, which sees the columns *before* it, through a layer.

    Its keys and values are written into the columns *own*, if it has some.
    """
    attention = cast(TokenSelfAttention, layer.self_attn)

    def attend(normed: Tensor) -> Tuple[WideRows, None]:
        q, k, v = attention.project(normed, normed.size(1))
        return attention.merge_heads(attention.block(q, seen(cached.keys, k), seen(cached.values, v), bias)), None

    def seen(buffer: Tensor, block: Tensor) -> Tensor:
        if own is not None:
            write_sequences(buffer[:, :, own], sequences, block)
        return torch.cat([select_sequences(buffer[:, :, before], sequences), block], dim=2)

    return layer.around(x, attend)[0]
