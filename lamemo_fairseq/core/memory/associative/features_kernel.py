"""Triton kernels: the features of keys, and the gradient of the keys.

Shapes: R rows, e width of a key, F = 6 e its features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels.shared_kernels import block_of

TILE = 512  # elements that a program of four warps holds at a time


@triton.jit
def relu(b_x):
    """Return 0 in place of what is below 0; NaN stays, as in PyTorch's relu."""
    return tl.where(b_x < 0, 0.0, b_x)


@triton.jit
def neighbours(p_row, k, there, j: tl.constexpr, E: tl.constexpr):
    """Return u_(k + j), -E < j < E, with the sign of its place in x: the halves of x follow each other in a ring.

    Two loads, of which one is masked: an index that wraps would hide from the compiler that columns lie side by side.
    """
    inside = (k + j >= 0) & (k + j < E)
    b_u = tl.load(p_row + k + j, there & inside, other=0.0).to(tl.float32)
    wrap: tl.constexpr = E if j < 0 else -E
    return b_u - tl.load(p_row + k + (j + wrap), there & (inside == 0), other=0.0).to(tl.float32)


@triton.jit
def features_kernel(p_keys, p_out, R, E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``x_i x_(i - j)`` for j = 1, 2, 3 and all i, whose indices are taken modulo 2 E: both halves for each u."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    k = tl.arange(0, BLOCK)[None, :]
    there = (row < R) & (k < E)
    b_u = tl.load(p_keys + row * E + k, there, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    for j in tl.static_range(1, 4):
        b_before = neighbours(p_keys + row * E, k, there, -j, E)
        p_first = p_out + row * (6 * E) + (j - 1) * (2 * E) + k
        tl.store(p_first, relu(b_u) * relu(b_before), there)
        tl.store(p_first + E, relu(-b_u) * relu(-b_before), there)


@triton.jit
def features_gradient_kernel(p_keys, p_grad, p_out, R, E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the gradient of u. Of x_k and x_(k + E), only the one that is above 0 has an effect on it."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    k = tl.arange(0, BLOCK)[None, :]
    there = (row < R) & (k < E)
    b_u = tl.load(p_keys + row * E + k, there, other=0.0).to(tl.float32)
    b_first = tl.zeros([ROWS, BLOCK], tl.float32)  # [ROWS, BLOCK], the gradient of x_k
    b_second = tl.zeros([ROWS, BLOCK], tl.float32)  # and of x_(k + E)
    for j in tl.static_range(1, 4):
        b_before = neighbours(p_keys + row * E, k, there, -j, E)
        b_after = neighbours(p_keys + row * E, k, there, j, E)
        p_k = p_grad + row * (6 * E) + (j - 1) * (2 * E) + k
        wraps = k + j >= E
        b_first += tl.load(p_k, there, other=0.0) * relu(b_before)
        b_first += tl.load(p_k + j, there, other=0.0) * relu(b_after)
        b_second += tl.load(p_k + E, there, other=0.0) * relu(-b_before)
        b_next = tl.load(p_k + (E + j), there & (wraps == 0), other=0.0)
        b_next += tl.load(p_k + (j - E), there & wraps, other=0.0)
        b_second += b_next * relu(-b_after)
    b_grad = tl.where(b_u == 0, 0.0, tl.where(b_u < 0, -b_second, b_first))
    tl.store(p_out + row * E + k, b_grad.to(p_out.dtype.element_ty), there)


def forward(keys: Tensor) -> Tensor:
    """Return the features ``[.., 6 e]`` of ``keys [.., e]``, in float32."""
    keys, size = keys.contiguous(), keys.size(-1)
    out = keys.new_empty(*keys.shape[:-1], 6 * size, dtype=torch.float32)
    grid, tile = _tiles(keys)
    features_kernel[grid](keys, out, keys.numel() // size, E=size, **tile)
    return out


def backward(keys: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of ``keys [.., e]`` for that of their features ``[.., 6 e]``, in float32."""
    keys, grad, size = keys.contiguous(), grad.contiguous(), keys.size(-1)
    out = torch.empty_like(keys)
    grid, tile = _tiles(keys)
    features_gradient_kernel[grid](keys, grad, out, keys.numel() // size, E=size, **tile)
    return out


def _tiles(keys: Tensor) -> tuple[tuple[int], dict[str, int]]:
    block = block_of(keys.size(-1))
    rows = max(TILE // block, 1)
    return (triton.cdiv(keys.numel() // keys.size(-1), rows),), {"ROWS": rows, "BLOCK": block, "num_warps": 4}
