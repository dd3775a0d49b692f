"""The Memorizing Transformer: one layer stores keys and values of the past (Wu et al. 2022, arXiv 2203.08913).

All layers have Transformer-XL's memory of M slots. One layer also has a store: the keys and values of the last S
tokens, first in, first out, without gradient. A segment reads the store as earlier segments left it, and is then
appended. There are two retrievals (`attention.py`):

- ``top-k``, the paper's: each query and head attends to the k stored rows with the largest scores. A gate of the
  head mixes the result with that of the usual attention. The search is exact; of equal scores the oldest row wins.
  The rows of the slots are also in the store, and so count twice, as published.
- ``dense``, of the authors' later code: one softmax over all stored rows and the segment, without gate and slots.

examples/memorizing_transformer_lm/README.md says where this differs from the paper and from public code.

Shapes: B streams, N current tokens, m <= M memory slots, n <= S stored rows, H heads, D size of a head,
D' its padded size, d model width.
"""

import logging
from dataclasses import dataclass
from functools import cache as remembered
from typing import ClassVar, Dict, List, Optional, Sequence, Tuple, Type

from torch import Tensor

from ...decoding.cache import AnyCache
from ...kernels import aligned
from ...kernels.padded import join, stored_width
from ...layers import CausalSelfAttention, DecoderLayer, SelfAttention
from ..base import (
    MEMORIES,
    Architecture,
    LayerPassage,
    LayerState,
    Memory,
    MemoryConfig,
    MemoryState,
    Segment,
    last_rows,
)
from ..unread import with_unread
from .attention import RETRIEVALS, Store, appended
from .cache import MemorizingCache
from .options import DENSE, TOP_K, MemorizingOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemorizingState(MemoryState):
    """The rows that went into each layer, and the store of one layer."""

    hidden: Tuple[Tensor, ...]  # a layer: [B, m, d]; [B, 0, d] in a layer that does not read them
    keys: Tensor  # [B, H, n, D or D'], of length 1
    values: Tensor  # [B, H, n, D or D']


@MEMORIES.register("memorizing")
class MemorizingMemory(Memory[MemorizingState, MemorizingOptions]):
    """Segment-level recurrence, and a store in one layer."""

    architecture: ClassVar[Architecture] = Architecture(
        name="memorizing_transformer_lm",
        class_name="MemorizingTransformerLanguageModel",
        summary="Memorizing Transformer: a layer retrieves stored keys and values (Wu et al. 2022).",
        defaults={"position_encoding": "transformer-xl"},
    )
    options: ClassVar[Type[MemorizingOptions]] = MemorizingOptions
    state: ClassVar[Type[MemoryState]] = MemorizingState
    cache: ClassVar[Type[AnyCache]] = MemorizingCache
    smallest_mem_len: ClassVar[int] = 0
    layout: ClassVar[Tuple[str, ...]] = ("store_len", "store_layer", "retrieval")

    def __init__(self, config: MemoryConfig[MemorizingOptions]):
        super().__init__(config)
        options = config.options
        self.store_layer = options.layer_of(config.layers)
        self.retrieval = RETRIEVALS[options.retrieval]
        self.reads_slots = self.retrieval.reads_slots
        if not self.reads_slots and options.store_len < config.mem_len:
            raise ValueError(
                f"--store-len is {options.store_len}, fewer rows than --mem-len {config.mem_len} gives other layers: "
                f"pass a longer one, or --retrieval {TOP_K} instead of {DENSE}"
            )

    def attention_of(self, layer: int) -> Type[SelfAttention]:
        return self.retrieval if layer == self.store_layer else CausalSelfAttention

    def initial_state(self, x: Tensor) -> MemorizingState:
        config, batch = self.config, x.size(0)
        store = x.new_empty(batch, config.heads, 0, config.head_dim)
        width = stored_width(x, config.head_dim) if aligned.matters(x) else config.head_dim
        numbers = 2 * batch * config.heads * config.options.store_len * width
        _tell(batch, config.options.store_len, numbers * x.element_size())
        return MemorizingState((x.new_empty(batch, 0, x.size(2)),) * config.layers, store, store)

    def layer_states(self, state: MemorizingState) -> List[LayerState]:
        store = (state.keys, state.values)
        return [(rows, *store) if n == self.store_layer else (rows,) for n, rows in enumerate(state.hidden)]

    def joined(self, parts: Sequence[LayerState], like: MemorizingState) -> MemorizingState:
        return MemorizingState(tuple(part[0] for part in parts), *parts[self.store_layer][1:])

    def reach(self, state: MemorizingState, current: int) -> Tuple[int, Optional[range]]:
        return max(rows.size(1) for rows in state.hidden) + current, None

    def rows_held(self, state: MemorizingState) -> Dict[str, Tuple[int, int]]:
        slots = max(rows.size(1) for rows in state.hidden), self.slots
        return {"--mem-len": slots, "--store-len": (state.keys.size(2), self.config.options.store_len)}

    def pass_layer(
        self, n: int, layer: DecoderLayer, rows: Tensor, before: LayerState, segment: Segment
    ) -> LayerPassage:
        bias, mem_len = segment.biases[n], self.config.mem_len
        joined = join(before[0].to(rows), rows)
        if n != self.store_layer:
            hidden = last_rows(joined, mem_len)
            out, _ = layer(joined, bias, segment.tokens)
            return LayerPassage(out, (hidden,))
        hidden = last_rows(joined, mem_len if self.reads_slots else 0)
        store, size = Store(before[1].to(rows), before[2].to(rows)), self.config.options.store_len
        out, new = layer(joined, segment.tokens, store)
        if self.training:
            out = with_unread(out, bias.causal)  # with a single layer, nothing has used positions
        return LayerPassage(
            out, (hidden, appended(store.keys, new.keys, size), appended(store.values, new.values, size))
        )


@remembered
def _tell(streams: int, rows: int, size: int) -> None:
    """Log the size of a full store, which every checkpoint contains."""
    logger.info(
        "the store takes up to %s rows of one layer for each of %s streams: %.3f GiB, and as much of a checkpoint",
        f"{rows:,}",
        streams,
        size / 2**30,
    )
