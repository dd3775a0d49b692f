"""Exact search for the rows with the largest scores, in blocks that bound the memory of the search.

Shapes: B streams, H heads, Q queries, m stored rows, D size of a head, k rows.
"""

import math
from typing import Callable, Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention import Attended

AT_ONCE = 2**28  # scores and stored numbers that are in memory at a time, in float32


def nearest(q: Tensor, keys: Tensor, hidden: Optional[Tensor], count: int) -> Tensor:
    """Return the rows whose keys have the largest products with each query; of equal products, the oldest rows.

    Products are in float32 or wider, as half precision would make thousands of them equal.

    Args:
        q: ``[B, H, Q, D]``.
        keys: ``[B, H, m, D]``, the oldest first.
        hidden: ``[B, m]`` True for rows that rank last; None if there are none.
        count: k, at most m.

    Returns:
        Indices ``[B, H, Q, k]``, the best first.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        scores = q.to(exact) @ keys.to(exact).transpose(-1, -2)
        if hidden is not None:
            scores.masked_fill_(hidden[:, None, None], -torch.inf)
        return largest(scores, count)


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the columns ``[.., k]`` of the *count* largest of ``scores [.., m]``; of equal scores, the first.

    The columns form groups of g. The k best columns lie in the k groups with the best maxima, so that only m / g maxima
    and k g columns are sorted. These are fewest with ``g = sqrt(m / k)``, which is rounded down to a power of two.
    """
    columns = scores.size(-1)
    size = group_size(columns, count)
    if size <= 2:
        return first(scores, count)
    if columns % size:
        scores = F.pad(scores, (0, -columns % size), value=-torch.inf)
    groups = scores.unflatten(-1, (-1, size))
    chosen = first(groups.amax(-1), count).sort(-1).values
    candidates = groups.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, size)).flatten(-2)
    best = first(candidates, count)
    return chosen.gather(-1, best // size) * size + best % size


def group_size(columns: int, count: int) -> int:
    """Return the columns g of a group."""
    return 1 << max(0, math.isqrt(columns // count).bit_length() - 1)


def first(scores: Tensor, count: int) -> Tensor:
    """Return the columns ``[.., k]`` of the *count* largest of ``scores [.., m]``, by sorting all."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def blocks(batch: int, heads: int, queries: int, rows: int, size: int) -> Iterator[Tuple[slice, slice]]:
    """Yield streams and queries to read together; `AT_ONCE` bounds the number of their scores and stored numbers."""
    streams = max(1, AT_ONCE // (heads * rows * (queries + size)))
    at_once = max(1, AT_ONCE // (streams * heads * rows) - size)
    for stream in range(0, batch, streams):
        for query in range(0, queries, at_once):
            yield slice(stream, stream + streams), slice(query, query + at_once)


def in_blocks(q: Tensor, rows: int, read: Callable[[Tensor, slice], Attended]) -> Attended:
    """Apply *read* to blocks of the queries ``[B, H, Q, D]`` and their streams, and return the joined results."""
    by_stream: List[Tuple[slice, List[Attended]]] = []
    batch, heads, queries, size = q.shape
    for streams, some in blocks(batch, heads, queries, rows, size):
        if not by_stream or by_stream[-1][0] != streams:
            by_stream.append((streams, []))
        by_stream[-1][1].append(read(q[streams, :, some], streams))
    joined = [[torch.cat(parts, dim=2) for parts in zip(*reads, strict=True)] for _, reads in by_stream]
    return Attended(*(torch.cat(parts, dim=0) for parts in zip(*joined, strict=True)))
