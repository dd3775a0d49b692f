"""Attention of new tokens over cached keys and values.

Shapes: B sequences, k new tokens, N tokens of a segment, M memory slots, H heads, D size of a head; C columns of a
cache: slots up to M, then tokens. A step looks at K of them. P kinds of counts in a text.
"""

import math
from functools import cached_property
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..attention import Attended, Counted, RelativeBias, Rotation


class Pairs(NamedTuple):
    """Properties of pairs of a new token and a column, the same in every layer; equal sequences share one entry."""

    entry: Tensor  # [B or 1, 1, k, K] where the last K distances of a table hold the pair's
    hidden: Tensor  # [B or 1, 1, k, K] whether the token must not see the column


class Columns:
    """The columns that a step's new tokens stand in and look at.

    Args:
        first, end: the columns looked at are ``first .. end-1``.
        query: ``[B, k]`` the new tokens' own columns. Columns of padding may lie beyond the cache.
        oldest: ``[B]`` each sequence's first column.
        last: the cache's last column, C - 1.
        span: how many keys a token sees at most (None: all).
        at: the first token's column, if the host knows that all sequences share it and that *first* is the oldest
            column.
        nearest: the smallest distance of a key that a token sees; 1 hides a token from itself.
    """

    # [P, B, k] of the new tokens and [P, B, K] of the columns looked at; None if nothing is counted in the text.
    counts: Optional[Tuple[Tensor, Tensor]] = None

    def __init__(
        self,
        first: int,
        end: int,
        query: Tensor,
        oldest: Tensor,
        last: int,
        span: Optional[int],
        at: Optional[int],
        nearest: int = 0,
    ):
        self.first, self.end, self.query, self.oldest, self.last = first, end, query, oldest, last
        self.span, self.at, self.nearest = span, at, nearest
        if at is not None and span is not None and query.size(1) == 1:
            self.first = max(first, at + 1 - span - nearest)

    @cached_property
    def own(self) -> Tensor:
        """The columns ``[B, k]`` that the new tokens are written to; columns that padding writes are never read."""
        return self.query.clamp(max=self.last)

    @cached_property
    def pairs(self) -> Optional[Pairs]:
        """The distances and hidden pairs; None if every token sees every column, in the order of the table."""
        if self.at is not None and self.query.size(1) == 1 and self.nearest == 0:
            return None
        alike = slice(0, 1 if self.at is not None else None)
        # Padding beyond the columns looked at sees the last of them: if it saw no column, it would write NaN.
        query, oldest = self.query[alike].clamp(max=self.end - 1), self.oldest[alike]
        width = self.end - self.first
        column = torch.arange(self.first, self.end, device=query.device)
        distance = query.unsqueeze(-1) - column
        hidden = (distance < self.nearest) | (column < oldest[:, None, None])
        if self.span is not None:
            hidden = hidden | (distance >= self.nearest + self.span)
        entry = (width - 1 - distance).clamp(0, width - 1)
        return Pairs(entry.unsqueeze(1), hidden.unsqueeze(1))

    def count(self, counts: Tensor) -> None:
        """Select the counts of the new tokens and of the columns looked at from ``counts [P, B, C]`` of all columns."""
        own = self.own.expand(counts.size(0), -1, -1)
        self.counts = counts.gather(2, own), counts[:, :, self.first : self.end]

    def write(self, buffer: Tensor, new: Tensor, dim: int) -> None:
        """Write *new*, one entry a new token along *dim*, into the tokens' columns of *buffer*."""
        if self.at is not None:
            buffer.narrow(dim, self.at, new.size(dim)).copy_(new)
            return
        shape = [1] * new.dim()
        shape[0], shape[dim] = self.own.shape
        buffer.scatter_(dim, self.own.view(shape).expand(new.shape), new.to(buffer.dtype))

    def take(self, buffer: Tensor) -> Tensor:
        """Return the new tokens' own columns: ``[B, H, C] -> [B, H, k]``."""
        return buffer.gather(2, self.own.unsqueeze(1).expand(-1, buffer.size(1), -1))

    def of(self, buffer: Tensor) -> Tensor:
        """Return the columns that are looked at: ``[B, H, C, ..] -> [B, H, K, ..]``."""
        return buffer.narrow(2, self.first, self.end - self.first)


