"""LaMemo's look-ahead memory (Ji et al. 2022): slots that attend to the tokens that came after them.

A refresh rebuilds the slots' rows through all layers from stored embeddings. Stored read-outs and normalisers make it
incremental: its cost is linear in the memory length.

Shapes: B streams, N current tokens, m <= M memory slots, H heads, D size of a head, d model width.
"""

from dataclasses import dataclass
from typing import ClassVar, List, Optional, Sequence, Tuple, Type, cast

import torch
from torch import Tensor

from ...attention import Attended
from ...decoding.cache import AnyCache
from ...kernels.padded import join
from ...layers import DecoderLayer, SelfAttention
from ..base import (
    MEMORIES,
    Architecture,
    LayerPassage,
    LayerState,
    Memory,
    MemoryState,
    Segment,
    last_rows,
    no_contribution,
)
from .attention import LookaheadSelfAttention, counted_memory_attention, lookahead_attention, memory_attention
from .cache import LookaheadCache
from .options import LookaheadOptions
from .windows import WINDOWS, LookaheadWindow

__all__ = [
    "WINDOWS",
    "LookaheadMemory",
    "LookaheadOptions",
    "LookaheadState",
    "LookaheadWindow",
    "counted_memory_attention",
    "lookahead_attention",
    "memory_attention",
]


@dataclass(frozen=True)
class LookaheadState(MemoryState):
    """Embeddings of the slots, and the slots' read-outs and normalisers in each layer but the last."""

    embeddings: Tensor  # [B, m, d], after dropout
    outputs: Tuple[Tensor, ...]  # a layer: [B, H, m, D], before the output projection
    normalizers: Tuple[Tensor, ...]  # a layer: [B, H, m], logsumexp of the scores, float32 or wider


@MEMORIES.register("lookahead")
class LookaheadMemory(Memory[LookaheadState, LookaheadOptions]):
    """Refreshes every slot once a segment."""

    architecture: ClassVar[Architecture] = Architecture(
        name="lamemo_lm",
        class_name="LaMemoLanguageModel",
        summary="LaMemo: look-ahead memory, disentangled positions (Ji et al. 2022).",
    )
    options: ClassVar[Type[LookaheadOptions]] = LookaheadOptions
    attention: ClassVar[Type[SelfAttention]] = LookaheadSelfAttention
    state: ClassVar[Type[MemoryState]] = LookaheadState
    cache: ClassVar[Type[AnyCache]] = LookaheadCache
    looks_ahead: ClassVar[bool] = True
    slots_are_tokens: ClassVar[bool] = True
    fills_caches: ClassVar[bool] = True

    def initial_state(self, x: Tensor) -> LookaheadState:
        batch, heads, size = x.size(0), self.config.heads, self.config.head_dim
        exact = torch.promote_types(x.dtype, torch.float32)
        refreshed = self.config.layers - 1
        return LookaheadState(
            embeddings=x.new_empty(batch, 0, x.size(2)),
            outputs=(x.new_empty(batch, heads, 0, size),) * refreshed,
            normalizers=(x.new_empty(batch, heads, 0, dtype=exact),) * refreshed,
        )

    def window(self, slots: int, current: int) -> LookaheadWindow:
        """Return the keys that *slots* slots look ahead at in a segment of *current* tokens."""
        return WINDOWS[str(self.config.options.lookahead_window)](slots, current)

    def layer_states(self, state: LookaheadState) -> List[LayerState]:
        """Return read-outs and normalisers of each layer but the last, after the embeddings in the first."""
        first, *others = [*zip(state.outputs, state.normalizers, strict=True), ()]
        return [(state.embeddings, *first), *others]

    def joined(self, parts: Sequence[LayerState], like: LookaheadState) -> LookaheadState:
        (embeddings, *first), *others = parts
        attended = [tuple(first), *others][:-1]
        return LookaheadState(embeddings, tuple(a[0] for a in attended), tuple(a[1] for a in attended))

    def reach(self, state: LookaheadState, current: int) -> Tuple[int, Optional[range]]:
        slots = state.embeddings.size(1)
        return slots + current, self.window(slots, current).distances(slots) if slots > 0 else range(0)

    def pass_layer(
        self, n: int, layer: DecoderLayer, rows: Tensor, before: LayerState, segment: Segment
    ) -> LayerPassage:
        embeddings, stored = (before[:1], before[1:]) if n == 0 else ((), before)
        if n == 0:
            rows = join(embeddings[0].to(rows), rows)
            embeddings = (last_rows(rows, self.config.mem_len),)
        slots, bias = rows.size(1) - segment.tokens, segment.biases[n]
        window = self.window(slots, segment.tokens)._replace(lengths=segment.lengths) if slots > 0 else None
        out, carried = layer(rows, bias, window, Attended(*stored) if stored else None, segment.tokens)
        if self.training and n == self.config.layers - 1 and (slots == 0 or n == 0):
            # Without slots nothing uses the biases of the look-ahead.
            ahead = segment.biases[0].ahead
            assert ahead is not None
            out = out + no_contribution(ahead[:2])
        return LayerPassage(out, (*embeddings, *(carried or ())))

    def fill_cache(self, cache: AnyCache, parts: Sequence[LayerState], layers: Sequence[DecoderLayer]) -> None:
        """Fill in all that the refresh needs, which makes keys and values of the slots."""
        (embeddings, *first), *others = parts
        in_slots = slice(0, self.slots)
        cast(LookaheadCache, cache).embeddings[:, in_slots].copy_(embeddings)
        for cached, part in zip(cache.layers, [first, *others], strict=True):
            for buffer, stored in zip(cached.past or (), part, strict=True):
                buffer[:, :, in_slots].copy_(stored)
