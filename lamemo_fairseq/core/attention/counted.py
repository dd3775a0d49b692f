"""Scores by distances that are counted in a text, such as in sentences: the distances of rows differ between streams.

Shapes: B streams, H heads, Q queries, K keys, R rows, P kinds of counts, U distances, m memory slots, D size of a head,
D' its padded size.
"""

from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.autograd import Context, Function


class Counted(NamedTuple):
    """Tables of one layer for distances of P kinds, and the counts of rows whose differences are the distances."""

    position: Tensor  # [H, D], added to queries
    past: Tensor  # [P, H, U, D], of the distances 0 .. U-1
    around: Optional[Tensor] = None  # [P, H, 2 m + 1, D], of the distances -m .. m; None where no slot looks ahead
    counts: Optional[Tensor] = None  # [P, B, R] int64, growing from row to row

    def of_current(self, q: Tensor, scale: float) -> Tensor:
        """Return scores ``[B, H, Q, R]`` of the last Q rows ``q [B, H, Q, D or D']`` for all rows, times *scale*.

        Scores of a pair whose key comes after the query have to be masked.
        """
        assert self.counts is not None
        queries = self.counts[:, :, self.counts.size(2) - q.size(2) :]
        return counted_scores(self._with_bias(q) * scale, self.past, queries, self.counts)

    def of_slots(self, q: Tensor, keys: slice, scale: float) -> Tensor:
        """Return scores ``[B, H, m, K]`` of the first m rows ``q [B, H, m, D or D']`` for the rows *keys*."""
        assert self.counts is not None and self.around is not None
        slots = q.size(2)
        queries = self.counts[:, :, :slots] + self.around.size(2) // 2
        return counted_scores(self._with_bias(q) * scale, self.around, queries, self.counts[:, :, keys])

    def of_new(self, q: Tensor, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        """Return scores ``[B, H, k, K]`` of new tokens; counts *queries* ``[P, B, k]`` and *keys* ``[P, B, K]``."""
        return counted_scores(self._with_bias(q) * scale, self.past, queries, keys)

    def _with_bias(self, q: Tensor) -> Tensor:
        return q[..., : self.position.size(1)] + self.position.unsqueeze(1)


def counted_scores(q: Tensor, tables: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Return the sum over kinds of ``q . table[count of the query - count of the key]``: ``[B, H, Q, K]``.

    Args:
        q: ``[B, H, Q, D]``.
        tables: ``[P, H, U, D]``; a pair whose difference lies outside a table uses the nearest entry, without gradient.
        queries, keys: counts ``[P, B, Q]`` and ``[P, B, K]``, those of the keys growing.
    """
    batch, heads, length, _ = q.shape
    by_head = q.transpose(0, 1).flatten(1, 2)  # so that no table is copied for each stream
    scores: Optional[Tensor] = None
    for table, of_queries, of_keys in zip(tables, queries, keys, strict=True):
        by_distance = torch.bmm(by_head, table.transpose(1, 2)).view(heads, batch, length, -1).transpose(0, 1)
        chosen: Tensor = _Chosen.apply(by_distance, of_queries, of_keys)
        scores = chosen if scores is None else scores + chosen
    assert scores is not None
    return scores


class _ChosenContext(Context):
    distances: int


class _Chosen(Function):
    """``[B, H, Q, U] -> [B, H, Q, K]``: entry ``queries[i] - keys[j]`` of each query i.

    The keys of one entry are consecutive, as counts grow. So its gradient is a difference of running sums, which has
    the same bits in every run, unlike additions in any order.
    """

    @staticmethod
    def forward(ctx: _ChosenContext, by_distance: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        ctx.save_for_backward(queries, keys)
        ctx.distances = by_distance.size(3)
        entry = (queries.unsqueeze(2) - keys.unsqueeze(1)).clamp(0, ctx.distances - 1)
        return by_distance.gather(3, entry.unsqueeze(1).expand(-1, by_distance.size(1), -1, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: _ChosenContext, grad: Tensor) -> Tuple[Tensor, None, None]:
        queries, keys = ctx.saved_tensors
        sums = F.pad(grad.cumsum(3, dtype=torch.promote_types(grad.dtype, torch.float32)), (1, 0))
        # The keys of entry u have the count `query - u`. They end where those of entry u - 1 begin.
        wanted = queries.unsqueeze(2) - torch.arange(-1, ctx.distances, device=queries.device)
        begin = torch.searchsorted(keys.contiguous(), wanted.flatten(1)).view_as(wanted)
        before = sums.gather(3, begin.unsqueeze(1).expand(-1, grad.size(1), -1, -1))
        return (before[..., :-1] - before[..., 1:]).to(grad.dtype), None, None
