"""Memory tokens (Recurrent Memory Transformer, Bulatov et al. 2022), alone or with Transformer-XL's cache.

A segment of n tokens is read as ``[cache; read; x; write]``. The K memory tokens stand before ``x``, whose tokens read
them, and once more behind ``x``. The last layer's rows of the second block are the memory tokens that the segment
writes. Gradient flows through memory tokens from segment to segment of one update; the cache is frozen, as in
Transformer-XL.

Shapes: B streams, N tokens of an update of k segments, n <= N / k current tokens, K memory tokens, m <= M cached rows,
d model width.
"""

from dataclasses import dataclass
from typing import ClassVar, Dict, List, Optional, Sequence, Tuple, Type

import torch
from torch import Tensor, nn

from ...decoding.cache import AnyCache
from ...kernels.padded import join
from ...layers import DecoderLayer, SelfAttention
from ...positions import Positions
from ...positions.together import together
from ..base import MEMORIES, Architecture, Memory, MemoryConfig, MemoryState, Passage, last_of_both
from ..unread import with_unread
from .attention import TokenSelfAttention
from .cache import TokenCache
from .eager import Blocks
from .options import TokenOptions

# K + M rows are as many as Transformer-XL's M, where the paper does not say.
_CHARACTERS = {"mem_len": 502, "bptt_segments": 2, "preset_tokens_per_sample": 1024}


@dataclass(frozen=True)
class TokenState(MemoryState):
    """Memory tokens as the last segment wrote them, and each layer's last inputs of tokens."""

    tokens: Tensor  # [B, K, d]; [B, 0, d] before the first segment, which reads the learned ones
    hidden: Tuple[Tensor, ...]  # a layer: [B, m, d]


@MEMORIES.register("token")
class TokenMemory(Memory[TokenState, TokenOptions]):
    """Memory tokens that every segment reads and writes.

    With ``bptt_segments`` k, the N tokens of an update are k segments. With k = 1 only the next update reads what a
    segment writes, as a constant. Writing is then not trained (the paper's BPTT of 0 unrolls).
    """

    architecture: ClassVar[Architecture] = Architecture(
        name="recurrent_memory_transformer_lm",
        class_name="RecurrentMemoryTransformerLanguageModel",
        summary="Recurrent Memory Transformer: memory tokens read and written (Bulatov et al. 2022).",
        defaults={"position_encoding": "transformer-xl", "mem_len": 0},
        presets={
            # A cache of 150 rows and 10 memory tokens are the paper's.
            "wt103": {"mem_len": 150, "bptt_segments": 2, "preset_tokens_per_sample": 300},
            "enwik8": _CHARACTERS,
            "text8": _CHARACTERS,
        },
    )
    options: ClassVar[Type[TokenOptions]] = TokenOptions
    attention: ClassVar[Type[SelfAttention]] = TokenSelfAttention
    state: ClassVar[Type[MemoryState]] = TokenState
    cache: ClassVar[Type[AnyCache]] = TokenCache
    looks_ahead: ClassVar[bool] = True  # within a block
    smallest_mem_len: ClassVar[int] = 0
    layout: ClassVar[Tuple[str, ...]] = ("memory_tokens",)
    carries_gradient: ClassVar[bool] = True

    def __init__(self, config: MemoryConfig[TokenOptions]):
        super().__init__(config)
        self.initial_tokens = nn.Parameter(torch.empty(config.options.memory_tokens, config.embed_dim))
        self.dropout = nn.Dropout(config.dropout)

    @property
    def slots(self) -> int:
        return self.config.mem_len + self.config.options.memory_tokens

    def reset_parameters(self) -> None:
        """Draw memory tokens N(0, 1): as large as the output of a layer norm, which later segments read."""
        nn.init.normal_(self.initial_tokens)

    def initial_state(self, x: Tensor) -> TokenState:
        nothing = x.new_empty(x.size(0), 0, x.size(2))
        return TokenState(nothing, (nothing,) * self.config.layers)

    def first_tokens(self, like: Tensor) -> Tensor:
        """Return the learned memory tokens for every stream of ``like [B, .., d]``: ``[B, K, d]``."""
        return self.initial_tokens.to(like).expand(like.size(0), -1, -1)

    def rows_held(self, state: TokenState) -> Dict[str, Tuple[int, int]]:
        tokens = state.tokens.size(1), self.config.options.memory_tokens
        return {"--mem-len": (state.hidden[0].size(1), self.config.mem_len), "--memory-tokens": tokens}

    def pass_segment(
        self,
        x: Tensor,
        state: TokenState,
        layers: Sequence[DecoderLayer],
        positions: Positions,
        lengths: Optional[Tensor] = None,
    ) -> Passage:
        """Read a segment ``x [B, n, d]``, and write the memory tokens ``[B, K, d]`` that the next one reads."""
        tokens = state.tokens.to(x) if state.tokens.size(1) > 0 else self.first_tokens(x)
        size, current, cached = tokens.size(1), x.size(1), state.hidden[0].size(1)
        biases = together(positions(cached + size + current + size, range(size), x), x)
        blocks = Blocks(cached, size, current, self.config.options.memory_reads_cache, last=False)
        hidden: List[Tensor] = []
        rows = torch.cat([self.dropout(tokens), x, self.dropout(tokens)], dim=1)
        for i, (layer, bias, past) in enumerate(zip(layers, biases, state.hidden, strict=True)):
            past = past.to(x)
            hidden.append(last_of_both(past, rows[:, size : size + current], self.config.mem_len))
            rows = join(past, rows)
            rows, _ = layer(rows, bias, blocks._replace(last=i == len(layers) - 1))
        features, written = rows[:, :current], self.dropout(rows[:, current:])
        if self.training:
            features = with_unread(features, [self.initial_tokens])  # read only where a stream begins
        return Passage(features, TokenState(written, tuple(hidden)))
