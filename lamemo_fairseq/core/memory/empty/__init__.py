"""No memory: each segment is read on its own.

Shapes: B streams, N tokens of a segment, d model width.
"""

from dataclasses import dataclass
from typing import ClassVar, Optional, Sequence, Type

from torch import Tensor

from ...layers import DecoderLayer
from ...positions import Positions
from ..base import MEMORIES, Architecture, Memory, MemoryOptions, MemoryState, Passage


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
    remembers: ClassVar[bool] = False
    has_slots: ClassVar[bool] = False
    slots_are_tokens: ClassVar[bool] = True

    def initial_state(self, x: Tensor) -> EmptyState:
        return EmptyState()

    def forward(
        self,
        x: Tensor,
        state: EmptyState,
        layers: Sequence[DecoderLayer],
        positions: Positions,
        lengths: Optional[Tensor] = None,
    ) -> Passage:
        for layer, bias in zip(layers, positions(x.size(1), None, x), strict=True):
            x, _ = layer(x, bias, x.size(1))
        return Passage(x, state)
