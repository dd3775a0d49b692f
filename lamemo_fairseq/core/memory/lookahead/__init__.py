"""LaMemo's look-ahead memory (Ji et al. 2022): slots that attend to the tokens that came after them.

A refresh rebuilds the slots' rows, layer by layer, from their stored inputs of the first layer that looks ahead. Stored
read-outs and normalisers make it incremental: its cost is linear in the memory length. The slots of the layers below
stay as they are, as in Transformer-XL.

Shapes: B streams, N current tokens, m <= M memory slots, H heads, D size of a head, d model width.
"""

from dataclasses import dataclass
from typing import ClassVar, List, NamedTuple, Optional, Sequence, Tuple, Type, cast

import torch
from torch import Tensor

from ...attention import Attended
from ...decoding.cache import AnyCache, fill_slots_of_layer
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
)
from ..unread import with_unread
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
    """Inputs of the slots in the layers up to the first that looks ahead; from it on, read-outs and normalisers.

    If slots look ahead in every K-th segment only, the others need the inputs of all layers.
    """

    embeddings: Tensor  # [B, m, d], inputs of the first layer, after dropout
    outputs: Tuple[Tensor, ...]  # a layer that looks ahead: [B, H, m, D], before the output projection
    normalizers: Tuple[Tensor, ...]  # likewise: [B, H, m], logsumexp of the scores, float32 or wider
    inputs: Tuple[Tensor, ...] = ()  # of the second and further layers: [B, m, d]
    # [B, t mod K, 0] uint8, before segment t of a stream, counted from 0. The host knows shapes, and streams whose
    # states have other shapes are read apart.
    phase: Optional[Tensor] = None


class LayerMemory(NamedTuple):
    """One layer's part of a state; None where the layer has none."""

    inputs: Optional[Tensor]
    attended: Optional[Attended]
    phase: Optional[Tensor]  # the same in all layers

    def tensors(self) -> LayerState:
        inputs, phase = (() if t is None else (t,) for t in (self.inputs, self.phase))
        return (*inputs, *(self.attended or ()), *phase)


