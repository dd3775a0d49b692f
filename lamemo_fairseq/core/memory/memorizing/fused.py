"""Attention to a store and a segment by the fused kernels: `eager.py` describes the function.

Shapes: B streams, H heads, N current tokens, m stored rows, D size of a head, D' its padded size.
"""

import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...attention import Attended, RelativeBias
from ...attention.fused import UNBOUNDED, Band, causal_attention, launch
from ...attention.fused.tiles import tiles_for
from ...attention.padding import as_wide
from ...kernels.autograd import Context, Function
from ...kernels.rows import by_rows, draw_seed, heads_like
from ...kernels.shared_kernels import block_of
from .kernel import store_kernel

EVERYTHING = Band(-UNBOUNDED, UNBOUNDED, 0)  # in the forward pass, where nothing depends on the distance


def store_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stored_k: Tensor,
    stored_v: Tensor,
    dropout: float = 0.0,
    scale: Optional[float] = None,
) -> Attended:
    """Attend as `eager.store_attention` does. Stored rows are not copied behind the segment's, and get no gradient."""
    size = q.size(-1)
    scale = 1 / math.sqrt(size) if scale is None else scale
    if stored_k.size(2) == 0:
        return causal_attention(q, k, v, RelativeBias(), None, dropout, scale, need_normalizer=False)
    if q.element_size() == 2 and size % 8:
        q, k, v = (F.pad(t, (0, -size % 8)) for t in (q, k, v))
    seeds = draw_seed(q, dropout, 2)
    stored = (as_wide(q, t.detach().to(q)) for t in (stored_k, stored_v))
    output: Tensor = _StoreAttention.apply(q, k, v, *stored, scale, dropout, seeds)
    return Attended(output[..., :size], q.new_empty(0, dtype=torch.float32))


class _StoreContext(Context):
    scale: float
    dropout: float
    seeds: Tuple[Optional[Tensor], Optional[Tensor]]  # of the store's weights and the segment's


class _StoreAttention(Function):
    @staticmethod
    def forward(
        ctx: _StoreContext,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stored_k: Tensor,
        stored_v: Tensor,
        scale: float,
        dropout: float,
        seeds: Optional[Tensor],
    ) -> Tensor:
        own = (None, None) if seeds is None else (seeds[:1], seeds[1:])
        queries, (of_store,), (output,) = q.size(2), heads_like(q), heads_like(q)
        inputs = launch.Inputs(
            q, stored_k, stored_v, RelativeBias(), EVERYTHING, None, None, 0.0, scale, dropout, own[0]
        )
        tiles = tiles_for(q.size(3), q.dtype)
        # Long rows without positions take fewer instructions a pair with wider tiles.
        normalizer, _ = launch.forward(inputs, of_store, tiles.forward if q.dtype == torch.float32 else tiles.query)
        causal = Band(-UNBOUNDED, 0, queries - 1)
        inputs = launch.Inputs(
            q, k, v, RelativeBias(), causal, None, (of_store, normalizer), 0.0, scale, dropout, own[1]
        )
        normalizer, _ = launch.forward(inputs, output)
        ctx.save_for_backward(q, k, v, stored_k, stored_v, output, normalizer)
        ctx.scale, ctx.dropout, ctx.seeds = scale, dropout, own
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: _StoreContext, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        q, k, v, stored_k, stored_v, output, normalizer = ctx.saved_tensors
        queries, (dq, dk, dv) = q.size(2), heads_like(q, 3)
        options = 0.0, ctx.scale, ctx.dropout, ctx.seeds[1]
        inputs = launch.Inputs(q, k, v, RelativeBias(), Band(-UNBOUNDED, 0, queries - 1), None, None, *options)
        # By the normaliser of all keys, the segment's weights are those of the whole softmax.
        launch.backward(inputs, launch.Saved(output, normalizer), grad, dq, dk, dv, add=False)
        _add_by_store(inputs._replace(k=stored_k, v=stored_v, seed=ctx.seeds[0]), output, normalizer, grad, dq)
        return dq, dk, dv, None, None, None, None, None


def _add_by_store(x: launch.Inputs, output: Tensor, normalizer: Tensor, grad: Tensor, dq: Tensor) -> None:
    """Add the queries' gradients by constant keys and values to ``dq [B, H, N, D]``."""
    q, k, v, grad = map(by_rows, (x.q, x.k, x.v, grad))
    batch, heads, queries, size = q.shape
    tiles = tiles_for(size, q.dtype)
    tile = tiles.key if q.dtype == torch.float32 else tiles.query
    strides = (stride for t in (q, k, v, output, grad, dq) for stride in t.stride()[:3])
    store_kernel[(triton.cdiv(queries, tile.queries), batch * heads)](
        q, k, v, output, normalizer, grad, x.seed, dq, *strides,
        H=heads, Q=queries, K=k.size(2), scale=x.scale, dropout=x.dropout,
        D=size, BLOCK_D=block_of(size), BLOCK_Q=tile.queries, BLOCK_K=tile.keys,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        DROPOUT=x.dropout > 0, MASKED=k.size(2) % tile.keys > 0, **tile.options(),
    )  # fmt: skip
