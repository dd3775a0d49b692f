"""Triton kernels: the features of keys, and the gradient of the keys.

Shapes: R rows, e width of a key, F = 6 e its features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels.shared_kernels import block_of

TILE, GRADIENT_TILE = 1024, 512  # elements that a program of four warps holds at a time


@triton.jit
def half_of(p_keys, row, i, there, E: tl.constexpr):
    """Return x_i of ``x = [relu(u) ; relu(-u)]`` for i in ``0 .. 2 E - 1``, 0 where *there* is not."""
    second = i >= E
    u = tl.load(p_keys + row * E + tl.where(second, i - E, i), there, other=0.0).to(tl.float32)
    return tl.maximum(tl.where(second, -u, u), 0.0)


@triton.jit
def features_kernel(p_keys, p_out, R, E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``x_i x_(i - j)`` for j = 1, 2, 3 and all i, whose indices are taken modulo 2 E."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    there = (row < R) & (i < 2 * E)
    b_x = half_of(p_keys, row, i, there, E)  # [ROWS, BLOCK]
    for j in tl.static_range(1, 4):
        b_rolled = half_of(p_keys, row, (i + (8 * E - j)) % (2 * E), there, E)
        tl.store(p_out + row * (6 * E) + (j - 1) * (2 * E) + i, b_x * b_rolled, there)


@triton.jit
def features_gradient_kernel(p_keys, p_grad, p_out, R, E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the gradient of u. Of x_i and x_(i + E), only the one that is above 0 has an effect on it."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    k = tl.arange(0, BLOCK)[None, :]
    there = (row < R) & (k < E)
    b_u = tl.load(p_keys + row * E + k, there, other=0.0).to(tl.float32)
    i = tl.where(b_u < 0, k + E, k)  # [ROWS, BLOCK]
    b_grad = tl.zeros([ROWS, BLOCK], tl.float32)
    for j in tl.static_range(1, 4):
        before, after = (i + (8 * E - j)) % (2 * E), (i + j) % (2 * E)
        at = p_grad + row * (6 * E) + (j - 1) * (2 * E)
        b_grad += tl.load(at + i, there, other=0.0) * half_of(p_keys, row, before, there, E)
        b_grad += tl.load(at + after, there, other=0.0) * half_of(p_keys, row, after, there, E)
    b_grad = tl.where(b_u == 0, 0.0, tl.where(b_u < 0, -b_grad, b_grad))
    tl.store(p_out + row * E + k, b_grad.to(p_out.dtype.element_ty), there)


def forward(keys: Tensor) -> Tensor:
    """Return the features ``[.., 6 e]`` of ``keys [.., e]``, in float32."""
    keys, size = keys.contiguous(), keys.size(-1)
    out = keys.new_empty(*keys.shape[:-1], 6 * size, dtype=torch.float32)
    grid, tile = _tiles(keys, 2 * size, TILE)
    features_kernel[grid](keys, out, keys.numel() // size, E=size, **tile)
    return out


def backward(keys: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of ``keys [.., e]`` for that of their features ``[.., 6 e]``, in float32."""
    keys, grad, size = keys.contiguous(), grad.contiguous(), keys.size(-1)
    out = torch.empty_like(keys)
    grid, tile = _tiles(keys, size, GRADIENT_TILE)
    features_gradient_kernel[grid](keys, grad, out, keys.numel() // size, E=size, **tile)
    return out


def _tiles(keys: Tensor, columns: int, tile: int) -> tuple[tuple[int], dict[str, int]]:
    block = block_of(columns)
    rows = max(tile // block, 1)
    return (triton.cdiv(keys.numel() // keys.size(-1), rows),), {"ROWS": rows, "BLOCK": block, "num_warps": 4}