def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: RelativeBias,
    columns: Columns,
    need_normalizer: bool = True,
    rotation: Optional[Rotation] = None,
    counted: Optional[Counted] = None,
) -> Attended:
    """Let every new token attend to the columns from its sequence's oldest slot up to its own.

    A token that sees no column reads zeros; this may occur with `Columns.nearest` above 0.

    Args:
        q: ``[B, H, k, D]``.
        keys, values: ``[B, H, C, D]``; other columns than a sequence's own are ignored.
        bias: its table ends with the distances ``K-1 .. 0``.
        need_normalizer: False skips the normaliser; the result's is empty.
        rotation: of queries and keys, which are both unrotated; its positions are columns. Slots move when a segment
            closes; a key that is rotated when it is read is exact in any column.
        counted: adds the scores of distances that are counted in the text.
    """
    batch, heads, _, size = q.shape
    seen = columns.of(keys)
    if rotation is not None:
        q, seen = rotation.at(columns.own).rotate(q), rotation.rotate(seen, columns.first)
    scale = 1 / math.sqrt(size)
    content_q = q if bias.content is None else q + bias.content.unsqueeze(1)
    by_key = seen.flatten(0, 1).transpose(1, 2)
    if bias.table is None and bias.score is None:
        scores = torch.bmm(content_q.flatten(0, 1) * scale, by_key)
    else:
        by_distance = _by_distance(q, bias, columns, scale)
        scores = torch.baddbmm(by_distance.flatten(0, 1), content_q.flatten(0, 1), by_key, alpha=scale)
    if counted is not None:
        assert columns.counts is not None
        scores = scores + counted.of_new(q, *columns.counts, scale).flatten(0, 1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if columns.pairs is not None:
        scores = scores.view(batch, heads, *scores.shape[1:]).masked_fill(columns.pairs.hidden, -math.inf).flatten(0, 1)
    weights = scores.softmax(-1)
    if columns.nearest > 0 and columns.pairs is not None:
        weights = weights.view(batch, heads, *weights.shape[1:]).masked_fill(columns.pairs.hidden, 0).flatten(0, 1)
    output = torch.bmm(weights.to(values.dtype), columns.of(values).flatten(0, 1)).view(q.shape)
    if not need_normalizer:
        return Attended(output, scores.new_empty(0))
    # The largest weight is exp(largest score - logsumexp): two maxima cost less than the sum of exponentials again.
    normalizer = scores.amax(-1) - weights.amax(-1).log()
    return Attended(output, normalizer.view(q.shape[:-1]))


def _by_distance(q: Tensor, bias: RelativeBias, columns: Columns, scale: float) -> Tensor:
    """Return the share of positions in the scores: ``[B, H, k, K]``."""
    width = columns.end - columns.first
    learned = None
    if bias.score is not None:
        learned = bias.score[:, None, -width:].expand(-1, q.size(0) * q.size(2), -1)
    if bias.table is None:
        assert learned is not None
        scores = learned * scale
    else:
        position_q = q if bias.position is None else q + bias.position.unsqueeze(1)
        # One product a head for all sequences, so that the table is not copied for each of them.
        by_head, table = position_q.transpose(0, 1).flatten(1, 2), bias.table[:, -width:].transpose(1, 2)
        if learned is None:
            scores = torch.bmm(by_head * scale, table)
        else:
            scores = torch.baddbmm(learned, by_head, table, beta=scale, alpha=scale)
    scores = scores.view(len(scores), q.size(0), q.size(2), -1).transpose(0, 1)
    if columns.pairs is None:
        return scores
    return scores.gather(-1, columns.pairs.entry.expand(scores.shape))
