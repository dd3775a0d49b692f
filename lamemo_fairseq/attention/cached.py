"""Attention of new tokens over cached keys and values.

Shapes: B rows, k new tokens, N tokens of a segment, M memory slots, H heads, D size of a head; columns of a cache:
slots up to M, then tokens.
"""

import math
from typing import Optional

import torch
from torch import Tensor

from .types import Attended, RelativeBias


def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: RelativeBias,
    query: Tensor,
    oldest: Tensor,
    first: int,
    span: Optional[int] = None,
    need_normalizer: bool = True,
) -> Attended:
    """Every new token attends to the columns from its row's oldest slot up to its own.

    Args:
        q: ``[B, H, k, D]``.
        keys, values: ``[B, H, K, D]``, the columns from *first* on; what lies outside a row's own is ignored.
        bias: its table ends with the distances ``K-1 .. 0``.
        query: ``[B, k]`` the columns that the new tokens themselves are in.
        oldest: ``[B]`` each row's first column.
        span: how many keys a token sees at most, itself included (None: all).
        need_normalizer: False saves computing it, and the result's is empty.
    """
    columns = keys.size(2)
    scale = 1 / math.sqrt(q.size(-1))
    content_q = q if bias.content is None else q + bias.content.unsqueeze(1)
    scores = (content_q * scale) @ keys.transpose(-1, -2)
    column = torch.arange(first, first + columns, device=q.device)
    distance = query.unsqueeze(-1) - column  # [B, k, K]
    if bias.table is not None:
        table = bias.table[:, -columns:]
        position_q = q if bias.position is None else q + bias.position.unsqueeze(1)
        # One product a head for all rows, so that the table is not copied for each of them.
        by_head = (position_q * scale).transpose(0, 1).flatten(1, 2)
        by_distance = (by_head @ table.transpose(-1, -2)).unflatten(1, (q.size(0), q.size(2))).transpose(0, 1)
        if bias.score is not None:
            by_distance = by_distance + scale * bias.score[:, None, -columns:]
        entry = (columns - 1 - distance).clamp(0, columns - 1)
        scores = scores + by_distance.gather(-1, entry.unsqueeze(1).expand(scores.shape))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    hidden = (distance < 0) | (column < oldest[:, None, None])
    if span is not None:
        hidden = hidden | (distance >= span)
    scores = scores.masked_fill(hidden.unsqueeze(1), -math.inf)
    normalizer = scores.logsumexp(-1) if need_normalizer else scores.new_empty(0)
    return Attended(scores.softmax(-1).to(values.dtype) @ values, normalizer)
