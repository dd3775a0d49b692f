"""Triton kernels: a sum of residual and dropped-out rows, and its layer norm; forward and gradients.

Of the sum s, with ``x = (s - mean) * rstd``, the gradient is ``rstd * (g - mean(g) - x * mean(g * x))`` where
``g = gamma * dy``, plus that of s itself if s goes on.

Shapes: B streams, R rows of each, T = B R, d width, P programs.
"""

from typing import NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .padded import empty_rows, readable, stored_width
from .rows import strided
from .shared_kernels import TILE, WORDS, block_of, dropout_mask, dropped, programs, sums

BACKWARD_TILE = 1024  # fewer, as sums over rows stay in registers


@triton.jit
def residual_norm_kernel(
    p_x, p_bias, p_residual, p_gamma, p_beta, p_seed, p_out, p_sum, p_mean, p_rstd,
    s_xb, s_xr, s_rb, s_rr, T, R, eps,
    D: tl.constexpr, WIDTH_X: tl.constexpr, WIDTH_R: tl.constexpr, WIDTH: tl.constexpr,
    BIAS: tl.constexpr, DROPPED: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside, there = (column < D)[None, :], (row < T)[:, None]
    stream, of_stream = (row // R).to(tl.int64)[:, None], (row % R).to(tl.int64)[:, None]
    x_offset = stream * s_xb + of_stream * s_xr + column[None, :]
    residual_offset = stream * s_rb + of_stream * s_rr + column[None, :]
    b_x = tl.load(p_x + x_offset, there & (column < WIDTH_X)[None, :], other=0.0).to(tl.float32)
    b_residual = tl.load(p_residual + residual_offset, there & (column < WIDTH_R)[None, :], other=0.0).to(tl.float32)
    if BIAS:
        b_x += tl.load(p_bias + column, column < D, other=0.0).to(tl.float32)[None, :]
    if DROPPED > 0:
        mask = dropout_mask(p_seed, row, BLOCK // 4, 0, DROPPED, ROWS, BLOCK)
        b_x = tl.where(mask, b_x * (WORDS / (WORDS - DROPPED)), 0.0)
    # Rounded as it is stored, so that both passes see one sum.
    b_s = tl.where(inside, b_residual + b_x, 0.0).to(p_out.dtype.element_ty)
    offset = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    written = there & (column < WIDTH)[None, :]
    if KEEP:
        tl.store(p_sum + offset, b_s, written)
    b_s = b_s.to(tl.float32)
    b_mean = tl.sum(b_s, 1) / D
    b_centred = tl.where(inside, b_s - b_mean[:, None], 0.0)
    b_rstd = 1 / tl.sqrt(tl.sum(b_centred * b_centred, 1) / D + eps)
    if KEEP:
        tl.store(p_mean + row, b_mean, row < T)
        tl.store(p_rstd + row, b_rstd, row < T)
    b_gamma = tl.load(p_gamma + column, column < D, other=0.0).to(tl.float32)[None, :]
    b_beta = tl.load(p_beta + column, column < D, other=0.0).to(tl.float32)[None, :]
    b_out = b_centred * b_rstd[:, None] * b_gamma + b_beta
    tl.store(p_out + offset, b_out.to(p_out.dtype.element_ty), written)


@triton.jit
def residual_norm_gradient_kernel(
    p_grad, p_grad_sum, p_sum, p_mean, p_rstd, p_gamma, p_seed, p_dx, p_ds, p_partial,
    s_gb, s_gr, s_hb, s_hr, T, R,
    D: tl.constexpr, WIDTH_G: tl.constexpr, WIDTH_H: tl.constexpr, WIDTH: tl.constexpr,
    SUMMED: tl.constexpr, BIAS: tl.constexpr, DROPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, count = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = (column < D)[None, :]
    b_gamma = tl.load(p_gamma + column, column < D, other=0.0).to(tl.float32)[None, :]
    b_dgamma = tl.zeros([ROWS, BLOCK], tl.float32)
    b_dbeta = tl.zeros([ROWS, BLOCK], tl.float32)
    b_dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(program * ROWS, T, count * ROWS):
        row = start + tl.arange(0, ROWS)
        there, written = (row < T)[:, None], (row < T)[:, None] & (column < WIDTH)[None, :]
        stream, of_stream = (row // R).to(tl.int64)[:, None], (row % R).to(tl.int64)[:, None]
        offset = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        grad_offset = stream * s_gb + of_stream * s_gr + column[None, :]
        b_dy = tl.load(p_grad + grad_offset, there & (column < WIDTH_G)[None, :], other=0.0).to(tl.float32)
        b_dy = tl.where(inside, b_dy, 0.0)
        b_s = tl.load(p_sum + offset, written, other=0.0).to(tl.float32)
        b_mean = tl.load(p_mean + row, row < T, other=0.0)[:, None]
        b_rstd = tl.load(p_rstd + row, row < T, other=0.0)[:, None]
        b_normed = tl.where(inside, (b_s - b_mean) * b_rstd, 0.0)
        b_dgamma += b_dy * b_normed
        b_dbeta += b_dy
        b_g = b_dy * b_gamma
        b_both = tl.sum(b_g * b_normed, 1)[:, None] / D
        b_ds = (b_g - tl.sum(b_g, 1)[:, None] / D - b_normed * b_both) * b_rstd
        if SUMMED:
            sum_offset = stream * s_hb + of_stream * s_hr + column[None, :]
            b_ds += tl.load(p_grad_sum + sum_offset, there & (column < WIDTH_H)[None, :], other=0.0).to(tl.float32)
        b_ds = tl.where(inside & there, b_ds, 0.0)
        tl.store(p_ds + offset, b_ds.to(p_ds.dtype.element_ty), written)
        if DROPPED > 0:
            mask = dropout_mask(p_seed, row, BLOCK // 4, 0, DROPPED, ROWS, BLOCK)
            b_ds = tl.where(mask, b_ds * (WORDS / (WORDS - DROPPED)), 0.0)
            tl.store(p_dx + offset, b_ds.to(p_dx.dtype.element_ty), written)
        if BIAS:
            b_dbias += b_ds
    p_partial += program * D + column
    tl.store(p_partial, tl.sum(b_dgamma, 0), column < D)
    tl.store(p_partial + count * D, tl.sum(b_dbeta, 0), column < D)
    if BIAS:
        tl.store(p_partial + 2 * count * D, tl.sum(b_dbias, 0), column < D)


class Saved(NamedTuple):
    """The tensors that the backward pass needs besides gamma and the seed."""

    total: Tensor  # [B, R, stored], zeros behind d
    mean: Tensor  # [T], float32
    rstd: Tensor


def forward(
    x: Tensor, bias: Optional[Tensor], residual: Tensor, gamma: Tensor, beta: Tensor, eps: float,
    seed: Optional[Tensor], dropout: float, keep: bool,
) -> Tuple[Tensor, Optional[Saved]]:  # fmt: skip
    """Return the norm ``[.., stored]`` with zeros behind d, and with *keep* the tensors that `backward` needs."""
    d, out = residual.size(-1), empty_rows(residual, residual.size(-1))
    x, residual = strided(x[..., :d]), strided(residual)
    tokens = residual.size(0) * residual.size(1)
    saved = None
    if keep:
        mean, rstd = (residual.new_empty(tokens, dtype=torch.float32) for _ in range(2))
        saved = Saved(torch.empty_like(out), mean, rstd)
    if tokens:
        tile_rows, block, warps = tiles(d, TILE)
        residual_norm_kernel[(triton.cdiv(tokens, tile_rows),)](
            x, bias, residual, gamma, beta, seed, out, *(saved or (None, None, None)),
            *x.stride()[:2], *residual.stride()[:2], tokens, residual.size(1), eps,
            D=d, WIDTH_X=readable(x), WIDTH_R=readable(residual), WIDTH=out.size(-1),
            BIAS=bias is not None, DROPPED=dropped(dropout), KEEP=keep, ROWS=tile_rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out, saved


def backward(
    grad: Tensor, grad_sum: Optional[Tensor], saved: Saved, gamma: Tensor, seed: Optional[Tensor], dropout: float,
    with_bias: bool,
) -> Tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return gradients of x and residual, ``[.., stored]`` with zeros behind d; of gamma, beta, bias ``[2 or 3, d]``.

    Without dropout the first two are one tensor.
    """
    d = grad.size(-1)
    ds = torch.empty_like(saved.total)
    dx = torch.empty_like(ds) if dropout > 0 else ds
    grad = strided(grad)
    grad_sum = None if grad_sum is None else strided(grad_sum)
    tile_rows, block, warps = tiles(d, BACKWARD_TILE)
    tokens = grad.size(0) * grad.size(1)
    count = programs(grad.device, triton.cdiv(tokens, tile_rows))
    partial = grad.new_empty(3 if with_bias else 2, count, d, dtype=torch.float32)
    residual_norm_gradient_kernel[(count,)](
        grad, grad_sum, *saved, gamma, seed, dx, ds, partial,
        *grad.stride()[:2], *((0, 0) if grad_sum is None else grad_sum.stride()[:2]), tokens, grad.size(1),
        D=d, WIDTH_G=readable(grad), WIDTH_H=0 if grad_sum is None else readable(grad_sum), WIDTH=stored_width(grad, d),
        SUMMED=grad_sum is not None, BIAS=with_bias, DROPPED=dropped(dropout), ROWS=tile_rows, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return dx, ds, sums(partial, d, gamma.dtype)


def tiles(d: int, elements: int) -> Tuple[int, int, int]:
    """Return the rows, the columns and the warps of a tile of about *elements* elements."""
    block = block_of(d)
    return max(1, min(16, elements // block)), block, max(4, 4 * block // elements)
