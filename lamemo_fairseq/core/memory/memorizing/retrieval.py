"""Retrieval of the stored rows with the largest scores, by kernels: `eager.retrieved_attention` describes the function.

No product of a query and a key is stored but those of the groups that may have one of the best rows.

Shapes: B streams, H heads, Q queries, m stored rows, k retrieved rows, D size of a head, G groups of keys.
"""

from typing import Dict, Optional, Tuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...attention import Attended
from ...attention.fused.tiles import tiles_for
from ...kernels.autograd import Context, Function
from ...kernels.rows import by_rows, heads_like
from ...kernels.shared_kernels import block_of
from . import eager, kernel
from .search import blocks, group_size

LARGEST_COUNT = 128  # rows of one query in registers
LARGEST_WIDTH, LARGEST_GROUPS = 32, 1 << 15  # keys of a group; groups, whose maxima for a query are in registers
MAXIMA, CANDIDATES = 1024, 256  # of a query, in the registers of a warp
COPIED = 4096  # numbers that a program copies


def retrieved_attention(
    q: Tensor, keys: Tensor, values: Tensor, hidden: Optional[Tensor], count: int, scale: float
) -> Attended:
    """Attend as `eager.retrieved_attention` does; it does so itself where keys are hidden or few, or k is large."""
    if hidden is not None or count > LARGEST_COUNT or not _width(keys.size(2), count):
        return eager.retrieved_attention(q, keys, values, hidden, count, scale)
    q, keys, values = map(by_rows, (q, keys.to(q), values.to(q)))
    output, normalizer = _Retrieval.apply(q, keys, values, nearest(q.detach(), keys, count), scale)
    return Attended(output, normalizer)


def nearest(q: Tensor, keys: Tensor, count: int) -> Tensor:
    """Return rows ``[B, H, Q, k]``, int32, of queries ``[B, H, Q, D]`` and keys ``[B, H, m, D]``.

    They are those of `search.nearest`, but the oldest come first. Products are summed in float32.
    """
    batch, heads, queries, _ = q.shape
    parts = list(blocks(batch, heads, queries, triton.cdiv(keys.size(2), _width(keys.size(2), count)), 0))
    if len(parts) == 1:
        return _nearest(q, keys, count)
    rows = q.new_empty(batch, heads, queries, count, dtype=torch.int32)
    for streams, some in parts:  # as their maxima are too many for one
        rows[streams, :, some] = _nearest(q[streams, :, some], keys[streams], count)
    return rows


def _nearest(q: Tensor, keys: Tensor, count: int) -> Tensor:
    (batch, heads, queries, size), rows = q.shape, keys.size(2)
    tile = tiles_for(size, q.dtype).query
    width = _width(rows, count)
    groups = triton.cdiv(rows, width)
    strides, sizes = (*q.stride()[:3], *keys.stride()[:3]), {"H": heads, "Q": queries, "K": rows}
    best = q.new_empty(batch, heads, queries, groups, dtype=torch.float32)
    kernel.group_kernel[(triton.cdiv(queries, tile.queries), batch * heads)](
        q, keys, best, *strides, **sizes, G=groups,
        D=size, BLOCK_D=block_of(size), BLOCK_Q=tile.queries, BLOCK_K=tile.keys,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", SIZE=width, **tile.options(),
    )  # fmt: skip
    chosen, found = (q.new_empty(batch, heads, queries, count, dtype=torch.int32) for _ in range(2))
    counts = {"COUNT": count, "PARTS": triton.next_power_of_2(count)}
    kernel.best_group_kernel[(batch * heads * queries,)](best, chosen, groups, **counts, **_block(groups, MAXIMA))
    kernel.candidate_kernel[(queries, batch * heads)](
        q, keys, chosen, found, *strides, **sizes, D=size, **counts, SIZE=width, **_block(count * width, CANDIDATES)
    )
    return found


def _width(rows: int, count: int) -> int:
    """Return the keys of a group, 0 if there are too few or too many keys for groups.

    The groups are smaller than those of `search.group_size`: a candidate costs more than a maximum here, as all of its
    key is read again.
    """
    if not 2 * count < rows <= LARGEST_WIDTH * LARGEST_GROUPS:
        return 0
    return min(max(2, group_size(rows, 4 * count)), LARGEST_WIDTH)


def _block(columns: int, per_warp: int) -> Dict[str, int]:
    """Return the block of a program that has a row in registers: in one warp if possible, which needs no barrier."""
    block = block_of(columns)
    return {"BLOCK": block, "num_warps": max(1, block // per_warp)}


def appended(stored: Tensor, new: Tensor, kept: int, size: int) -> Tensor:
    """Return the last *kept* rows of ``stored [B, H, m, D]``, and rows of ``new [B, H, N, D]`` behind: *size* rows."""
    stored, new = stored.contiguous(), by_rows(new)
    batch, heads, rows, width = stored.shape
    out = stored.new_empty(batch, heads, size, width)
    kernel.append_kernel[(triton.cdiv(size * width, COPIED), batch * heads)](
        stored, new, out, *new.stride()[:3], heads, rows, kept, new.size(2), size, D=width, BLOCK=COPIED
    )
    return out


class _RetrievalContext(Context):
    scale: float


class _Retrieval(Function):
    @staticmethod
    def forward(
        ctx: _RetrievalContext, q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, scale: float
    ) -> Tuple[Tensor, Tensor]:
        (output,), normalizer = heads_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        _launch(q, keys, values, rows, output, normalizer, None, scale)
        ctx.save_for_backward(q, keys, values, rows, normalizer)
        ctx.scale = scale
        ctx.mark_non_differentiable(normalizer)
        return output, normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: _RetrievalContext, grad: Tensor, _: object) -> Tuple[Optional[Tensor], ...]:
        q, keys, values, rows, normalizer = ctx.saved_tensors
        (dq,) = heads_like(q)
        grad = by_rows(grad)
        _launch(q, keys, values, rows, dq, normalizer, grad, ctx.scale)
        return dq, None, None, None, None


def _launch(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    written: Tensor,
    normalizer: Tensor,
    grad: Optional[Tensor],
    scale: float,
) -> None:
    """Write the read-outs, or with *grad* the gradient of the queries, into ``written [B, H, Q, D]``."""
    batch, heads, queries, size = q.shape
    strides = [
        stride for t in (q, keys, values, written, written if grad is None else grad) for stride in t.stride()[:3]
    ]
    kernel.retrieval_kernel[(queries, batch * heads)](
        q, keys, values, rows, written, normalizer, grad, written, *strides,
        H=heads, Q=queries, scale=scale, D=size, BLOCK_D=block_of(size),
        COUNT=rows.size(-1), BLOCK_C=triton.next_power_of_2(rows.size(-1)), BACKWARD=grad is not None,
    )  # fmt: skip
