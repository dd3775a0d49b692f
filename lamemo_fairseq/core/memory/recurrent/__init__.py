"""Transformer-XL's memory: the last M inputs of every layer, frozen (Dai et al. 2019, section 3.2).

Shapes: B streams, N current tokens, m <= M memory slots, d model width.
"""

from dataclasses import dataclass
from typing import ClassVar, Optional, Sequence, Tuple, Type

from torch import Tensor

from ...decoding.cache import AnyCache, FrozenCache, fill_slots
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
    last_rows,
)


@dataclass(frozen=True)
class RecurrentState(MemoryState):
    """The last inputs of each layer."""

    hidden: Tuple[Tensor, ...]  # a layer: [B, m, d]


@MEMORIES.register("recurrent")
class RecurrentMemory(Memory[RecurrentState, MemoryOptions]):
    """Segment-level recurrence."""

    architecture: ClassVar[Architecture] = Architecture(
        name="transformer_xl_lm",
        class_name="TransformerXLLanguageModel",
        summary="Transformer-XL: recurrent memory, relative positions (Dai et al. 2019).",
        defaults={"position_encoding": "transformer-xl"},
    )
    state: ClassVar[Type[MemoryState]] = RecurrentState
    cache: ClassVar[Type[AnyCache]] = FrozenCache
    slots_are_tokens: ClassVar[bool] = True
    fills_caches: ClassVar[bool] = True

    def initial_state(self, x: Tensor) -> RecurrentState:
        return RecurrentState((x.new_empty(x.size(0), 0, x.size(2)),) * self.config.layers)

    def reach(self, state: RecurrentState, current: int) -> Tuple[int, Optional[range]]:
        return state.hidden[0].size(1) + current, None

    def pass_layer(
        self, n: int, layer: DecoderLayer, rows: Tensor, before: LayerState, segment: Segment
    ) -> LayerPassage:
        (past,) = before
        joined = join(past.to(rows), rows)
        hidden = last_rows(joined, self.config.mem_len)
        out, _ = layer(joined, segment.biases[n], segment.tokens)
        return LayerPassage(out, (hidden,))

    def fill_cache(self, cache: AnyCache, parts: Sequence[LayerState], layers: Sequence[DecoderLayer]) -> None:
        fill_slots(cache, parts, layers, self.slots)
