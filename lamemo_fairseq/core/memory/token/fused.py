"""Attention over ``[cache; read; x; write]`` by the fused kernels: `eager.py` describes the function.

Shapes: B streams, H heads, D size of a head, R rows, K memory tokens of a block, U distances.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor

from ...attention import Attended, RelativeBias
from ...attention.fused import UNBOUNDED, Band, BandedAttention, attend, causal_attention
from ...attention.padding import bias_for
from . import eager
from .eager import Blocks


def blocks_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: RelativeBias,
    ahead: RelativeBias,
    blocks: Blocks,
    dropout: float = 0.0,
    scale: Optional[float] = None,
) -> Attended:
    """Attend as `eager.blocks_attention` does: current rows and both blocks in one call.

    Where distances to the right have vectors of their own, blocks take plain operations.
    """
    sides = ((causal.table, ahead.table), (causal.score, ahead.score))
    alike = all((left is None) == (right is None) for left, right in sides)
    if not alike or causal.content is not ahead.content or causal.position is not ahead.position:
        return eager.blocks_attention(q, k, v, causal, ahead, blocks, dropout, scale, attend=causal_attention)
    joint = bias_for(q, RelativeBias(causal.content, causal.position, *_both_sides(causal, ahead)))
    rows, begin, end = k.size(2), blocks.begin, blocks.end
    first = rows - q.size(2)  # row of query 0

    def attention(start: int, stop: int, oldest: int, high: int) -> BandedAttention:
        """Let the rows from *start* to *stop* attend to those from *oldest* on, by the table whose end is 0, 1, ..."""
        keys = slice(oldest, rows if start == begin else stop)
        band = Band(-UNBOUNDED, high, rows - 1 - start + oldest)
        return BandedAttention(slice(start - first, stop - first), keys, band, joint)

    current = attention(begin, end, 0, begin)  # of all keys, as the first one has to be: none sees the write block
    reads = [] if blocks.last else [attention(blocks.cached, begin, blocks.oldest, UNBOUNDED)]
    return attend(q, k, v, [current, *reads, attention(end, rows, blocks.oldest, UNBOUNDED)], dropout, scale)


def _both_sides(causal: RelativeBias, ahead: RelativeBias) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Return table and scores of the distances ``R-1 .. 0``, then of ``1 .. K-1`` to the right."""
    table = score = None
    if causal.table is not None and ahead.table is not None:
        table = torch.cat([causal.table, ahead.table[:, 1:]], dim=1)
    if causal.score is not None and ahead.score is not None:
        score = torch.cat([causal.score, ahead.score[:, 1:]], dim=1)
    return table, score
