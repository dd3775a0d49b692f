"""Self-attention that also tells how much attention the oldest rows received.

Shapes: B streams, R rows (memory, then current), Q queries, K keys, H heads, D size of a head, d model width.
"""

from typing import Optional

import torch
from torch import Tensor

from ...attention import RelativeBias
from ...attention.eager import causal_scores
from ...attention.padding import bias_for
from ...kernels.padded import WideRows
from ...layers import SelfAttention
from ...positions import LayerBias

# Queries at a time: their scores for all keys are held at once.
QUERIES_AT_ONCE = 128


class CompressiveSelfAttention(SelfAttention):
    """Causal attention over all rows, of which some may be watched."""

    def forward(
        self, rows: Tensor, bias: LayerBias, queries: int, watched: Optional[slice] = None
    ) -> tuple[WideRows, Optional[Tensor]]:
        """Attend to all rows before a query.

        Args:
            rows: ``[B, R, d]``.
            queries: Q, the last of them.
            watched: rows whose usage is asked for.

        Returns:
            Rows ``[B, Q, d]``, and the `usage` of those that are watched.
        """
        q, k, v = self.project(rows, queries, keep_padding=watched is None)
        attended = self.causal(q, k, v, bias, need_normalizer=False)
        if watched is None:
            return self.merge_heads(attended.output), None
        used = usage(*bias.rotate(q, k), bias_for(q, bias.causal), self.config.span, watched)
        return self.merge_heads(attended.output), used


@torch.no_grad()
def usage(q: Tensor, k: Tensor, bias: RelativeBias, span: Optional[int], watched: slice) -> Tensor:
    """Return the attention weights that keys receive, averaged over queries and heads; without dropout.

    Args:
        q: ``[B, H, Q, D]``, the last Q positions; rotated where positions rotate.
        k: ``[B, H, K, D]``, likewise.
        bias: its table holds the distances ``K-1 .. 0``.
        span: how many keys a query sees at most.
        watched: which keys.

    Returns:
        ``[B, watched]``, in float32 or wider. A query that does not see a key counts as a weight of 0.
    """
    queries, keys = q.size(2), k.size(2)
    total = torch.zeros(q.size(0), keys, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for start in range(0, queries, QUERIES_AT_ONCE):
        chunk = q[:, :, start : start + QUERIES_AT_ONCE]
        seen = keys - queries + start + chunk.size(2)
        near = bias._replace(
            table=None if bias.table is None else bias.table[:, -seen:],
            score=None if bias.score is None else bias.score[:, -seen:],
        )
        total[:, :seen] += causal_scores(chunk, k[:, :, :seen], near, span).softmax(-1).sum((1, 2))
    return total[:, watched] / (queries * q.size(1))
