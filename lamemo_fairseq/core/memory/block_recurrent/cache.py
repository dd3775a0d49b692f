"""The decoding cache of a block-recurrent memory: states are updated when a window is full.

Shapes: B sequences, b of them, N tokens of a window, M memory slots, C = M + N columns, S states, H heads,
D size of a head, d model width, k new tokens.
"""

from dataclasses import dataclass
from typing import ClassVar, List, Optional, Protocol, cast

import torch
from torch import Tensor

from ...decoding.cache import LayerCache, SegmentCache, SequencePosition, counts, select_sequences, write_sequences
from ...decoding.interfaces import CachedMemory, Network
from ...layers import SelfAttention
from .attention import KeyValues, RecurrentSelfAttention
from .cell import RecurrentCell


class WithCells(CachedMemory, Protocol):
    """A memory some of whose layers have states."""

    def cell(self, layer: int) -> Optional[RecurrentCell]: ...


@dataclass
class RecurrentLayerCache(LayerCache):
    """Keys and values of tokens and of states, and the states."""

    states: Tensor  # [B, S, d], float32 or wider
    key_values: KeyValues  # [B, H, S, D], of the states

    joins_heads: ClassVar[bool] = True

    def join(self, attention: SelfAttention, rows: Tensor, heads: Tensor) -> Tensor:
        return cast(RecurrentSelfAttention, attention).join(heads, rows, self.key_values)


class BlockRecurrentCache(SegmentCache[WithCells, LayerCache]):
    """Keys and values, and the states of recurrent layers."""

    @classmethod
    def empty(cls, memory: WithCells, batch_size: int, like: Tensor) -> "BlockRecurrentCache":
        layers: List[LayerCache] = []
        exact = torch.promote_types(like.dtype, torch.float32)
        for n in range(memory.config.layers):
            cell, buffers = memory.cell(n), LayerCache.zeros(memory, batch_size, like)
            if cell is None:
                layers.append(LayerCache(*buffers))
            else:
                with torch.no_grad():
                    states = cell.begin(like.new_empty(batch_size, 0, like.size(-1), dtype=exact)).clone()
                    key_values = cell.project(states, like).key_values
                contiguous = KeyValues(*(t.contiguous() for t in key_values))
                layers.append(RecurrentLayerCache(*buffers, states, contiguous))
        return cls(layers, counts(batch_size, like), counts(batch_size, like), [SequencePosition()] * batch_size)

    def end_segment(self, sequences: Optional[Tensor], position: SequencePosition, network: Network[WithCells]) -> None:
        """Update the states of *sequences*, whose windows are full, and move the columns on."""
        seen = slice(network.memory.slots - position.slots, None)
        for n, (layer, cached) in enumerate(zip(network.layers, self.layers, strict=True)):
            cell = network.memory.cell(n)
            if cell is None:
                continue
            recurrent = cast(RecurrentLayerCache, cached)
            tokens = KeyValues(*(select_sequences(t, sequences)[:, :, seen] for t in (cached.keys, cached.values)))
            states = select_sequences(recurrent.states, sequences)
            heads = cell.project(states, cached.keys)
            states = cell.update(states, heads, tokens, layer.self_attn.config.backend)
            write_sequences(recurrent.states, sequences, states)
            for buffer, new in zip(recurrent.key_values, cell.project(states, cached.keys).key_values, strict=True):
                write_sequences(buffer, sequences, new)
        super().end_segment(sequences, position, network)
