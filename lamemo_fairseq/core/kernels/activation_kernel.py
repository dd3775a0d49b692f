"""Triton kernels: bias, ReLU and dropout in one pass, and their gradients in another.

The output says which elements went through both: where it is zero, so is the gradient.

Shapes: T rows, W columns.
"""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shared_kernels import TILE, WORDS, dropout_mask, dropped, programs, sums

BLOCK = 256  # columns of a tile


@triton.jit
def relu_dropout_kernel(
    p_x, p_bias, p_seed, p_out, T, bias_width, groups,
    W: tl.constexpr, BIAS: tl.constexpr, DROPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (row < T)[:, None] & (column < W)[None, :]
    offset = row.to(tl.int64)[:, None] * W + column[None, :]
    b_x = tl.load(p_x + offset, there, other=0.0).to(tl.float32)
    if BIAS:
        b_x += tl.load(p_bias + column, column < bias_width, other=0.0).to(tl.float32)[None, :]
    b_x = tl.where(b_x <= 0, 0.0, b_x)  # NaN stays, unlike in a maximum
    if DROPPED > 0:
        mask = dropout_mask(p_seed, row, groups, tl.program_id(1) * (BLOCK // 4), DROPPED, ROWS, BLOCK)
        b_x = tl.where(mask, b_x * (WORDS / (WORDS - DROPPED)), 0.0)
    tl.store(p_out + offset, b_x.to(p_out.dtype.element_ty), there)


@triton.jit
def relu_dropout_gradient_kernel(
    p_grad, p_out, p_dx, p_partial, T,
    W: tl.constexpr, BIAS: tl.constexpr, DROPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, count = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(program * ROWS, T, count * ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < T)[:, None] & (column < W)[None, :]
        offset = row.to(tl.int64)[:, None] * W + column[None, :]
        b_out = tl.load(p_out + offset, there, other=0.0)
        b_dx = tl.load(p_grad + offset, there, other=0.0).to(tl.float32)
        b_dx = tl.where(b_out == 0, 0.0, b_dx * (WORDS / (WORDS - DROPPED)))
        tl.store(p_dx + offset, b_dx.to(p_dx.dtype.element_ty), there)
        if BIAS:
            b_dbias += b_dx
    if BIAS:
        tl.store(p_partial + program * W + column, tl.sum(b_dbias, 0), column < W)


def forward(x: Tensor, bias: Optional[Tensor], seed: Optional[Tensor], dropout: float) -> Tensor:
    """Return ``dropout(relu(x + bias))`` of a contiguous ``x [.., W]``; the bias may be shorter than W."""
    out, width = torch.empty_like(x), x.size(-1)
    tokens, columns, tile_rows = x.numel() // width, triton.cdiv(width, BLOCK), TILE // BLOCK
    if tokens:
        relu_dropout_kernel[(triton.cdiv(tokens, tile_rows), columns)](
            x, bias, seed, out, tokens, 0 if bias is None else len(bias), columns * (BLOCK // 4),
            W=width, BIAS=bias is not None, DROPPED=dropped(dropout), ROWS=tile_rows, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def backward(grad: Tensor, out: Tensor, dropout: float, bias_width: Optional[int]) -> Tuple[Tensor, Optional[Tensor]]:
    """Return the gradients of x ``[.., W]`` and of the bias, if there is one; *grad* and *out* are contiguous."""
    dx, width = torch.empty_like(out), out.size(-1)
    tokens, columns, tile_rows = out.numel() // width, triton.cdiv(width, BLOCK), TILE // BLOCK
    count = programs(out.device, triton.cdiv(tokens, tile_rows), columns)
    partial = None if bias_width is None else out.new_empty(1, count, width, dtype=torch.float32)
    relu_dropout_gradient_kernel[(count, columns)](
        grad, out, dx, partial, tokens,
        W=width, BIAS=partial is not None, DROPPED=dropped(dropout), ROWS=tile_rows, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    if partial is None or bias_width is None:
        return dx, None
    return dx, sums(partial, bias_width, out.dtype)[0]
