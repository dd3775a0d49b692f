"""Infini-attention (Munkhdalai, Faruqui, Gopal 2024, arXiv 2404.07143): associations of all earlier segments.

Every head of every layer has a matrix M, which maps keys to values, and the sum z of the keys. A segment attends to
itself, reads M and z as earlier segments have written them, and is then written. The paper leaves these choices open:

- The first segment has nothing to read, and uses the local attention alone. A flag in the state marks it.
- Keys and queries of M have no positions. Rotations and biases belong to the local attention.
- M, z and all values computed from them are float32 or wider, whatever the model's precision.
- The gate beta is 0 at first, so that both read-outs weigh the same.
- Gradient flows through M and z between the segments of an update (``bptt_segments``). It stops at the update's end.

There are no memory slots: the paper has no cache of rows, and the local attention sees the segment alone.

Shapes: B streams, n current tokens, H heads, D size of a head, d model width.
"""

from dataclasses import dataclass
from typing import ClassVar, Optional, Sequence, Tuple, Type

import torch
from torch import Tensor

from ...decoding.cache import AnyCache
from ...kernels.copies import copy_all
from ...layers import DecoderLayer, SelfAttention
from ...positions import Positions
from ..base import MEMORIES, Architecture, LayerPassage, LayerState, Memory, MemoryState, Passage, Segment, constant
from .attention import Associations, InfiniSelfAttention
from .cache import InfiniCache, empty_associations
from .options import InfiniOptions

# Two segments an update, as long as Transformer-XL's, so that writing is trained. The paper's updates have 16 segments
# of 2,048 tokens.
_CHARACTERS = {"mem_len": 0, "bptt_segments": 2, "preset_tokens_per_sample": 1024}


@dataclass(frozen=True)
class InfiniState(MemoryState):
    """The `Associations` of every layer. Their shapes never change."""

    matrices: Tuple[Tensor, ...]  # a layer: [B, H, D, D], float32 or wider
    normalizers: Tuple[Tensor, ...]  # a layer: [B, H, D], float32 or wider
    written: Tensor  # [B, 1] bool, whether there is an earlier segment


@MEMORIES.register("infini")
class InfiniMemory(Memory[InfiniState, InfiniOptions]):
    """A matrix of associations for every head.

    With ``bptt_segments`` 1, only later updates read the values that a segment has written, as constants.
    Writing is then not trained.
    """

    architecture: ClassVar[Architecture] = Architecture(
        name="infini_attention_lm",
        class_name="InfiniAttentionLanguageModel",
        summary="Infini-attention: a matrix of associations beside local attention (Munkhdalai et al. 2024).",
        # A gate opens or closes as beta moves by some units. In 3,000 updates Adam moves a number by .4.
        defaults={"position_encoding": "transformer-xl", "mem_len": 0, "memory_gate_lr_scale": 100.0},
        presets={
            "wt103": {"mem_len": 0, "bptt_segments": 2, "preset_tokens_per_sample": 300},
            "enwik8": _CHARACTERS,
            "text8": _CHARACTERS,
        },
    )
    options: ClassVar[Type[InfiniOptions]] = InfiniOptions
    attention: ClassVar[Type[SelfAttention]] = InfiniSelfAttention
    state: ClassVar[Type[MemoryState]] = InfiniState
    cache: ClassVar[Type[AnyCache]] = InfiniCache
    has_slots: ClassVar[bool] = False
    carries_gradient: ClassVar[bool] = True
    fills_caches: ClassVar[bool] = True

    def initial_state(self, x: Tensor) -> InfiniState:
        empty = empty_associations(x.size(0), self.config.heads, self.config.head_dim, x)
        layers = self.config.layers
        return InfiniState((empty.matrix,) * layers, (empty.normalizer,) * layers, empty.written)

    def forward(
        self,
        x: Tensor,
        state: InfiniState,
        layers: Sequence[DecoderLayer],
        positions: Positions,
        lengths: Optional[Tensor] = None,
    ) -> Passage:
        """Pass an update as the base does; if gradient is recorded, every layer reads whole segments as one batch.

        Only associations go from one segment to the next.
        """
        if not torch.is_grad_enabled() or x.size(1) % self.period:
            return super().forward(x, state, layers, positions, lengths)
        passage = self.pass_segment(x.reshape(-1, self.period, x.size(2)), state, layers, positions)
        return Passage(passage.features.reshape(x.shape), passage.state.map(constant))

    def pass_layer(
        self, n: int, layer: DecoderLayer, rows: Tensor, before: LayerState, segment: Segment
    ) -> LayerPassage:
        """Read a segment ``rows [B, n, d]``, then write it, with its padding, which no later segment reads.

        Of k segments ``[B k, n, d]``, each reads the values that those before it have written.
        """
        out, after = layer(rows, segment.biases[n], Associations(*before))
        return LayerPassage(out, after)

    def fill_cache(self, cache: AnyCache, parts: Sequence[LayerState], layers: Sequence[DecoderLayer]) -> None:
        for cached, part in zip(cache.layers, parts, strict=True):
            copy_all(cached.past, part)
