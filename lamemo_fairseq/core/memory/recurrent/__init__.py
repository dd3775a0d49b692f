"""Transformer-XL's memory: the last M inputs of every layer, frozen (Dai et al. 2019, section 3.2).

Shapes: B streams, N current tokens, m <= M memory slots, d model width.
"""

from dataclasses import dataclass
from typing import ClassVar, Optional, Sequence, Tuple, Type

from torch import Tensor

from ...kernels.padded import join
from ...layers import DecoderLayer
from ...positions import Positions
from ..base import MEMORIES, Architecture, Memory, MemoryOptions, MemoryState, Passage, last_rows


@dataclass(frozen=True)
class RecurrentState(MemoryState):
    """Per layer the rows that went into it."""

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
    slots_are_tokens: ClassVar[bool] = True

    def initial_state(self, x: Tensor) -> RecurrentState:
        return RecurrentState((x.new_empty(x.size(0), 0, x.size(2)),) * self.config.layers)

    def forward(
        self,
        x: Tensor,
        state: RecurrentState,
        layers: Sequence[DecoderLayer],
        positions: Positions,
        lengths: Optional[Tensor] = None,
    ) -> Passage:
        current, slots = x.size(1), state.hidden[0].size(1)
        hidden = []
        biases = positions(slots + current, None, x)
        for layer, bias, past in zip(layers, biases, state.hidden, strict=True):
            rows = join(past.to(x), x)
            hidden.append(last_rows(rows, self.config.mem_len))
            x, _ = layer(rows, bias, current)
        return Passage(x, RecurrentState(tuple(hidden)))
