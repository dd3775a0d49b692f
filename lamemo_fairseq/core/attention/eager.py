"""Attention in plain PyTorch: the reference of every other backend, and the path for CPUs.

Shapes: B streams, H heads, Q queries, K keys, D size of a head, U distances.
"""

import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.autograd import Context, Function
from .types import Attended, RelativeBias


def relative_shift(by_distance: Tensor, offset: int, keys: int) -> Tensor:
    """Turn scores by distance into scores by key.

    Args:
        by_distance: ``[..., Q, U]``; column t belongs to the t-th distance of the table.
        offset: the column that query 0 and key 0 share; query i and key j share ``offset - i + j``.
        keys: K, at most U.

    Returns:
        ``[..., Q, K]``. Pairs whose column lies outside the table hold other pairs' scores
        and have to be masked.
    """
    queries, distances = by_distance.shape[-2:]
    if offset + keys >= queries + distances:  # the last query would read beyond the end
        by_distance = F.pad(by_distance, (0, 1))
    shifted: Tensor = _RelativeShift.apply(by_distance.contiguous(), offset, keys)
    return shifted


class _ShiftContext(Context):
    shape: torch.Size
    offset: int


class _RelativeShift(Function):
    """A view in which each query begins one entry further to the left: no copy forward, and a single one backward."""

    @staticmethod
    def forward(ctx: _ShiftContext, by_distance: Tensor, offset: int, keys: int) -> Tensor:
        ctx.shape, ctx.offset = by_distance.shape, offset
        return _skewed(by_distance, offset, keys)

    @staticmethod
    def backward(ctx: _ShiftContext, grad: Tensor) -> Tuple[Tensor, None, None]:
        by_distance = grad.new_zeros(ctx.shape)
        keys = grad.size(-1)
        # With U keys the last entry of a query is the first of the next, and only one of the two is ever seen.
        _skewed(by_distance, ctx.offset, keys - 1).copy_(grad[..., :-1])
        _skewed(by_distance, ctx.offset + keys - 1, 1).add_(grad[..., -1:])
        return by_distance, None, None


def _skewed(by_distance: Tensor, offset: int, keys: int) -> Tensor:
    """Return a view ``[.., Q, U] -> [.., Q, K]`` of the same entries; query i begins at column ``offset - i``."""
    *lead, queries, distances = by_distance.shape
    strides = (*by_distance.stride()[:-2], distances - 1, 1)
    start = by_distance.storage_offset() + offset
    return by_distance.as_strided((*lead, queries, keys), strides, start)


def relative_scores(q: Tensor, k: Tensor, bias: RelativeBias, offset: int, scale: Optional[float] = None) -> Tensor:
    """Return scores ``[B, H, Q, K]`` before masking, times *scale* (None: ``1 / sqrt(D)``), in float32 or wider.

    Query i and key j are at the distance of the table's entry ``offset - i + j``; a pair without one has any score.
    """
    scale = 1 / math.sqrt(q.size(-1)) if scale is None else scale
    content_q = q if bias.content is None else q + bias.content.unsqueeze(1)
    scores = (content_q * scale) @ k.transpose(-1, -2)
    by_distance = None if bias.score is None else (scale * bias.score).unsqueeze(1).expand(-1, q.size(-2), -1)
    if bias.table is not None:
        position_q = q if bias.position is None else q + bias.position.unsqueeze(1)
        by_table = (position_q * scale) @ bias.table.transpose(-1, -2)
        by_distance = by_table if by_distance is None else by_table + by_distance
    if by_distance is not None:
        scores.add_(relative_shift(by_distance, offset, k.size(-2)))
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def causal_scores(
    q: Tensor,
    k: Tensor,
    bias: RelativeBias,
    span: Optional[int] = None,
    scale: Optional[float] = None,
    nearest: int = 0,
    added: Optional[Tensor] = None,
) -> Tensor:
    """Return the scores ``[B, H, Q, K]`` of `causal_attention`, minus infinity for keys that are not seen."""
    queries, keys = q.size(-2), k.size(-2)
    scores = relative_scores(q, k, bias, queries - 1, scale)
    if added is not None:
        scores = scores + added
    if queries == 1 and span is None and nearest == 0:
        return scores
    query = torch.arange(keys - queries, keys, device=q.device).unsqueeze(1)
    distance = query - torch.arange(keys, device=q.device)
    hidden = distance < nearest
    return hide(scores, hidden if span is None else hidden | (distance >= nearest + span))


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: RelativeBias,
    span: Optional[int] = None,
    dropout: float = 0.0,
    scale: Optional[float] = None,
    need_normalizer: bool = True,
    nearest: int = 0,
    added: Optional[Tensor] = None,
) -> Attended:
    """Let every query attend to all keys up to its own position.

    Args:
        q: ``[B, H, Q, D]``, the last Q positions.
        k, v: ``[B, H, K, D]``, K >= Q positions.
        bias: its table holds the distances ``K-1 .. 0``, in this order.
        span: how many keys a query sees at most (None: all).
        dropout: probability of dropping an attention weight.
        scale: of the scores; None is ``1 / sqrt(D)``, and heads padded with zeros keep the scale of their own D.
        need_normalizer: False skips the normaliser; the result's is empty.
        nearest: the smallest distance of a key that a query sees; 1 hides a query's own. Each query must see a key.
        added: further scores ``[B, H, Q, K]``, scaled already.

    Returns:
        The read-out, and the normaliser without a gradient.
    """
    scores = causal_scores(q, k, bias, span, scale, nearest, added)
    weights, normalizer = (
        softmax_and_normalizer(scores) if need_normalizer else (scores.softmax(-1), scores.new_empty(0))
    )
    return Attended(F.dropout(weights, dropout).to(v.dtype) @ v, normalizer.detach())


def hide(scores: Tensor, hidden: Tensor) -> Tensor:
    """Set the *hidden* scores to minus infinity, in place."""
    return scores.masked_fill_(hidden, -math.inf)


def softmax_and_normalizer(scores: Tensor) -> Tuple[Tensor, Tensor]:
    """Return the softmax ``[.., K]`` and logsumexp ``[..]`` of the last dimension."""
    weights, normalizer = _Softmax.apply(scores)
    return weights, normalizer


class _Softmax(Function):
    """Softmax and logsumexp from one exponential a score; only the weights are stored for the backward pass."""

    @staticmethod
    def forward(ctx: Context, scores: Tensor) -> Tuple[Tensor, Tensor]:
        weights = scores.softmax(-1)
        ctx.save_for_backward(weights)
        ctx.set_materialize_grads(False)
        # The largest weight is exp(largest score - logsumexp), at least 1 / K.
        return weights, scores.amax(-1) - weights.amax(-1).log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Optional[Tensor], normalizer_grad: Optional[Tensor]) -> Optional[Tensor]:
        (weights,) = ctx.saved_tensors
        if grad is None:
            return None if normalizer_grad is None else weights * normalizer_grad.unsqueeze(-1)
        gradient = torch._softmax_backward_data(grad, weights, -1, weights.dtype)
        return gradient if normalizer_grad is None else gradient.addcmul_(weights, normalizer_grad.unsqueeze(-1))
