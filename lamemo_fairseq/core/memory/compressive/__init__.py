"""The Compressive Transformer's memory: Transformer-XL's, and behind it a compressed one (Rae et al. 2020).

Each layer attends to ``[c; m; x]``, at contiguous distances. A segment's rows join m. The oldest rows then leave m in
groups of r: as few groups as leave at most M rows. Each group is compressed to one row, which joins c, and c forgets
its oldest. If r divides both N and M, a full m holds exactly M rows, and otherwise between M - r + 1 and M. No
remainder is padded or dropped.

Shapes: B streams, N current tokens, m <= M memory slots, c <= C compressed slots, r compression rate, d model width.
"""

from dataclasses import dataclass
from typing import ClassVar, Dict, List, Optional, Sequence, Tuple, Type

import torch
from torch import Tensor, nn

from ...decoding.cache import AnyCache
from ...kernels.padded import join
from ...layers import DecoderLayer, SelfAttention
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
from ..unread import no_contribution
from .attention import CompressiveSelfAttention
from .cache import CompressiveCache
from .compressions import COMPRESSIONS
from .losses import LOSSES
from .options import CompressiveOptions

__all__ = ["COMPRESSIONS", "LOSSES", "CompressiveMemory", "CompressiveState"]


@dataclass(frozen=True)
class CompressiveState(MemoryState):
    """The last inputs of each layer, and the compressed rows of older inputs."""

    hidden: Tuple[Tensor, ...]  # a layer: [B, m, d]
    compressed: Tuple[Tensor, ...]  # a layer: [B, c, d]


@MEMORIES.register("compressive")
class CompressiveMemory(Memory[CompressiveState, CompressiveOptions]):
    """Compresses rows that segment-level recurrence would forget."""

    # Together as many slots as Transformer-XL has, and sizes that the rate divides.
    architecture: ClassVar[Architecture] = Architecture(
        name="compressive_transformer_lm",
        class_name="CompressiveTransformerLanguageModel",
        summary="Compressive Transformer: recurrent memory, and compressed memory behind it (Rae et al. 2020).",
        defaults={"position_encoding": "transformer-xl", "mem_len": 75},
        presets={
            "wt103": {"mem_len": 75, "compressed_len": 75, "compression_rate": 3},
            "enwik8": {"mem_len": 256, "compressed_len": 256, "compression_rate": 4},
            "text8": {"mem_len": 256, "compressed_len": 256, "compression_rate": 4},
        },
    )
    options: ClassVar[Type[CompressiveOptions]] = CompressiveOptions
    attention: ClassVar[Type[SelfAttention]] = CompressiveSelfAttention
    state: ClassVar[Type[MemoryState]] = CompressiveState
    cache: ClassVar[Type[AnyCache]] = CompressiveCache
    has_losses: ClassVar[bool] = True
    layout: ClassVar[Tuple[str, ...]] = ("compressed_len", "compression_rate", "compression")

    def __init__(self, config: MemoryConfig[CompressiveOptions]):
        super().__init__(config)
        options, rate = config.options, config.options.compression_rate
        if config.mem_len < rate - 1:
            raise ValueError(
                f"--mem-len {config.mem_len} is too short for --compression-rate {rate}: rows wait there "
                f"until {rate} can be compressed together; pass --mem-len {rate - 1} or more"
            )
        compression, loss = COMPRESSIONS[options.compression], LOSSES[options.compression_loss]
        self.watches = compression.watches
        self.compressions = nn.ModuleList(compression(rate, config.embed_dim) for _ in range(config.layers))
        trained = config.layers if compression.trains else 0
        self.losses = nn.ModuleList(loss(rate, config.embed_dim) for _ in range(trained))

    @property
    def slots(self) -> int:
        return self.config.mem_len + self.config.options.compressed_len

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def initial_state(self, x: Tensor) -> CompressiveState:
        nothing = (x.new_empty(x.size(0), 0, x.size(2)),) * self.config.layers
        return CompressiveState(hidden=nothing, compressed=nothing)

    def leaving(self, recent: int) -> int:
        """Return how many of *recent* rows, m + N, are compressed: groups of r, as few as leave no more than M."""
        rate = self.config.options.compression_rate
        return -(-max(0, recent - self.config.mem_len) // rate) * rate

    def compressed_after(self, compressed: int, leaving: int) -> int:
        """Return the number of slots of c after *leaving* rows have joined *compressed* ones."""
        options = self.config.options
        return min(options.compressed_len, compressed + leaving // options.compression_rate)

    def reach(self, state: CompressiveState, current: int) -> Tuple[int, Optional[range]]:
        return state.compressed[0].size(1) + state.hidden[0].size(1) + current, None

    def rows_held(self, state: CompressiveState) -> Dict[str, Tuple[int, int]]:
        compressed = state.compressed[0].size(1), self.config.options.compressed_len
        return {"--mem-len": (state.hidden[0].size(1), self.config.mem_len), "--compressed-len": compressed}

    def pass_layer(
        self, n: int, layer: DecoderLayer, rows: Tensor, before: LayerState, segment: Segment
    ) -> LayerPassage:
        older, current = before[1].to(rows), segment.tokens
        compressed, recent = older.size(1), before[0].size(1) + current
        leaving = self.leaving(recent)
        watched = slice(compressed, compressed + leaving) if leaving and self.watches else None
        every = join(torch.cat([older, before[0].to(rows)], dim=1), rows)
        out, used = layer(every, segment.biases[n], current, watched)
        kept, lost = every[:, compressed:].detach(), None
        if leaving:
            old = kept[:, :leaving]
            new = self.compressions[n](old, used)
            # The compression of a shorter last segment depends on which streams share its batch.
            if self.training and len(self.losses) and current == self.config.segment_length:
                lost = self.losses[n](layer, rows.detach(), old, new)
            older = torch.cat([older, new.to(older)], dim=1)
        after = last_rows(kept, recent - leaving), last_rows(older, self.config.options.compressed_len)
        return LayerPassage(out, after, () if lost is None else (lost,))

    def losses_of(
        self, asides: Sequence[Tuple[Tensor, ...]], before: CompressiveState, lengths: Optional[Tensor]
    ) -> Dict[str, Tensor]:
        return {"compression": self._loss([loss for lost in asides for loss in lost], lengths)} if self.losses else {}

    def _loss(self, lost: List[Tensor], lengths: Optional[Tensor]) -> Tensor:
        """Return the loss of a token: the mean over layers, streams and tokens of the layers' losses *lost* ``[B]``.

        Streams that end within the segment add no loss. Before anything is compressed the loss is zero.
        """
        if not lost:
            return no_contribution(self.parameters())
        by_stream, length = torch.stack(lost).mean(0), self.config.segment_length
        whole = torch.ones_like(by_stream) if lengths is None else (lengths == length).to(by_stream)
        tokens = length * len(by_stream) if lengths is None else lengths.sum().clamp(min=1)
        return self.config.options.compression_loss_weight * (by_stream * whole).sum() * length / tokens
