"""Triton kernels: the features of keys, their overlap with a normaliser, and the gradient of the keys.

Shapes: B streams, R rows of all streams, e width of a key, F = 6 e its features, W >= e columns of rows with keys.
"""

from typing import NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels.shared_kernels import block_of

TILE = 512  # elements that a program of four warps holds at a time


class Overlap(NamedTuple):
    """The gradient of overlaps, and the normalisers that they are with."""

    normalizer: Tensor  # [B, F]
    grad: Tensor  # R numbers


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
def features_kernel(
    p_keys, p_out, p_z, p_overlap, R, W, of_stream, decay, eps,
    E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write ``x_i x_(i - j)`` for j = 1, 2, 3 and all i, whose indices are taken modulo 2 E: both halves for each u.

    With OVERLAP also write ``decay z . phi + eps``, of the z of a row's stream, which has *of_stream* rows.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    k = tl.arange(0, BLOCK)[None, :]
    there = (row < R) & (k < E)
    b_u = tl.load(p_keys + row * W + k, there, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    b_overlap = tl.zeros([ROWS, BLOCK], tl.float32)
    for j in tl.static_range(1, 4):
        b_before = neighbours(p_keys + row * W, k, there, -j, E)
        b_first, b_second = relu(b_u) * relu(b_before), relu(-b_u) * relu(-b_before)
        p_first = p_out + row * (6 * E) + (j - 1) * (2 * E) + k
        tl.store(p_first, b_first, there)
        tl.store(p_first + E, b_second, there)
        if OVERLAP:
            p_k = p_z + row // of_stream * (6 * E) + (j - 1) * (2 * E) + k
            b_overlap += b_first * tl.load(p_k, there, other=0.0)
            b_overlap += b_second * tl.load(p_k + E, there, other=0.0)
    if OVERLAP:
        tl.store(p_overlap + row, tl.sum(b_overlap, 1, keep_dims=True) * decay + eps, row < R)


@triton.jit
def feature_gradient(p_grad, p_z, d_overlap, there, OVERLAP: tl.constexpr):
    """Return the gradient of features, with OVERLAP that by their overlap added to it."""
    b_grad = tl.load(p_grad, there, other=0.0)
    if OVERLAP:
        b_grad += d_overlap * tl.load(p_z, there, other=0.0)
    return b_grad


@triton.jit
def features_gradient_kernel(
    p_keys, p_grad, p_z, p_doverlap, p_out, R, W, of_stream,
    E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write the gradient of u. Of x_k and x_(k + E), only the one that is above 0 has an effect on it."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    k = tl.arange(0, BLOCK)[None, :]
    there = (row < R) & (k < E)
    b_u = tl.load(p_keys + row * W + k, there, other=0.0).to(tl.float32)
    d_overlap = 0.0
    if OVERLAP:
        d_overlap = tl.load(p_doverlap + row, row < R, other=0.0)
        p_z += row // of_stream * (6 * E)
    b_first = tl.zeros([ROWS, BLOCK], tl.float32)  # [ROWS, BLOCK], the gradient of x_k
    b_second = tl.zeros([ROWS, BLOCK], tl.float32)  # and of x_(k + E)
    for j in tl.static_range(1, 4):
        b_before = neighbours(p_keys + row * W, k, there, -j, E)
        b_after = neighbours(p_keys + row * W, k, there, j, E)
        p_k = p_grad + row * (6 * E) + (j - 1) * (2 * E) + k
        z_k = p_z + (j - 1) * (2 * E) + k
        wraps = k + j >= E
        b_first += feature_gradient(p_k, z_k, d_overlap, there, OVERLAP) * relu(b_before)
        b_first += feature_gradient(p_k + j, z_k + j, d_overlap, there, OVERLAP) * relu(b_after)
        b_second += feature_gradient(p_k + E, z_k + E, d_overlap, there, OVERLAP) * relu(-b_before)
        b_next = feature_gradient(p_k + (E + j), z_k + (E + j), d_overlap, there & (wraps == 0), OVERLAP)
        b_next += feature_gradient(p_k + (j - E), z_k + (j - E), d_overlap, there & wraps, OVERLAP)
        b_second += b_next * relu(-b_after)
    b_grad = tl.where(b_u == 0, 0.0, tl.where(b_u < 0, -b_second, b_first))
    tl.store(p_out + row * W + k, b_grad.to(p_out.dtype.element_ty), there)


def forward(keys: Tensor) -> Tensor:
    """Return the features ``[.., 6 e]`` of ``keys [.., e]``, in float32."""
    return _forward(keys.contiguous(), keys.size(-1), None, 1.0, 0.0)[0]


def with_overlap(keys: Tensor, size: int, normalizer: Tensor, decay: float, eps: float) -> Tuple[Tensor, Tensor]:
    """Return features ``[B, R / B, F]`` of keys, and ``decay z . phi + eps`` for ``z [B, F]``, in float32.

    Args:
        keys: ``[B, R / B, W]``, contiguous, whose first e = *size* columns are keys.
    """
    features, overlap = _forward(keys, size, normalizer, decay, eps)
    assert overlap is not None
    return features, overlap


def _forward(
    keys: Tensor, size: int, normalizer: Optional[Tensor], decay: float, eps: float
) -> Tuple[Tensor, Optional[Tensor]]:
    out = keys.new_empty(*keys.shape[:-1], 6 * size, dtype=torch.float32)
    overlap = None if normalizer is None else out.new_empty(out.shape[:-1])
    sizes, (grid, tile) = _rows(keys), _tiles(keys, size)
    features_kernel[grid](
        keys, out, normalizer, overlap, *sizes, decay, eps, E=size, OVERLAP=normalizer is not None, **tile
    )
    return out, overlap


def backward(keys: Tensor, grad: Tensor, overlap: Optional[Overlap] = None) -> Tensor:
    """Return the gradient of ``keys [.., e]`` for that of their features ``[.., 6 e]``, in float32."""
    keys = keys.contiguous()
    out = torch.empty_like(keys)
    gradient_into(out, keys, grad, overlap)
    return out


def gradient_into(out: Tensor, keys: Tensor, grad: Tensor, overlap: Optional[Overlap] = None) -> None:
    """Write the gradient of the first e of W columns of ``keys [.., W]`` into those of ``out [.., W]``."""
    size, grad = grad.size(-1) // 6, grad.contiguous()
    sizes, (grid, tile) = _rows(keys), _tiles(keys, size)
    with_overlaps = overlap or Overlap(grad, grad)  # a kernel without them reads neither, but adds to addresses
    features_gradient_kernel[grid](keys, grad, *with_overlaps, out, *sizes, E=size, OVERLAP=overlap is not None, **tile)


def _rows(keys: Tensor) -> Tuple[int, int, int]:
    """Return the rows of all streams, their columns, and the rows of a stream."""
    return keys.numel() // keys.size(-1), keys.size(-1), keys.size(-2) if keys.dim() > 1 else 1


def _tiles(keys: Tensor, size: int) -> Tuple[Tuple[int], dict[str, int]]:
    block = block_of(size)
    rows = max(TILE // block, 1)
    return (triton.cdiv(keys.numel() // keys.size(-1), rows),), {"ROWS": rows, "BLOCK": block, "num_warps": 4}