@MEMORIES.register("lookahead")
class LookaheadMemory(Memory[LookaheadState, LookaheadOptions]):
    """Refreshes every slot once a segment, or once in K segments."""

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
    layout: ClassVar[Tuple[str, ...]] = ("lookahead_from_layer", "lookahead_every")

    @property
    def first_ahead(self) -> int:
        return min(self.config.options.lookahead_from_layer, self.config.layers) - 1

    @property
    def refreshed(self) -> range:
        """The layers whose slots look ahead, counted from 0. The last one's rows would go nowhere."""
        return range(self.first_ahead, self.config.layers - 1)

    @property
    def cycle(self) -> int:
        """The number K of segments from one refresh to the next."""
        return self.config.options.cycle

    @property
    def stored_inputs(self) -> int:
        """The number of layers, from the lowest on, whose inputs are stored."""
        return self.config.layers if self.cycle > 1 else 1 + self.first_ahead

    def initial_state(self, x: Tensor) -> LookaheadState:
        batch, heads, size = x.size(0), self.config.heads, self.config.head_dim
        exact = torch.promote_types(x.dtype, torch.float32)
        rows, refreshed = x.new_empty(batch, 0, x.size(2)), len(self.refreshed)
        return LookaheadState(
            embeddings=rows,
            outputs=(x.new_empty(batch, heads, 0, size),) * refreshed,
            normalizers=(x.new_empty(batch, heads, 0, dtype=exact),) * refreshed,
            inputs=(rows,) * (self.stored_inputs - 1),
            phase=x.new_empty(batch, 0, 0, dtype=torch.uint8) if self.cycle > 1 else None,
        )

    def window(self, slots: int, current: int) -> LookaheadWindow:
        """Return the keys that *slots* slots look ahead at in a segment of *current* tokens, at K times as many."""
        return WINDOWS[self.config.options.lookahead_window](slots, current * self.cycle)

    def of_layer(self, n: int, part: LayerState) -> LayerMemory:
        """Return what the tensors of a layer's part are."""
        part, phase = (part[:-1], part[-1]) if self.cycle > 1 else (part, None)
        inputs, attended = (part[0], part[1:]) if n < self.stored_inputs else (None, part)
        return LayerMemory(inputs, Attended(*attended) if attended else None, phase)

    def layer_states(self, state: LookaheadState) -> List[LayerState]:
        inputs, attended = [state.embeddings, *state.inputs], [*zip(state.outputs, state.normalizers, strict=True)]
        return [
            LayerMemory(
                inputs[n] if n < len(inputs) else None,
                Attended(*attended[n - self.first_ahead]) if n in self.refreshed else None,
                state.phase,
            ).tensors()
            for n in range(self.config.layers)
        ]

    def joined(self, parts: Sequence[LayerState], like: LookaheadState) -> LookaheadState:
        layers = [self.of_layer(n, part) for n, part in enumerate(parts)]
        embeddings, *inputs = [layer.inputs for layer in layers if layer.inputs is not None]
        attended = [layer.attended for layer in layers if layer.attended is not None]
        outputs, normalizers = (tuple(a[part] for a in attended) for part in (0, 1))
        return LookaheadState(embeddings, outputs, normalizers, tuple(inputs), layers[-1].phase)

    def reach(self, state: LookaheadState, current: int) -> Tuple[int, Optional[range]]:
        slots = state.embeddings.size(1)
        looks = slots > 0 and len(self.refreshed) > 0 and _is_due(state.phase)
        return slots + current, self.window(slots, current).distances(slots) if looks else range(0)

    def pass_layer(
        self, n: int, layer: DecoderLayer, rows: Tensor, before: LayerState, segment: Segment
    ) -> LayerPassage:
        inputs, stored, phase = self.of_layer(n, before)
        is_due = _is_due(phase)
        if inputs is not None:
            if n <= self.first_ahead or not is_due:  # else they come from the layer below
                rows = join(inputs.to(rows), rows)
            inputs = last_rows(rows, self.config.mem_len)
        slots, bias = rows.size(1) - segment.tokens, segment.biases[n]
        window = None
        if stored is not None and slots > 0 and is_due:
            lengths = None if segment.lengths is None else segment.lengths * self.cycle
            window = self.window(slots, segment.tokens)._replace(lengths=lengths)
        out, carried = layer(rows, bias, window, stored, segment.tokens)
        looked = slots > 0 and len(self.refreshed) > 0 and is_due
        if self.training and n == self.config.layers - 1 and not looked:
            # Nothing uses the biases of the look-ahead. Layers may share them, or have their own.
            unused = {id(part): part for of_layer in segment.biases for part in of_layer.ahead or ()}
            out = with_unread(out, unused.values())
        if phase is not None:
            phase = phase.new_empty(len(phase), (phase.size(1) + 1) % self.cycle, 0)
        return LayerPassage(out, LayerMemory(inputs, carried, phase).tensors())

    def fill_cache(self, cache: AnyCache, parts: Sequence[LayerState], layers: Sequence[DecoderLayer]) -> None:
        """Fill in frozen keys and values, and all that the refresh needs, which makes those of other slots."""
        in_slots, cached = slice(0, self.slots), cast(LookaheadCache, cache)
        for n, (layer, layer_cache, part) in enumerate(zip(layers, cached.layers, parts, strict=True)):
            inputs, attended, _ = self.of_layer(n, part)
            if attended is None and inputs is not None:
                fill_slots_of_layer(layer_cache, layer, inputs, self.slots)
            elif inputs is not None:
                cached.inputs_ahead(self)[:, in_slots].copy_(inputs)
            for buffer, stored in zip(layer_cache.past or (), attended or (), strict=True):
                buffer[:, :, in_slots].copy_(stored)


def _is_due(phase: Optional[Tensor]) -> bool:
    """Return whether slots look ahead in the segment that *phase* comes before."""
    return phase is None or phase.size(1) == 0
