"""ERNIE-Doc's enhanced recurrence: a layer's memory is its own output (Ding et al. 2021, arXiv 2012.15688).

Transformer-XL's layer n reads its inputs of earlier segments, so that the reach grows with the depth. Here layer n
reads its outputs, which have already read their own past: the reach has no bound, at the same cost.

The paper's retrospective feed is left out: it shows a whole document before the document is read again, and so the
future.

Shapes: B streams, N current tokens, m <= M memory slots, d model width.
"""

from dataclasses import dataclass
from typing import ClassVar, Optional, Sequence, Tuple, Type

from torch import Tensor

from ...decoding.cache import AnyCache, fill_slots
from ...kernels.padded import join
from ...layers import DecoderLayer
from ..base import (
    MEMORIES,
    Architecture,
    LayerPassage,
    LayerState,
    Memory,
    MemoryOptions,
    MemoryState,
    Segment,
    last_of_both,
)
from .cache import EnhancedCache


@dataclass(frozen=True)
class EnhancedState(MemoryState):
    """The last outputs of each layer."""

    outputs: Tuple[Tensor, ...]  # a layer: [B, m, d]


@MEMORIES.register("enhanced")
class EnhancedMemory(Memory[EnhancedState, MemoryOptions]):
    """Layer n has ``k, v`` over ``[SG(h^n of earlier segments) ; h^(n-1)]`` (section 3.3).

    There are no slots before the first segment; the authors' code attends to zero rows there. A layer that normalises
    its input normalises the slots with it.
    """

    architecture: ClassVar[Architecture] = Architecture(
        name="ernie_doc_lm",
        class_name="ErnieDocLanguageModel",
        summary="ERNIE-Doc's enhanced recurrence: a layer's memory is its own output (Ding et al. 2021).",
        defaults={"position_encoding": "transformer-xl"},
    )
    state: ClassVar[Type[MemoryState]] = EnhancedState
    cache: ClassVar[Type[AnyCache]] = EnhancedCache
    slots_are_tokens: ClassVar[bool] = True
    fills_caches: ClassVar[bool] = True

    def initial_state(self, x: Tensor) -> EnhancedState:
        return EnhancedState((x.new_empty(x.size(0), 0, x.size(2)),) * self.config.layers)

    def reach(self, state: EnhancedState, current: int) -> Tuple[int, Optional[range]]:
        return state.outputs[0].size(1) + current, None

    def pass_layer(
        self, n: int, layer: DecoderLayer, rows: Tensor, before: LayerState, segment: Segment
    ) -> LayerPassage:
        past = before[0].to(rows)
        out, _ = layer(join(past, rows), segment.biases[n], segment.tokens)
        return LayerPassage(out, (last_of_both(past, out, self.config.mem_len),))

    def fill_cache(self, cache: AnyCache, parts: Sequence[LayerState], layers: Sequence[DecoderLayer]) -> None:
        fill_slots(cache, parts, layers, self.slots)
