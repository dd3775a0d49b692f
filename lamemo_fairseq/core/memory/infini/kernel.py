"""Triton kernels: what reading and writing associations compute beside their products, and the gradients.

Shapes: B streams, H heads, N rows of each, D size of a head, D' its stored size, F >= D columns of features,
W > D columns of values: those of the head, a one, and zeros. A product of features and values is the matrix of a head
with its normaliser behind it.
Names: p_ pointer, s_ stride (in elements), b_ tile, m_ mask. The last dimension of every tensor is contiguous, and
tensors of features and of values are.
"""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels.rows import heads_like
from ...kernels.shared_kernels import TILE, block_of


@triton.jit
def head_and_rows(H, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's stream and head, the offset of its rows among all, these rows, which are there, columns."""
    n, i = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    return (n // H).to(tl.int64), (n % H).to(tl.int64), n.to(tl.int64) * N + i, i, i < N, tl.arange(0, BLOCK)[None, :]


@triton.jit
def columns_of(p, there, d, D: tl.constexpr, WIDTH: tl.constexpr):
    """Return the first D of WIDTH columns of a tile, in float32, and zeros. Wide loads are of aligned addresses."""
    return tl.where(d < D, tl.load(p + d, there & (d < WIDTH), other=0.0).to(tl.float32), 0.0)


@triton.jit
def features_kernel(
    p_x, p_v, p_features, p_values, s_xb, s_xh, s_xi, s_vb, s_vh, s_vi, H, N,
    D: tl.constexpr, WIDTH: tl.constexpr, F: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """Write ``sigma(x) = ELU(x) + 1``, zeros behind D; with VALUES also v, a one, and zeros behind them."""
    b, h, row, i, m_i, d = head_and_rows(H, N, ROWS, BLOCK)
    b_x = columns_of(p_x + b * s_xb + h * s_xh + i * s_xi, m_i, d, D, WIDTH)
    b_features = tl.where(d < D, tl.where(b_x > 0, b_x + 1, tl.exp(b_x)), 0.0)
    tl.store(p_features + row * F + d, b_features, m_i & (d < F))
    if VALUES:
        b_v = columns_of(p_v + b * s_vb + h * s_vh + i * s_vi, m_i, d, D, WIDTH)
        tl.store(p_values + row * W + d, tl.where(d == D, 1.0, b_v), m_i & (d < W))


@triton.jit
def features_gradient_kernel(
    p_x, p_dfeatures, p_dvalues, p_dx, p_dv, s_xb, s_xh, s_xi, s_ob, s_oh, s_oi, H, N,
    D: tl.constexpr, WIDTH: tl.constexpr, F: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x, and with VALUES that of v, which have the same strides; zeros behind D."""
    b, h, row, i, m_i, d = head_and_rows(H, N, ROWS, BLOCK)
    b_x = columns_of(p_x + b * s_xb + h * s_xh + i * s_xi, m_i, d, D, WIDTH)
    b_grad = columns_of(p_dfeatures + row * F, m_i, d, D, F)
    b_grad = tl.where(b_x > 0, b_grad, b_grad * tl.exp(b_x))
    at, written = b * s_ob + h * s_oh + i * s_oi + d, m_i & (d < WIDTH)
    tl.store(p_dx + at, b_grad.to(p_dx.dtype.element_ty), written)
    if VALUES:
        tl.store(p_dv + at, columns_of(p_dvalues + row * W, m_i, d, D, W).to(p_dv.dtype.element_ty), written)


@triton.jit
def mix_kernel(
    p_local, p_read, p_gate, p_out, s_lb, s_lh, s_li, s_ob, s_oh, s_oi, H, N, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ``local + gate (read / (overlap + eps) - local)``, of the overlap in column D of *p_read*."""
    b, h, row, i, m_i, d = head_and_rows(H, N, ROWS, BLOCK)
    b_local = columns_of(p_local + b * s_lb + h * s_lh + i * s_li, m_i, d, D, WIDTH)
    overlap = tl.load(p_read + row * W + D, m_i, other=0.0) + eps
    b_read = columns_of(p_read + row * W, m_i, d, D, W) / overlap
    b_out = b_local + tl.load(p_gate + tl.program_id(1)) * (b_read - b_local)
    at = b * s_ob + h * s_oh + i * s_oi + d
    tl.store(p_out + at, b_out.to(p_out.dtype.element_ty), m_i & (d < WIDTH))


@triton.jit
def mix_gradient_kernel(
    p_local, p_read, p_gate, p_grad, p_dlocal, p_dread, p_dgate,
    s_lb, s_lh, s_li, s_gb, s_gh, s_gi, s_ob, s_oh, s_oi, H, N, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of *p_local*, *p_read* (that of the overlap in column D) and the program's part of gates'."""
    b, h, row, i, m_i, d = head_and_rows(H, N, ROWS, BLOCK)
    b_local = columns_of(p_local + b * s_lb + h * s_lh + i * s_li, m_i, d, D, WIDTH)
    b_grad = columns_of(p_grad + b * s_gb + h * s_gh + i * s_gi, m_i, d, D, WIDTH)
    overlap = tl.load(p_read + row * W + D, m_i, other=0.0) + eps
    b_read = columns_of(p_read + row * W, m_i, d, D, W) / overlap
    gate = tl.load(p_gate + tl.program_id(1))
    at = b * s_ob + h * s_oh + i * s_oi + d
    tl.store(p_dlocal + at, (b_grad * (1 - gate)).to(p_dlocal.dtype.element_ty), m_i & (d < WIDTH))
    b_dread = b_grad * gate / overlap
    d_overlap = -tl.sum(b_dread * b_read, 1, keep_dims=True)
    tl.store(p_dread + row * W + d, tl.where(d == D, d_overlap, b_dread), m_i & (d < W))
    d_gate = tl.sum(tl.sum(b_grad * (b_read - b_local), 1), 0)  # rows that are not there have no gradient
    tl.store(p_dgate + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), d_gate)


def stored(size: int) -> Tuple[int, int]:
    """Return the columns F of features and W of values, multiples of 8."""
    return size + -size % 8, size + 8 - size % 8


def features(x: Tensor, size: int, v: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
    """Return the features ``[B, H, N, F]`` of ``x [B, H, N, D or D']``, and the values ``[B, H, N, W]`` of *v*."""
    (batch, heads, rows, _), (f, w) = x.shape, stored(size)
    made = x.new_empty(batch, heads, rows, f, dtype=torch.float32)
    values = made if v is None else made.new_empty(batch, heads, rows, w)
    grid, tile = _tiles(x, w)
    strides = (*x.stride()[:3], *(x if v is None else v).stride()[:3])
    features_kernel[grid](
        x, v, made, values, *strides, heads, rows, D=size, WIDTH=x.size(3), F=f, W=w, VALUES=v is not None, **tile
    )
    return made, values


def features_gradient(x: Tensor, size: int, grad: Tensor, d_values: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
    """Return the gradient of *x* for that of its features, and of v for that of the values, if they are given."""
    (f, w), (heads, rows) = stored(size), x.shape[1:3]
    dx, dv = heads_like(x, 2) if d_values is not None else (*heads_like(x),) * 2
    grid, tile = _tiles(x, w)
    features_gradient_kernel[grid](
        x, grad, d_values, dx, dv, *x.stride()[:3], *dx.stride()[:3], heads, rows,
        D=size, WIDTH=x.size(3), F=f, W=w, VALUES=d_values is not None, **tile,
    )  # fmt: skip
    return dx, dv


def mixed(local: Tensor, read: Tensor, gate: Tensor, size: int, eps: float) -> Tensor:
    """Return ``local + gate (read / (overlap + eps) - local)``, as *local* ``[B, H, N, D or D']``.

    Args:
        read: ``[B, H, N, W]``, what features read of values and, in column D, their overlap.
        gate: ``[B, H]``, float32.
    """
    (out,), (heads, rows), (grid, tile) = heads_like(local), local.shape[1:3], _tiles(local, read.size(3))
    mix_kernel[grid](
        local, read, gate, out, *local.stride()[:3], *out.stride()[:3], heads, rows, eps,
        D=size, WIDTH=local.size(3), W=read.size(3), **tile,
    )  # fmt: skip
    return out


def mixed_gradient(
    local: Tensor, read: Tensor, gate: Tensor, grad: Tensor, size: int, eps: float
) -> Tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of *local*, *read* and *gate*, as `mixed` takes them."""
    (d_local,), (heads, rows), (grid, tile) = heads_like(local), local.shape[1:3], _tiles(local, read.size(3))
    d_read, d_gate = torch.empty_like(read), gate.new_empty(*gate.shape, grid[0])
    mix_gradient_kernel[grid](
        local, read, gate, grad, d_local, d_read, d_gate,
        *local.stride()[:3], *grad.stride()[:3], *d_local.stride()[:3], heads, rows, eps,
        D=size, WIDTH=local.size(3), W=read.size(3), **tile,
    )  # fmt: skip
    return d_local, d_read, d_gate.sum(-1)


def _tiles(heads: Tensor, columns: int) -> Tuple[Tuple[int, int], dict[str, int]]:
    block = block_of(columns)
    rows = max(TILE // block, 1)
    return (triton.cdiv(heads.size(2), rows), heads.size(0) * heads.size(1)), {"ROWS": rows, "BLOCK": block}
