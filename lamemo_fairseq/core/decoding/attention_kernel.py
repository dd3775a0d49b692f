"""Attention of one new token a sequence over cached keys and values, as one Triton kernel.

Where there are few sequences and heads, several programs share the columns of a head. The last program to finish joins
their softmaxes, adds the token itself and writes it into the cache. Positions cost no gather: entries of the table are
as far apart as columns. Only columns that a sequence sees are read.

Shapes: B sequences, H heads, D size of a head, C columns of the cache, of them M for slots, S splits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math
from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.types import Attended, RelativeBias
from ..kernels.dependent import launch_options, wait_for_inputs

BLOCK = 64  # columns at a time, at most
TILE_BYTES = 8192  # of keys, of values and of the table at a time
STAGES = 2  # blocks in flight: one is loaded while another is computed
PROGRAMS = 256  # enough of them to fill a large GPU
NEVER = tl.constexpr(-1e30)  # below every score, and unlike -inf safe to subtract


@triton.jit
def columns_of(bh, split, columns, column, oldest, S: tl.constexpr):
    """Return where a head's columns lie, and the first and the end of a split's."""
    base = bh.to(tl.int64) * columns
    share = (column - oldest + S - 1) // S
    first = oldest + split * share
    return base, first, tl.minimum(first + share, column)


@triton.jit
def with_block(
    b_top, b_sum, b_acc, c, end, base, d, in_head, b_content, b_position, p_k, p_v, p_r, p_s, s_distance,
    b_k, b_v, b_r, scale: tl.constexpr, D: tl.constexpr, TABLE: tl.constexpr, SCORE: tl.constexpr,
    LOADED: tl.constexpr,
):  # fmt: skip
    """Return softmaxes with the columns *c*, whose keys, values and entries are loaded here unless they are LOADED.

    A sum of two products is rounded as `tl.fma` says. A compiler would choose, and not in both callers alike.
    """
    seen = c < end
    both = seen[:, None] & in_head[None, :]
    offset = (base + c)[:, None] * D + d[None, :]
    if not LOADED:
        b_k = tl.load(p_k + offset, mask=both, other=0)
    products = b_k.to(tl.float32) * b_content[None, :]
    if TABLE:
        if not LOADED:
            b_r = tl.load(p_r + c[:, None] * s_distance + d[None, :], mask=both, other=0)
        products = tl.fma(b_r.to(tl.float32), b_position[None, :], products)
    if not LOADED:
        b_v = tl.load(p_v + offset, mask=both, other=0)
    b_v = b_v.to(tl.float32)
    score = tl.sum(products, axis=1)
    if SCORE:
        score = tl.fma(tl.load(p_s + c, mask=seen, other=0).to(tl.float32), scale, score)
    score = tl.where(seen, score, NEVER)
    top = tl.maximum(b_top, score)
    weight = tl.where(seen, tl.exp(score - top), 0.0)
    shrink = tl.exp(b_top - top)
    b_acc = tl.fma(weight[:, None], b_v, b_acc * shrink[:, None])
    return top, tl.fma(b_sum, shrink, weight), b_acc


@triton.jit
def cached_attention_kernel(
    p_qkv, p_k, p_v, p_content, p_position, p_table, p_score, p_tokens, p_slots, p_out, p_outputs, p_normalizers,
    p_acc, p_top, p_sum, p_arrived,
    heads, columns, mem_len, span, s_sequence, s_head, s_distance, s_score,
    scale: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, S: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr, RECORD: tl.constexpr, CONTENT: tl.constexpr, POSITION: tl.constexpr, TABLE: tl.constexpr,
    SCORE: tl.constexpr, NEAREST: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    bh, split = tl.program_id(0), tl.program_id(1)
    b, h = bh // heads, bh % heads
    column = mem_len + tl.load(p_tokens + b).to(tl.int32)
    oldest = tl.maximum(mem_len - tl.load(p_slots + b).to(tl.int32), column + 1 - NEAREST - span)
    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    p_new = p_qkv + b * s_sequence + h * D + d
    p_r, p_s = p_k, p_k
    FIRST: tl.constexpr = EARLY and S > 1
    if EARLY:  # what the kernel before did not make
        if CONTENT:
            content = tl.load(p_content + h * D + d, mask=in_head, other=0)
        if POSITION:
            position = tl.load(p_position + h * D + d, mask=in_head, other=0)
        if TABLE:
            p_r = p_table + h * s_head + (columns - 1 - column) * s_distance
            b_r_own = tl.load(p_r + column * s_distance + d, mask=in_head, other=0)
        if FIRST:
            base, first, end = columns_of(bh, split, columns, column, oldest, S)
            c = first + tl.arange(0, BLOCK_C)
            both = (c < end)[:, None] & in_head[None, :]
            offset = (base + c)[:, None] * D + d[None, :]
            b_k = tl.load(p_k + offset, mask=both, other=0)
            b_r = b_k
            if TABLE:
                b_r = tl.load(p_r + c[:, None] * s_distance + d[None, :], mask=both, other=0)
            b_v = tl.load(p_v + offset, mask=both, other=0)
    wait_for_inputs(PDL)
    b_q = tl.load(p_new, mask=in_head, other=0).to(tl.float32)
    b_content, b_position = b_q, b_q
    if CONTENT:
        if not EARLY:
            content = tl.load(p_content + h * D + d, mask=in_head, other=0)
        b_content += content.to(tl.float32)
    if POSITION:
        if not EARLY:
            position = tl.load(p_position + h * D + d, mask=in_head, other=0)
        b_position += position.to(tl.float32)
    b_content, b_position = b_content * scale, b_position * scale
    b_k_new = tl.load(p_new + heads * D, mask=in_head, other=0)
    b_v_new = tl.load(p_new + 2 * heads * D, mask=in_head, other=0)
    b_own = b_k_new.to(tl.float32) * b_content
    if TABLE:
        if not EARLY:
            p_r = p_table + h * s_head + (columns - 1 - column) * s_distance
            b_r_own = tl.load(p_r + column * s_distance + d, mask=in_head, other=0)
        b_own = tl.fma(b_r_own.to(tl.float32), b_position, b_own)
    own = tl.sum(b_own, axis=0)
    if SCORE:
        p_s = p_score + h * s_score + columns - 1 - column
        own = tl.fma(tl.load(p_s + column).to(tl.float32), scale, own)
    base, first, end = columns_of(bh, split, columns, column, oldest, S)
    # Every position of a block has a softmax of its own, so that warps wait for each other at the end only.
    # [BLOCK_C], [BLOCK_C], [BLOCK_C, BLOCK_D]
    b_top = tl.full([BLOCK_C], NEVER, tl.float32)
    b_sum = tl.zeros([BLOCK_C], tl.float32)
    b_acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    if FIRST:
        b_top, b_sum, b_acc = with_block(
            b_top, b_sum, b_acc, c, end, base, d, in_head, b_content, b_position, p_k, p_v, p_r, p_s, s_distance,
            b_k, b_v, b_r, scale, D, TABLE, SCORE, True,
        )  # fmt: skip
        first += BLOCK_C
    for start in tl.range(first, end, BLOCK_C, num_stages=STAGES):
        c = start + tl.arange(0, BLOCK_C)
        b_top, b_sum, b_acc = with_block(
            b_top, b_sum, b_acc, c, end, base, d, in_head, b_content, b_position, p_k, p_v, p_r, p_s, s_distance,
            b_top, b_top, b_top, scale, D, TABLE, SCORE, False,
        )  # fmt: skip
    top = tl.max(b_top, axis=0)
    shrink = tl.exp(b_top - top)
    total = tl.sum(b_sum * shrink, axis=0)
    b_out = tl.sum(b_acc * shrink[:, None], axis=0)

    last = True
    if S > 1:
        result = bh * S + split
        tl.store(p_acc + result * BLOCK_D + d, b_out)
        tl.store(p_top + result, top)
        tl.store(p_sum + result, total)
        tl.debug_barrier()  # all results are written before the program counts as arrived
        last = tl.atomic_add(p_arrived + bh, 1, sem="acq_rel") == S - 1
    if last:
        if S > 1:
            tl.debug_barrier()
            results = bh * S + tl.arange(0, S)
            # Results of other multiprocessors are in the L2 cache, not in the L1 cache.
            tops = tl.load(p_top + results, cache_modifier=".cg")
            sums = tl.load(p_sum + results, cache_modifier=".cg")
            accs = tl.load(p_acc + results[:, None] * BLOCK_D + d[None, :], cache_modifier=".cg")
            top = tl.max(tops, axis=0)
            shrink_of = tl.exp(tops - top)
            total = tl.sum(sums * shrink_of, axis=0)
            b_out = tl.sum(accs * shrink_of[:, None], axis=0)
            tl.store(p_arrived + bh, 0)
        joint = top
        if NEAREST == 0:
            joint = tl.maximum(top, own)
            before, weight_own = tl.exp(top - joint), tl.exp(own - joint)
            total = tl.fma(total, before, weight_own)
            b_out = tl.fma(b_v_new.to(tl.float32), weight_own, b_out * before) / total
        else:  # zeros if there is no column
            b_out = b_out / tl.where(total > 0, total, 1.0)
        tl.store(p_out + bh * D + d, b_out.to(p_out.dtype.element_ty), mask=in_head)
        mine = base + column
        tl.store(p_k + mine * D + d, b_k_new, mask=in_head)
        tl.store(p_v + mine * D + d, b_v_new, mask=in_head)
        if RECORD:
            tl.store(p_outputs + mine * D + d, b_out.to(p_outputs.dtype.element_ty), mask=in_head)
            tl.store(p_normalizers + mine, (joint + tl.log(total)).to(p_normalizers.dtype.element_ty))


def columns_at_a_time(size: int, bytes_each: int) -> int:
    """Return the columns of a block, a power of two, for heads of *size* numbers: larger heads have fewer."""
    return max(1, min(BLOCK, TILE_BYTES // (size * bytes_each)))


class Workspace(NamedTuple):
    """Buffers in which the splits of a sequence and head leave their softmaxes; every layer may use the same."""

    acc: Tensor  # [B H S, D padded], float32
    top: Tensor  # [B H S], float32
    sum: Tensor  # [B H S], float32
    arrived: Tensor  # [B H] int32, 0 between two launches

    @classmethod
    def empty(cls, keys: Tensor) -> "Workspace":
        """Return the workspace for keys ``[B, H, C, D]``."""
        batch, heads, columns, size = keys.shape
        splits = 1
        while batch * heads * splits < PROGRAMS and splits * BLOCK < columns:
            splits *= 2
        count = batch * heads * splits
        acc = torch.empty(count, triton.next_power_of_2(size), device=keys.device, dtype=torch.float32)
        arrived = torch.zeros(batch * heads, device=keys.device, dtype=torch.int32)
        return cls(acc, acc.new_empty(count), acc.new_empty(count), arrived)

    @property
    def splits(self) -> int:
        return len(self.top) // len(self.arrived)


def cached_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: RelativeBias,
    tokens: Tensor,
    slots: Tensor,
    mem_len: int,
    workspace: Workspace,
    attended: Optional[Attended] = None,
    span: Optional[int] = None,
    nearest: int = 0,
) -> Tensor:
    """Let each sequence's new token attend to its slots, its tokens and itself, and write it into the cache.

    A token that sees no column reads zeros; this may occur with *nearest* 1.

    Args:
        qkv: ``[B, 3 H D]``, the token's query, key and value.
        keys, values: ``[B, H, C, D]``, contiguous; changed in place.
        bias: any of its fields, of the distances ``C-1 .. 0``.
        tokens, slots: ``[B]`` int64, how many of each a sequence has; the new token stands in column M + *tokens*.
        mem_len: M.
        workspace: for keys of this shape.
        attended: buffers ``[B, H, C, D]`` and ``[B, H, C]`` that the read-out and its normaliser are written into too.
        span: how many keys a token sees at most (None: all).
        nearest: the smallest distance of a key that a token sees, 0 or 1; 1 hides a token from itself.

    Returns:
        The read-out ``[B, H D]``.
    """
    batch, heads, columns, size = keys.shape
    content, position = (None if t is None else t.contiguous() for t in (bias.content, bias.position))
    table, score = bias.table, bias.score
    # Only under the interpreter does the table have the layout of plain attention on a CPU.
    if table is not None and table.stride(2) != 1:
        table = table.contiguous()
    if score is not None and score.stride(1) != 1:
        score = score.contiguous()
    out = qkv.new_empty(batch, heads * size)
    outputs, normalizers = (keys, keys) if attended is None else attended
    cached_attention_kernel[(batch * heads, workspace.splits)](
        qkv, keys, values, content, position, table, score, tokens, slots, out,
        outputs, normalizers, *workspace,
        heads, columns, mem_len, columns if span is None else span, qkv.stride(0),
        *((0, 0) if table is None else table.stride()[:2]), 0 if score is None else score.stride(0),
        scale=1 / math.sqrt(size), D=size, BLOCK_D=workspace.acc.size(1), S=workspace.splits,
        BLOCK_C=columns_at_a_time(workspace.acc.size(1), keys.element_size()), STAGES=STAGES,
        RECORD=attended is not None, CONTENT=content is not None,
        POSITION=position is not None and table is not None, TABLE=table is not None, SCORE=score is not None,
        NEAREST=nearest, **launch_options(batch, keys.device),
    )  # fmt: skip
    return out
