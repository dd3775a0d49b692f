"""Triton kernels: heads of length 1, times a factor for each head, and their gradients.

Shapes: B streams, H heads, R rows, D size of a head, P programs of a head.
"""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import heads_like
from .shared_kernels import TILE, block_of, programs


@triton.jit
def unit_kernel(
    p_x, p_factor, p_grad, p_out, p_partial, s_xb, s_xh, s_xr, s_gb, s_gh, s_gr, s_ob, s_oh, s_or, R, T, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, FACTOR: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Write ``factor x r`` with ``r = 1 / sqrt(|x|^2 + eps)`` for the T = B R rows of a head.

    With BACKWARD it is the gradient ``factor r (g - x r^2 (g . x))`` instead, and the program's sum of ``r (g . x)``.
    """
    program, h, d = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
    factor = tl.load(p_factor + h) if FACTOR else 1.0
    total = tl.zeros([ROWS], tl.float32)
    for start in range(program * ROWS, T, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        b, i = (row // R).to(tl.int64), row % R
        there = (row < T)[:, None] & (d < D)[None, :]
        # [ROWS, BLOCK]
        b_x = tl.load(p_x + (b * s_xb + h * s_xh + i * s_xr)[:, None] + d[None, :], there, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(b_x * b_x, 1) + eps)
        if BACKWARD:
            at = (b * s_gb + h * s_gh + i * s_gr)[:, None] + d[None, :]
            b_g = tl.load(p_grad + at, there, other=0.0).to(tl.float32)
            along = scale * tl.sum(b_g * b_x, 1)
            total += along
            b_out = (b_g - b_x * (scale * along)[:, None]) * (factor * scale)[:, None]
        else:
            b_out = b_x * (factor * scale)[:, None]
        at = (b * s_ob + h * s_oh + i * s_or)[:, None] + d[None, :]
        tl.store(p_out + at, b_out.to(p_out.dtype.element_ty), there)
    if BACKWARD and FACTOR:
        tl.store(p_partial + h * tl.num_programs(0) + program, tl.sum(total, 0))


def forward(heads: Tensor, factor: Optional[Tensor], eps: float) -> Tensor:
    """Return the scaled heads of ``heads [B, H, R, D]``, whose columns are contiguous."""
    (out,) = heads_like(heads)
    _launch(heads, factor, None, out, None, eps)
    return out


def backward(heads: Tensor, factor: Optional[Tensor], grad: Tensor, eps: float) -> Tuple[Tensor, Optional[Tensor]]:
    """Return the gradients of the heads ``[B, H, R, D]`` and of the factors ``[H]``, if there are some."""
    (dx,), partial = heads_like(heads), None
    if factor is not None:
        partial = heads.new_empty(heads.size(1), _programs(heads), dtype=torch.float32)
    _launch(heads, factor, grad, dx, partial, eps)
    return dx, None if factor is None or partial is None else partial.sum(1).to(factor.dtype)


def _launch(
    heads: Tensor, factor: Optional[Tensor], grad: Optional[Tensor], out: Tensor, partial: Optional[Tensor], eps: float
) -> None:
    batch, count, length, size = heads.shape
    strides = (*heads.stride()[:3], *(heads if grad is None else grad).stride()[:3], *out.stride()[:3])
    if heads.numel() == 0:
        return
    unit_kernel[(_programs(heads), count)](
        heads, factor, grad, out, partial, *strides, length, batch * length, eps,
        D=size, BLOCK=block_of(size), ROWS=_rows(size), FACTOR=factor is not None, BACKWARD=grad is not None,
        num_warps=4,
    )  # fmt: skip


def _programs(heads: Tensor) -> int:
    batch, count, length, size = heads.shape
    return programs(heads.device, triton.cdiv(batch * length, _rows(size)), count)


def _rows(size: int) -> int:
    return TILE // block_of(size)
