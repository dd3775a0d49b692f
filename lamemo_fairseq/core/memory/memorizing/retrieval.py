"""Retrieval of the stored rows with the largest scores, by kernels: `eager.retrieved_attention` describes the function.

No product of a query and a key is stored but those of the groups that may have one of the best rows.

Shapes: B streams, H heads, Q queries, m stored rows, k retrieved rows, D size of a head, G groups of keys.
"""

from typing import Optional, Tuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...attention import Attended
from ...attention.fused.tiles import tiles_for
from ...kernels.autograd import Context, Function
from ...kernels.rows import heads_like
from ...kernels.shared_kernels import block_of
from . import eager, kernel
from .search import first, group_size

LARGEST_COUNT = 128  # rows of one query in registers


def retrieved_attention(
    q: Tensor, keys: Tensor, values: Tensor, hidden: Optional[Tensor], count: int, scale: float
) -> Attended:
    """Attend as `eager.retrieved_attention` does; it does so itself where keys are hidden or few, or k is large."""
    if hidden is not None or count > LARGEST_COUNT or group_size(keys.size(2), count) <= 2:
        return eager.retrieved_attention(q, keys, values, hidden, count, scale)
    q, keys, values = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, keys.to(q), values.to(q)))
    output, normalizer = _Retrieval.apply(q, keys, values, nearest(q.detach(), keys, count), scale)
    return Attended(output, normalizer)


def nearest(q: Tensor, keys: Tensor, count: int) -> Tensor:
    """Return rows ``[B, H, Q, k]`` as `search.nearest` does, of queries ``[B, H, Q, D]`` and keys ``[B, H, m, D]``.

    Products are summed in float32.
    """
    (batch, heads, queries, size), rows = q.shape, keys.size(2)
    tile = tiles_for(size, q.dtype).query
    width, block = min(group_size(rows, count), tile.keys), block_of(size)
    groups = triton.cdiv(rows, width)
    strides, sizes = (*q.stride()[:3], *keys.stride()[:3]), {"H": heads, "Q": queries, "K": rows}
    best = q.new_empty(batch, heads, queries, groups, dtype=torch.float32)
    kernel.group_kernel[(triton.cdiv(queries, tile.queries), batch * heads)](
        q, keys, best, *strides, **sizes, G=groups,
        D=size, BLOCK_D=block, BLOCK_Q=tile.queries, BLOCK_K=tile.keys,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", SIZE=width, **tile.options(),
    )  # fmt: skip
    chosen = first(best, count).sort(-1).values
    scores = q.new_empty(batch, heads, queries, count * width, dtype=torch.float32)
    kernel.candidate_kernel[(queries, batch * heads)](
        q, keys, chosen, scores, *strides, **sizes,
        D=size, BLOCK_D=block, BLOCK_K=64, COUNT=count, SIZE=width,
    )  # fmt: skip
    found = first(scores, count)
    return chosen.gather(-1, found // width) * width + found % width


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
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
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
