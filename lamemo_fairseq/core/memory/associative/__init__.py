"""Associative Recurrent Memory Transformer, ARMT (Rodkin et al. 2024, arXiv 2407.04841).

The same m learned memory tokens follow the tokens of every segment, ``[cache; x; memory tokens]``, under a plain causal
mask. So memory tokens see all tokens, and no token sees them. Before each layer all rows read the layer's matrix as
the previous segment left it. After the layer, the rows of the memory tokens are written into the matrix. Gradient flows
through the matrices from segment to segment of one update. Transformer-XL's cache has no gradient.

Shapes: B streams, N tokens of an update of k segments, n <= N / k current tokens, m memory tokens, s <= M cached rows,
d model width, F features of a key.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Dict, Optional, Sequence, Tuple, Type, cast

import torch
from torch import Tensor, nn

from ...decoding.cache import AnyCache
from ...kernels.padded import join
from ...layers import DecoderLayer, SelfAttention
from ...positions import Positions
from ..base import (
    MEMORIES,
    Architecture,
    LayerPassage,
    LayerState,
    Memory,
    MemoryConfig,
    MemoryState,
    Passage,
    Segment,
    last_of_both,
)
from ..unread import with_unread
from .association import Association, Associations
from .attention import AssociativeSelfAttention
from .cache import AssociativeCache
from .options import AssociativeOptions

_CHARACTERS = {"preset_tokens_per_sample": 1024}


@dataclass(frozen=True)
class AssociativeState(MemoryState):
    """The matrix of each layer, of size 0 before the first segment, and the tokens' rows that went into the layer."""

    matrices: Tuple[Tensor, ...]  # a layer: [B, F or 0, d], float32 or wider
    normalizers: Tuple[Tensor, ...]  # a layer: [B, F or 0], float32 or wider
    hidden: Tuple[Tensor, ...]  # a layer: [B, s, d]


@MEMORIES.register("associative")
class AssociativeMemory(Memory[AssociativeState, AssociativeOptions]):
    """Memory tokens whose outputs are written into one matrix a layer.

    With ``bptt_segments`` k, the N tokens of an update are k segments. With k = 1 only the next update reads what a
    segment has written, as a constant. Writing is then not trained, and a new model's matrices stay zero.
    """

    architecture: ClassVar[Architecture] = Architecture(
        name="associative_recurrent_memory_transformer_lm",
        class_name="AssociativeRecurrentMemoryTransformerLanguageModel",
        summary="ARMT: memory tokens written into a matrix of each layer (Rodkin et al. 2024).",
        defaults={
            "position_encoding": "transformer-xl",
            "mem_len": 0,
            "bptt_segments": 2,
            # A stream's memory lasts for an epoch here, and the authors' for a few segments.
            "associative_decay": 0.8,
            # A memory token is the same in every segment: Adam moves all d entries of a row of W_V one way.
            "associative_value_lr_scale": 0.05,
        },
        presets={
            # The width of keys is the paper's.
            "wt103": {"preset_tokens_per_sample": 300, "associative_dim": 96},
            "enwik8": _CHARACTERS,
            "text8": _CHARACTERS,
        },
    )
    options: ClassVar[Type[AssociativeOptions]] = AssociativeOptions
    attention: ClassVar[Type[SelfAttention]] = AssociativeSelfAttention
    state: ClassVar[Type[MemoryState]] = AssociativeState
    cache: ClassVar[Type[AnyCache]] = AssociativeCache
    smallest_mem_len: ClassVar[int] = 0
    layout: ClassVar[Tuple[str, ...]] = ("associative_dim", "associative_decay")
    carries_gradient: ClassVar[bool] = True

    def __init__(self, config: MemoryConfig[AssociativeOptions]):
        super().__init__(config)
        self.tokens = nn.Parameter(torch.empty(config.options.associative_tokens, config.embed_dim))
        self.dropout = nn.Dropout(config.dropout)

    @property
    def features(self) -> int:
        """The number F of features of a key."""
        return 6 * self.config.options.associative_dim

    def reset_parameters(self) -> None:
        """Draw memory tokens as large as embeddings are: N(0, .02), times ``sqrt(d)``."""
        nn.init.normal_(self.tokens, std=0.02 * math.sqrt(self.config.embed_dim))

    def initial_state(self, x: Tensor) -> AssociativeState:
        nothing, layers = x.new_empty(x.size(0), 0, x.size(2)), self.config.layers
        matrix = nothing.to(torch.promote_types(x.dtype, torch.float32))
        return AssociativeState((matrix,) * layers, (matrix[:, :, 0],) * layers, (nothing,) * layers)

    def first_tokens(self, like: Tensor) -> Tensor:
        """Return the memory tokens for every stream of ``like [B, ..]``: ``[B, m, d]``."""
        return self.tokens.to(like).expand(like.size(0), -1, -1)

    def forward(
        self,
        x: Tensor,
        state: AssociativeState,
        layers: Sequence[DecoderLayer],
        positions: Positions,
        lengths: Optional[Tensor] = None,
    ) -> Passage:
        passage = super().forward(x, state, layers, positions, lengths)
        if not self.training or x.size(1) > self.period:
            return passage
        self.tell_untrained("--memory associative writes, and a new model's matrices stay zero")
        unread = [self.tokens, *(p for layer in layers for p in _association(layer).parameters())]
        return passage._replace(features=with_unread(passage.features, unread))

    def reach(self, state: AssociativeState, current: int) -> Tuple[int, Optional[range]]:
        return state.hidden[0].size(1) + current + self.tokens.size(0), None

    def rows_held(self, state: AssociativeState) -> Dict[str, Tuple[int, int]]:
        return {"--mem-len": (state.hidden[0].size(1), self.slots)}

    def pass_layer(
        self, n: int, layer: DecoderLayer, rows: Tensor, before: LayerState, segment: Segment
    ) -> LayerPassage:
        """Read a segment and the layer's matrix, and write the matrix that the next segment reads."""
        matrix, normalizer, slots = before
        past = Associations(matrix, normalizer) if matrix.size(1) > 0 else None
        current, association = segment.tokens, _association(layer)
        if n == 0:
            rows = torch.cat([rows, self.dropout(self.first_tokens(rows))], dim=1)
        if past is not None:
            rows = association.read(rows, past)
        slots = slots.to(rows)
        hidden = last_of_both(slots, rows[:, :current], self.config.mem_len)
        joined = join(slots, rows) if slots.size(1) else rows
        rows, _ = layer(joined, segment.biases[n], rows.size(1))
        written = association.write(rows[:, current:], past)
        last = n == self.config.layers - 1
        return LayerPassage(rows[:, :current] if last else rows, (*written, hidden))


def _association(layer: DecoderLayer) -> Association:
    return cast(AssociativeSelfAttention, layer.self_attn).association
