"""Self-attention over ``[cache; read; x; write]``: tokens between two blocks of memory tokens.

Shapes: B streams, R = m + K + N + K rows, m <= M cached rows, K memory tokens a block, N current tokens, H heads,
D size of a head, d model width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention import RelativeBias
from ...attention.eager import relative_scores
from ...attention.padding import bias_for
from ...kernels.padded import WideRows
from ...layers import SelfAttention
from ...layers.self_attention import AttentionConfig
from ...positions import LayerBias


class Blocks(NamedTuple):
    """Counts of the rows of each kind, and how a layer treats them."""

    cached: int  # m
    tokens: int  # K
    current: int  # N
    reads_cache: bool  # whether memory tokens attend to the cache
    last: bool  # whether it is the last layer, where the read block's rows end

    @property
    def oldest(self) -> int:
        """The first row that memory tokens attend to."""
        return 0 if self.reads_cache else self.cached


class TokenSelfAttention(SelfAttention):
    """Causal attention for the current rows; memory tokens also attend to those of their block on their right."""

    def __init__(self, config: AttentionConfig):
        if config.span is not None:
            raise ValueError(
                "--same-length would hide the memory tokens from the last tokens of a segment: leave it "
                "out, or pass --memory recurrent instead of token"
            )
        super().__init__(config)

    def forward(self, rows: Tensor, bias: LayerBias, blocks: Blocks) -> tuple[WideRows, None]:
        """Attend within one layer (Bulatov et al. 2022, section 3.2).

        Args:
            rows: ``[B, R, d]``.
            bias: of R causal distances, and of the distances ``0 .. K-1`` to the right.

        Returns:
            The rows ``[B, K + N + K, d]`` of read block, tokens and write block; without the first in the last layer.
        """
        size, current = blocks.tokens, blocks.current
        sizes = [current, size] if blocks.last else [size, current, size]
        q, k, v = self.project(rows, sum(sizes), keep_padding=True)
        *read, q_current, q_write = q.split(sizes, dim=2)
        begin = blocks.cached + size  # the first current token
        end = begin + current

        def block(queries: Tensor, stop: int) -> Tensor:
            seen = slice(blocks.oldest, stop)
            return self.block(queries, k[:, :, seen], v[:, :, seen], bias)

        near = bias._replace(causal=nearest(bias.causal, end))
        attended = self.causal(q_current, k[:, :, :end], v[:, :, :end], near, need_normalizer=False)
        read_outs = [*(block(q_read, begin) for q_read in read), attended.output, block(q_write, rows.size(1))]
        return self.merge_heads(torch.cat(read_outs, dim=2)), None

    def block(self, q: Tensor, k: Tensor, v: Tensor, bias: LayerBias) -> Tensor:
        """Let a block of memory tokens attend to the P keys before and in it: as *q*.

        Args:
            q: ``[B, H, K, D or D']``.
            k, v: ``[B, H, P, D or D']``, of which the block's own are the last K.
            bias: of at least P causal distances, and of the distances ``0 .. K-1`` to the right.
        """
        assert bias.ahead is not None
        q, k = bias.rotate(q, k)
        size, before = q.size(2), k.size(2) - q.size(2)
        causal, right = bias_for(q, nearest(bias.causal, k.size(2))), bias_for(q, bias.ahead)
        scores = relative_scores(q, k, causal, size - 1, self.scale)
        ahead = relative_scores(q, k[:, :, before:], right, 0, self.scale)
        to_the_right = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        own = torch.where(to_the_right, ahead, scores[..., before:])
        weights = F.dropout(torch.cat([scores[..., :before], own], dim=-1).softmax(-1), self._dropout)
        return weights.to(v.dtype) @ v


def nearest(bias: RelativeBias, count: int) -> RelativeBias:
    """Return a causal bias of the distances ``count-1 .. 0`` alone."""
    table, score = (None if t is None else t[:, t.size(1) - count :] for t in (bias.table, bias.score))
    return bias._replace(table=table, score=score)
