"""No memory: each segment is read on its own.

Shapes: B streams, N tokens of a segment, d model width.
"""

from dataclasses import dataclass
from typing import ClassVar, Sequence, Type

from torch import Tensor

from ...decoding.cache import AnyCache, FrozenCache
from ...layers import DecoderLayer
from ..base import MEMORIES, Architecture, LayerPassage, LayerState, Memory, MemoryOptions, MemoryState, Segment


@dataclass(frozen=True)
class EmptyState(MemoryState):
    """Nothing."""


@MEMORIES.register("none")
class EmptyMemory(Memory[EmptyState, MemoryOptions]):
    """The baseline without memory."""

    architecture: ClassVar[Architecture] = Architecture(
        name="relative_transformer_lm",
        class_name="RelativeTransformerLanguageModel",
        summary="A Transformer with relative positions and no memory.",
        defaults={"position_encoding": "transformer-xl"},
    )
    state: ClassVar[Type[MemoryState]] = EmptyState
    cache: ClassVar[Type[AnyCache]] = FrozenCache
    remembers: ClassVar[bool] = False
    has_slots: ClassVar[bool] = False
    slots_are_tokens: ClassVar[bool] = True
    fills_caches: ClassVar[bool] = True

    def initial_state(self, x: Tensor) -> EmptyState:
        return EmptyState()

    def pass_layer(
        self, n: int, layer: DecoderLayer, rows: Tensor, before: LayerState, segment: Segment
    ) -> LayerPassage:
        out, _ = layer(rows, segment.biases[n], segment.tokens)
        return LayerPassage(out, ())

    def fill_cache(self, cache: AnyCache, parts: Sequence[LayerState], layers: Sequence[DecoderLayer]) -> None:
        """Fill nothing, as there are no slots."""
