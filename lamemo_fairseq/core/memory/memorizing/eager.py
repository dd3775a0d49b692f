"""Attention to a store in plain PyTorch: to all rows and a segment, or to the rows with the largest scores.

Shapes: B streams, H heads, N current tokens, Q queries, m stored rows, k retrieved rows, D size of a head,
D' its padded size.
"""

from typing import Callable, Optional, Tuple

import torch
from torch import Tensor

from ...attention import Attended, RelativeBias
from ...attention.eager import causal_attention, softmax_and_normalizer
from ...attention.padding import as_wide
from .search import in_blocks, nearest


def store_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stored_k: Tensor,
    stored_v: Tensor,
    dropout: float = 0.0,
    scale: Optional[float] = None,
    attend: Callable[..., Attended] = causal_attention,
) -> Attended:
    """Let the tokens of a segment attend to all stored rows, and to each other causally, by one softmax.

    Args:
        q, k, v: ``[B, H, N, D or D']``.
        stored_k, stored_v: ``[B, H, m, D]``, which get no gradient.
        dropout: probability of dropping an attention weight.
        scale: of the scores; None is ``1 / sqrt(D)``.
        attend: the causal attention to stored rows and tokens.

    Returns:
        The read-out, in the shape of *q*, and an empty normaliser.
    """
    k, v = (torch.cat([as_wide(q, old).to(q), new], dim=2) for old, new in ((stored_k, k), (stored_v, v)))
    return attend(q, k, v, RelativeBias(), None, dropout, scale, need_normalizer=False)


def retrieved_attention(
    q: Tensor, keys: Tensor, values: Tensor, hidden: Optional[Tensor], count: int, scale: float
) -> Attended:
    """Let every query attend to the k = *count* rows with the largest scores: the read-out, and its normaliser.

    Args:
        q: ``[B, H, Q, D]``.
        keys, values: ``[B, H, m, D]``, the oldest first; they get no gradient.
        hidden: ``[B, m]``, True for rows that are not read if any other is; None if all may be.
        count: k, at most m.
        scale: of the scores.
    """

    def read(some: Tensor, streams: slice) -> Attended:
        unread = None if hidden is None else hidden[streams]
        return _retrieved(some, keys[streams], values[streams], unread, count, scale)

    return in_blocks(q, keys.size(2), read)


def _retrieved(q: Tensor, keys: Tensor, values: Tensor, hidden: Optional[Tensor], count: int, scale: float) -> Attended:
    rows = nearest(q, keys, hidden, count)
    taken_keys, taken_values = (_taken(stored, rows) for stored in (keys, values))
    scores = (taken_keys @ q.unsqueeze(-1)).squeeze(-1)
    if hidden is not None:
        hidden = hidden[:, None, None].expand(*rows.shape[:3], -1).gather(-1, rows)
    weights, normalizer = weights_of(scores, hidden, scale)
    return Attended((weights.to(values.dtype).unsqueeze(-2) @ taken_values).squeeze(-2), normalizer)


def weights_of(scores: Tensor, hidden: Optional[Tensor], scale: float) -> Tuple[Tensor, Tensor]:
    """Return weights and normalisers of scores ``[B, H, Q, K]``; hidden rows weigh 0 if any row is not hidden."""
    exact = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if hidden is not None:
        exact = exact.masked_fill(hidden, torch.finfo(exact.dtype).min)
    return softmax_and_normalizer(exact)


def _taken(stored: Tensor, rows: Tensor) -> Tensor:
    """Return the *rows* ``[B, H, Q, k]`` of ``stored [B, H, m, D]``: ``[B, H, Q, k, D]``."""
    index = rows.flatten(2).unsqueeze(-1).expand(-1, -1, -1, stored.size(-1))
    taken: Tensor = stored.gather(2, index).unflatten(2, rows.shape[2:])
    return taken
