"""Attention over ``[cache; read; x; write]`` in plain PyTorch.

Shapes: B streams, H heads, D size of a head, R = m + K + N + K rows, m <= M cached rows, K memory tokens of a block,
N current tokens, Q queries, U distances.
"""

from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention import Attended, RelativeBias
from ...attention.eager import causal_attention, relative_scores
from ...attention.padding import bias_for


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

    @property
    def begin(self) -> int:
        """The first current row."""
        return self.cached + self.tokens

    @property
    def end(self) -> int:
        """The first row of the write block."""
        return self.begin + self.current


def blocks_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: RelativeBias,
    ahead: RelativeBias,
    blocks: Blocks,
    dropout: float = 0.0,
    scale: Optional[float] = None,
    attend: Callable[..., Attended] = causal_attention,
) -> Attended:
    """Let current rows attend causally, and memory tokens to those of their block on their right as well.

    Args:
        q: ``[B, H, K + N + K, D]``; without the read block in the last layer.
        k, v: ``[B, H, R, D]``.
        causal: of the distances ``R-1 .. 0``.
        ahead: of the distances ``0 .. K-1`` to the right.
        blocks: which rows are which.
        dropout: probability of dropping an attention weight.
        scale: of the scores; None is ``1 / sqrt(D)``.
        attend: the causal attention of the current rows.

    Returns:
        The read-outs, in the shape of *q*, and an empty normaliser.
    """
    size, end = blocks.tokens, blocks.end
    causal, ahead = bias_for(q, causal), bias_for(q, ahead)
    *read, q_current, q_write = q.split([*([] if blocks.last else [size]), blocks.current, size], dim=2)

    def block(queries: Tensor, stop: int) -> Tensor:
        seen = slice(blocks.oldest, stop)
        return block_attention(queries, k[:, :, seen], v[:, :, seen], causal, ahead, dropout, scale)

    nearest = last_distances(causal, end)
    current = attend(q_current, k[:, :, :end], v[:, :, :end], nearest, None, dropout, scale, need_normalizer=False)
    read_outs = [*(block(q_read, blocks.begin) for q_read in read), current.output, block(q_write, k.size(2))]
    return Attended(torch.cat(read_outs, dim=2), q.new_empty(0, dtype=torch.float32))


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: RelativeBias,
    ahead: RelativeBias,
    dropout: float = 0.0,
    scale: Optional[float] = None,
) -> Tensor:
    """Let a block of memory tokens attend to the P keys before and in it: as *q*.

    Args:
        q: ``[B, H, K, D]``.
        k, v: ``[B, H, P, D]``, of which the block's own are the last K.
        causal: of at least P distances, the last one 0.
        ahead: of the distances ``0 .. K-1`` to the right.
        dropout, scale: as of `blocks_attention`.
    """
    size, before = q.size(2), k.size(2) - q.size(2)
    scores = relative_scores(q, k, last_distances(causal, k.size(2)), size - 1, scale)
    right = relative_scores(q, k[:, :, before:], ahead, 0, scale)
    to_the_right = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    own = torch.where(to_the_right, right, scores[..., before:])
    weights = F.dropout(torch.cat([scores[..., :before], own], dim=-1).softmax(-1), dropout)
    return weights.to(v.dtype) @ v


def last_distances(bias: RelativeBias, count: int) -> RelativeBias:
    """Return a causal bias of the distances ``count-1 .. 0`` alone."""
    table, score = (None if t is None else t[:, t.size(1) - count :] for t in (bias.table, bias.score))
    return bias._replace(table=table, score=score)
