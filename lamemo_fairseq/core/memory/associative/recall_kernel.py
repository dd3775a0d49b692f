"""Triton kernels: rows and what they recall, divided by its overlap, are added; and the gradients.

Shapes: B streams, R rows, T = B R of them, d model width, d' its stored width.
Names: p_ pointer, s_ stride (in elements), b_ tile, m_ mask.
"""

from typing import Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels.padded import empty_rows, readable, stored_width
from ...kernels.residual_kernel import tiles
from ...kernels.rows import strided
from ...kernels.shared_kernels import TILE


@triton.jit
def mix_kernel(
    p_rows, p_recalled, p_overlap, p_out, s_b, s_r, T, R,
    D: tl.constexpr, WIDTH_R: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ``h + recalled / overlap`` of T rows h, zeros behind D."""
    row, d = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, BLOCK)
    m_row, m_d = row < T, (d < D)[None, :]
    at = (row // R * s_b + row % R * s_r)[:, None] + d[None, :]
    b_rows = tl.load(p_rows + at, m_row[:, None] & (d < WIDTH_R)[None, :], other=0.0).to(tl.float32)
    b_recalled = tl.load(p_recalled + row[:, None] * D + d[None, :], m_row[:, None] & m_d, other=0.0)
    b_out = b_rows + b_recalled / tl.load(p_overlap + row, m_row, other=1.0)[:, None]
    at = p_out + row[:, None] * WIDTH + d[None, :]
    tl.store(at, tl.where(m_d, b_out, 0.0).to(p_out.dtype.element_ty), m_row[:, None] & (d < WIDTH)[None, :])


@triton.jit
def mix_gradient_kernel(
    p_grad, p_recalled, p_overlap, p_drecalled, p_doverlap, p_drows, s_b, s_r, T, R,
    D: tl.constexpr, WIDTH_G: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of what T rows recall, of their overlap, and of the rows, zeros behind D."""
    row, d = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, BLOCK)
    m_row, m_d = row < T, (d < D)[None, :]
    at = (row // R * s_b + row % R * s_r)[:, None] + d[None, :]
    b_grad = tl.load(p_grad + at, m_row[:, None] & (d < WIDTH_G)[None, :], other=0.0)
    b_grad = tl.where(m_d, b_grad, 0.0)
    tl.store(p_drows + row[:, None] * WIDTH + d[None, :], b_grad, m_row[:, None] & (d < WIDTH)[None, :])
    overlap = tl.load(p_overlap + row, m_row, other=1.0)
    at, there = row[:, None] * D + d[None, :], m_row[:, None] & m_d
    b_dread = b_grad.to(tl.float32) / overlap[:, None]
    tl.store(p_drecalled + at, b_dread, there)
    along = tl.sum(b_dread * tl.load(p_recalled + at, there, other=0.0), 1)
    tl.store(p_doverlap + row, -along / overlap, m_row)


def mixed(rows: Tensor, recalled: Tensor, overlap: Tensor) -> Tensor:
    """Return ``rows + recalled / overlap`` of ``rows [B, R, d]``: ``[B, R, d']``."""
    rows, d, out = strided(rows), rows.size(-1), empty_rows(rows, rows.size(-1))
    tile_rows, block, warps = tiles(d, TILE)
    mix_kernel[(triton.cdiv(overlap.numel(), tile_rows),)](
        rows, recalled, overlap, out, *rows.stride()[:2], overlap.numel(), rows.size(1),
        D=d, WIDTH_R=readable(rows), WIDTH=out.size(-1), ROWS=tile_rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


def mixed_gradient(grad: Tensor, recalled: Tensor, overlap: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of *recalled*, *overlap*, and the rows ``[B, R, d']``."""
    grad, d, d_rows = strided(grad), grad.size(-1), empty_rows(grad, grad.size(-1))
    d_recalled, d_overlap = torch.empty_like(recalled), torch.empty_like(overlap)
    tile_rows, block, warps = tiles(d, TILE)
    mix_gradient_kernel[(triton.cdiv(overlap.numel(), tile_rows),)](
        grad, recalled, overlap, d_recalled, d_overlap, d_rows, *grad.stride()[:2], overlap.numel(), grad.size(1),
        D=d, WIDTH_G=readable(grad), WIDTH=stored_width(grad, d), ROWS=tile_rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return d_recalled, d_overlap, d_rows
