"""Attention of one new token a row over cached keys and values, as two Triton kernels.

The first splits the columns among programs, the second joins their softmaxes, adds the token itself and writes it into
the cache. Positions cost no gather: rows of the table are as far apart as columns.

Shapes: B rows, H heads, D size of a head, C columns of the cache, T = C distances, S splits.
"""

import math
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .types import RelativeBias

BLOCK = 64  # columns at a time
PROGRAMS = 256  # enough of them to fill a large GPU
NEVER = tl.constexpr(-1e30)  # below every score, and unlike -inf safe to subtract


@triton.jit
def _partial(
    qkv_ptr, k_ptr, v_ptr, content_ptr, position_ptr, table_ptr, column_ptr, oldest_ptr, acc_ptr, top_ptr, sum_ptr,
    heads, columns, row_stride, head_stride, distance_stride, share,
    scale: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    bh, split = tl.program_id(0), tl.program_id(1)
    b, h = bh // heads, bh % heads
    d = tl.arange(0, BD)
    in_head = d < D
    q = tl.load(qkv_ptr + b * row_stride + h * D + d, mask=in_head, other=0).to(tl.float32)
    content_q = (q + tl.load(content_ptr + h * D + d, mask=in_head, other=0).to(tl.float32)) * scale
    position_q = (q + tl.load(position_ptr + h * D + d, mask=in_head, other=0).to(tl.float32)) * scale
    column, oldest = tl.load(column_ptr + b), tl.load(oldest_ptr + b)
    base = bh.to(tl.int64) * columns * D
    top = tl.full([1], NEVER, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BD], tl.float32)
    for start in range(split * share, (split + 1) * share, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        seen = (c >= oldest) & (c < column)
        both = seen[:, None] & in_head[None, :]
        place = base + c[:, None] * D + d[None, :]
        k = tl.load(k_ptr + place, mask=both, other=0).to(tl.float32)
        v = tl.load(v_ptr + place, mask=both, other=0).to(tl.float32)
        distance_row = columns - 1 - column + c
        r_place = h * head_stride + distance_row[:, None] * distance_stride + d[None, :]
        r = tl.load(table_ptr + r_place, mask=both, other=0).to(tl.float32)
        score = tl.sum(k * content_q[None, :] + r * position_q[None, :], axis=1)
        score = tl.where(seen, score, NEVER)
        new_top = tl.maximum(top, tl.max(score, axis=0))
        weight = tl.where(seen, tl.exp(score - new_top), 0.0)
        kept = tl.exp(top - new_top)
        acc = acc * kept + tl.sum(weight[:, None] * v, axis=0)
        total = total * kept + tl.sum(weight, axis=0)
        top = new_top
    part = bh * S + split
    one = tl.arange(0, 1)
    tl.store(acc_ptr + part * BD + d, acc)
    tl.store(top_ptr + part + one, top)
    tl.store(sum_ptr + part + one, total)


@triton.jit
def _join(
    qkv_ptr, k_ptr, v_ptr, content_ptr, position_ptr, table_ptr, column_ptr, acc_ptr, top_ptr, sum_ptr,
    out_ptr, record_ptr, normalizer_ptr,
    heads, columns, row_stride, head_stride, distance_stride,
    scale: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, S: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0)
    b, h = bh // heads, bh % heads
    d = tl.arange(0, BD)
    in_head = d < D
    new = qkv_ptr + b * row_stride + h * D + d
    q = tl.load(new, mask=in_head, other=0).to(tl.float32)
    k_new = tl.load(new + heads * D, mask=in_head, other=0)
    v_new = tl.load(new + 2 * heads * D, mask=in_head, other=0)
    content_q = (q + tl.load(content_ptr + h * D + d, mask=in_head, other=0).to(tl.float32)) * scale
    position_q = (q + tl.load(position_ptr + h * D + d, mask=in_head, other=0).to(tl.float32)) * scale
    r = tl.load(table_ptr + h * head_stride + (columns - 1) * distance_stride + d, mask=in_head, other=0)
    own = tl.sum(k_new.to(tl.float32) * content_q + r.to(tl.float32) * position_q, axis=0)
    s = tl.arange(0, S)
    tops = tl.load(top_ptr + bh * S + s)
    top = tl.maximum(tl.max(tops, axis=0), own)
    share = tl.exp(tops - top)
    own_weight = tl.exp(own - top)
    total = tl.sum(share * tl.load(sum_ptr + bh * S + s), axis=0) + own_weight
    accs = tl.load(acc_ptr + (bh * S + s)[:, None] * BD + d[None, :])
    out = (tl.sum(share[:, None] * accs, axis=0) + own_weight * v_new.to(tl.float32)) / total
    tl.store(out_ptr + bh * D + d, out.to(out_ptr.dtype.element_ty), mask=in_head)
    place = bh.to(tl.int64) * columns + tl.load(column_ptr + b)
    tl.store(k_ptr + place * D + d, k_new, mask=in_head)
    tl.store(v_ptr + place * D + d, v_new, mask=in_head)
    if RECORD:
        tl.store(record_ptr + place * D + d, out.to(record_ptr.dtype.element_ty), mask=in_head)
        tl.store(normalizer_ptr + place, (top + tl.log(total)).to(normalizer_ptr.dtype.element_ty))


def cached_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: RelativeBias,
    column: Tensor,
    oldest: Tensor,
    end: int,
    record: Optional[Any] = None,
) -> Tensor:
    """Each row's new token attends to the columns from its oldest slot up to its own, and is written into the cache.

    Args:
        qkv: ``[B, 3 H D]``, the token's query, key and value.
        keys, values: ``[B, H, C, D]``, contiguous; changed in place.
        bias: content, position and a table of the distances ``C-1 .. 0``.
        column: ``[B]`` where the new token stands.
        oldest: ``[B]`` each row's first column.
        end: no row's token stands at this column or beyond.
        record: where read-outs and normalisers are kept too.

    Returns:
        The read-out ``[B, H D]``.
    """
    rows, heads, columns, size = keys.shape
    assert bias.content is not None and bias.position is not None and bias.table is not None
    # Only the interpreter meets the layout that plain attention has on a CPU.
    table = bias.table if bias.table.stride(2) == 1 else bias.table.contiguous()
    splits = 1
    while rows * heads * splits < PROGRAMS and splits * BLOCK < end:
        splits *= 2
    share = -(-end // (splits * BLOCK)) * BLOCK
    wide = triton.next_power_of_2(size)
    acc = torch.empty(rows * heads * splits, wide, device=qkv.device, dtype=torch.float32)
    top, total = acc.new_empty(rows * heads * splits), acc.new_empty(rows * heads * splits)
    out = qkv.new_empty(rows, heads * size)
    sizes = (heads, columns, qkv.stride(0), table.stride(0), table.stride(1))
    scale = 1 / math.sqrt(size)
    given = (qkv, keys, values, bias.content, bias.position, table, column)
    _partial[(rows * heads, splits)](
        *given, oldest, acc, top, total, *sizes, share, scale=scale, D=size, BD=wide, S=splits, BLOCK_C=BLOCK
    )
    kept = (keys, keys) if record is None else (record.outputs, record.normalizers)
    _join[(rows * heads,)](
        *given, acc, top, total, out, *kept, *sizes, scale=scale, D=size, BD=wide, S=splits, RECORD=record is not None
    )
    return out
