"""LaMemo's look-ahead memory (Ji et al. 2022): slots that attend to the tokens that came after them.

A refresh rebuilds the slots' rows through all layers from stored embeddings. Stored read-outs and normalisers make it
incremental: its cost is linear in the memory length.

Shapes: B streams, N current tokens, m <= M memory slots, H heads, D size of a head, d model width.
"""

from dataclasses import dataclass
from typing import ClassVar, Optional, Sequence, Tuple, Type

import torch
from torch import Tensor

from ...attention import Attended
from ...decoding.cache import AnyCache
from ...kernels.padded import join
from ...layers import DecoderLayer, SelfAttention
from ...positions import Positions
from ..base import MEMORIES, Architecture, Memory, MemoryState, Passage, last_rows, no_contribution
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

    def forward(
        self,
        x: Tensor,
        state: LookaheadState,
        layers: Sequence[DecoderLayer],
        positions: Positions,
        lengths: Optional[Tensor] = None,
    ) -> Passage:
        current, slots = x.size(1), state.embeddings.size(1)
        window = None
        if slots > 0:
            window = self.window(slots, current)._replace(lengths=lengths)
        biases = positions(slots + current, range(0) if window is None else window.distances(slots), x)

        rows = join(state.embeddings.to(x), x)
        embeddings = last_rows(rows, self.config.mem_len)
        outputs, normalizers = [], []
        past = [Attended(*pair) for pair in zip(state.outputs, state.normalizers, strict=True)]
        for layer, bias, stored in zip(layers, biases, [*past, None], strict=True):
            rows, carried = layer(rows, bias, window, stored, current)
            if carried is not None:
                outputs.append(carried.output)
                normalizers.append(carried.normalizer)
        if self.training and (window is None or len(layers) == 1):
            # Without slots nothing uses the biases of the look-ahead.
            ahead = biases[0].ahead
            assert ahead is not None
            rows = rows + no_contribution(ahead[:2])
        return Passage(rows, LookaheadState(embeddings, tuple(outputs), tuple(normalizers)))
