"""Triton kernels: the delta rule, apart from its products with a matrix, and its gradients.

Shapes: B streams, m memory tokens, d model width, e width of a key, F = 6 e its features,
W >= e + d + 1 columns of the maps ``[k ; v ; gate]``.
Names: p_ pointer, b_ tile, m_ mask. All tensors are contiguous.
"""

from typing import NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels.shared_kernels import block_of
from .features_kernel import gradient_into, with_overlap
from .product_kernel import product

COLUMNS = 64  # of a tile
NUMBERS = tl.constexpr(5)  # of a memory token, in the order of `Written.numbers`


class Written(NamedTuple):
    """The tensors, in float32, that the backward pass of a write needs besides its inputs."""

    features: Tensor  # [B, m, F]
    alike: Tensor  # [B, m, m]: phi_i . phi_j
    # [B, m, 5]: beta_i, n_i, sum_j beta_j phi_i . phi_j, gamma_i, n_i + sum_j gamma_j phi_i . phi_j
    numbers: Tensor
    recalled: Tensor  # [B, m, d]: A phi_i, without the decay
    change: Tensor  # [B, m, d]: the rows by which features change A


@triton.jit
def number_kernel(
    p_maps, p_bias, p_z, p_features, p_overlap, p_alike, p_numbers, p_new_z, m, W, decay, eps,
    E: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the products of a stream's features, the numbers of its rows, and ``decay z + sum gamma_i phi_i``."""
    b, i, F = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_M), 6 * E
    row, m_i = b * m + i, i < m
    gate = tl.load(p_maps + row * W + E + D, m_i, other=0.0).to(tl.float32) + tl.load(p_bias).to(tl.float32)
    beta = tl.where(m_i, tl.sigmoid(gate), 0.0)
    size = tl.zeros([BLOCK_M], tl.float32)
    b_alike = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        # [BLOCK_M, BLOCK]
        b_features = tl.load(p_features + row[:, None] * F + f[None, :], m_i[:, None] & (f < F)[None, :], other=0.0)
        size += tl.sum(b_features * b_features, 1)
        b_alike += tl.dot(b_features, tl.trans(b_features), input_precision="ieee")
    overlap = tl.load(p_overlap + row, m_i, other=0.0)
    unmet = tl.where(m_i, tl.minimum(tl.maximum(1 - overlap / (size + eps), 0.0), 1.0), 0.0)
    at = p_numbers + row * NUMBERS
    tl.store(at, beta, m_i)
    tl.store(at + 1, overlap, m_i)
    tl.store(at + 2, tl.sum(b_alike * beta[None, :], 1), m_i)
    tl.store(at + 3, unmet, m_i)
    tl.store(at + 4, overlap + tl.sum(b_alike * unmet[None, :], 1), m_i)
    tl.store(p_alike + row[:, None] * m + i[None, :], b_alike, m_i[:, None] & m_i[None, :])
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        b_features = tl.load(p_features + row[:, None] * F + f[None, :], m_i[:, None] & (f < F)[None, :], other=0.0)
        b_z = tl.load(p_z + b * F + f, f < F, other=0.0) * decay
        tl.store(p_new_z + b * F + f, b_z + tl.sum(unmet[:, None] * b_features, 0), f < F)


@triton.jit
def bounded(p_numbers, row, m_i):
    """Return beta_i, the bound b_i, and the share c_i before it is limited to 1."""
    at = p_numbers + row * NUMBERS
    bound = tl.maximum(tl.load(at + 1, m_i, other=1.0), tl.load(at + 2, m_i, other=1.0))
    return tl.load(at, m_i, other=0.0), bound, tl.load(at + 4, m_i, other=0.0) / bound


@triton.jit
def change_kernel(
    p_maps, p_recalled, p_numbers, p_out, T, W, decay, unit,
    E: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ``beta_i (c_i v_i - decay A phi_i / b_i)`` for T rows."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d, m_i = tl.arange(0, BLOCK), row < T
    there = m_i[:, None] & (d < D)[None, :]
    beta, bound, share = bounded(p_numbers, row, m_i)
    # [ROWS, BLOCK]
    b_v = tl.load(p_maps + row[:, None] * W + E + d[None, :], there, other=0.0).to(tl.float32) * unit
    at = row[:, None] * D + d[None, :]
    b_recalled = tl.load(p_recalled + at, there, other=0.0) * decay
    b_change = tl.minimum(share, 1.0)[:, None] * b_v - b_recalled / bound[:, None]
    tl.store(p_out + at, beta[:, None] * b_change, there)


@triton.jit
def outer_kernel(p_matrix, p_features, p_rows, p_out, m, factor, F: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``factor A + sum_i phi_i rows_i^T`` for ``A [B, F, D]`` and ``rows [B, m, D]``.

    Rows are added one by one: a product of tiles would take registers that loads ahead need.
    """
    b = tl.program_id(2).to(tl.int64)
    f, d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_f, m_d = f < F, d < D
    # [BLOCK, BLOCK]
    at, there = (b * F + f[:, None]) * D + d[None, :], m_f[:, None] & m_d[None, :]
    b_sum = tl.load(p_matrix + at, there, other=0.0) * factor
    for i in tl.range(0, m, loop_unroll_factor=2):
        b_phi = tl.load(p_features + (b * m + i) * F + f, m_f, other=0.0)
        b_sum += b_phi[:, None] * tl.load(p_rows + (b * m + i) * D + d, m_d, other=0.0)[None, :]
    tl.store(p_out + at, b_sum, there)


@triton.jit
def row_gradient_kernel(
    p_maps, p_recalled, p_numbers, p_alike, p_grad, p_dmaps, p_drecalled, p_dalike, p_doverlap, m, W, decay, unit,
    E: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a stream's values and gates, of ``A phi_i``, ``phi_i . phi_j`` and n_i.

    *p_grad* is the gradient of the change. That of ``phi_i . phi_j`` is the sum of both orders.
    """
    b, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_M)
    row, m_i = b * m + i, i < m
    beta, bound, share = bounded(p_numbers, row, m_i)
    limited = tl.minimum(share, 1.0)
    along_values, along_recalled = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        there, at = m_i[:, None] & (d < D)[None, :], row[:, None] * D + d[None, :]
        of_map = row[:, None] * W + E + d[None, :]
        # [BLOCK_M, BLOCK]
        b_grad = tl.load(p_grad + at, there, other=0.0)
        along_values += tl.sum(b_grad * (tl.load(p_maps + of_map, there, other=0.0).to(tl.float32) * unit), 1)
        along_recalled += tl.sum(b_grad * (tl.load(p_recalled + at, there, other=0.0) * decay), 1)
        b_dv = b_grad * (beta * limited * unit)[:, None]
        tl.store(p_dmaps + of_map, b_dv.to(p_dmaps.dtype.element_ty), there)
        tl.store(p_drecalled + at, b_grad * (-decay * beta / bound)[:, None], there)
    at = p_numbers + row * NUMBERS
    overlap, alike = tl.load(at + 1, m_i, other=1.0), tl.load(at + 2, m_i, other=1.0)
    unmet = tl.load(at + 3, m_i, other=0.0)
    # The share is reached / bound, the bound the larger one of overlap and alike; equal ones get half each.
    d_reached = tl.where(share <= 1, beta * along_values, 0.0) / bound
    d_bound = beta * along_recalled / (bound * bound) - d_reached * share
    to_overlap = tl.where(overlap > alike, 1.0, tl.where(overlap == alike, 0.5, 0.0))
    d_alike = d_bound * (1 - to_overlap)
    tl.store(p_doverlap + row, d_reached + d_bound * to_overlap, m_i)
    both = m_i[:, None] & m_i[None, :]
    b_alike = tl.load(p_alike + row[:, None] * m + i[None, :], both, other=0.0)
    b_dalike = d_reached[:, None] * unmet[None, :] + unmet[:, None] * d_reached[None, :]
    b_dalike += d_alike[:, None] * beta[None, :] + beta[:, None] * d_alike[None, :]
    tl.store(p_dalike + row[:, None] * m + i[None, :], b_dalike, both)
    d_beta = limited * along_values - along_recalled / bound + tl.sum(b_alike * d_alike[:, None], 0)
    column = tl.arange(0, 16)  # the gate's, and padding behind it
    b_dgate = tl.where(column[None, :] == 0, (d_beta * beta * (1 - beta))[:, None], 0.0)
    at = p_dmaps + row[:, None] * W + E + D + column[None, :]
    tl.store(at, b_dgate.to(p_dmaps.dtype.element_ty), m_i[:, None] & (column < W - E - D)[None, :])


@triton.jit
def alike_gradient_kernel(
    p_features, p_z, p_dz, p_numbers, p_dalike, p_doverlap, p_out, m, decay,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to the gradient of features what comes by their products with each other and with z, old and new."""
    b, i = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_M)
    f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, m_i, m_f = b * m + i, i < m, f < F
    there, at = m_i[:, None] & m_f[None, :], row[:, None] * F + f[None, :]
    b_grad = tl.load(p_out + at, there, other=0.0)  # [BLOCK_M, BLOCK]
    for n in tl.range(0, m, loop_unroll_factor=2):
        d_alike = tl.load(p_dalike + row * m + n, m_i, other=0.0)
        b_grad += d_alike[:, None] * tl.load(p_features + (b * m + n) * F + f, m_f, other=0.0)[None, :]
    b_z = tl.load(p_z + b * F + f, m_f, other=0.0) * decay
    b_grad += tl.load(p_doverlap + row, m_i, other=0.0)[:, None] * b_z[None, :]
    unmet = tl.load(p_numbers + row * NUMBERS + 3, m_i, other=0.0)
    b_grad += unmet[:, None] * tl.load(p_dz + b * F + f, m_f, other=0.0)[None, :]
    tl.store(p_out + at, b_grad, there)


def forward(
    maps: Tensor, bias: Tensor, matrix: Tensor, normalizer: Tensor, eps: float, decay: float, unit: float
) -> Tuple[Tensor, Tensor, Written]:
    """Return the matrix ``[B, F, d]`` and the normaliser ``[B, F]`` after a write, and what `backward` needs.

    Args:
        maps: ``[B, m, W]``, from which e and d follow by the sizes of the matrix.
        bias: ``[1]``, of the gates.
    """
    (batch, count, width), (_, features, size) = maps.shape, matrix.shape
    made, overlap = with_overlap(maps, features // 6, normalizer, decay, eps)
    new_normalizer, alike, numbers = (
        torch.empty_like(normalizer),
        matrix.new_empty(batch, count, count),
        matrix.new_empty(batch, count, NUMBERS.value),
    )
    sizes, blocks = {"E": features // 6, "D": size}, _blocks(count)
    number_kernel[(batch,)](
        maps,
        bias,
        normalizer,
        made,
        overlap,
        alike,
        numbers,
        new_normalizer,
        count,
        width,
        decay,
        eps,
        **sizes,
        **blocks,
    )
    recalled = product(made, matrix, maps)
    change, rows = torch.empty_like(recalled), 4
    change_kernel[(triton.cdiv(batch * count, rows),)](
        maps, recalled, numbers, change, batch * count, width, decay, unit, **sizes, ROWS=rows, BLOCK=block_of(size)
    )
    return outer(matrix, made, change, decay), new_normalizer, Written(made, alike, numbers, recalled, change)


def outer(matrix: Tensor, features: Tensor, rows: Tensor, factor: float) -> Tensor:
    """Return ``factor matrix + features^T rows`` for ``[B, F, d]``, ``[B, m, F]`` and ``[B, m, d]``."""
    out, (batch, count, width), size = torch.empty_like(matrix), features.shape, matrix.size(2)
    outer_kernel[(triton.cdiv(size, COLUMNS), triton.cdiv(width, COLUMNS), batch)](
        matrix, features, rows, out, count, factor, F=width, D=size, BLOCK=COLUMNS, num_warps=8
    )
    return out


def backward(
    maps: Tensor, matrix: Tensor, normalizer: Tensor, written: Written, d_matrix: Tensor, d_normalizer: Tensor,
    decay: float, unit: float, through: bool,
) -> Tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor]]:  # fmt: skip
    """Return the gradients of the maps and of the gates' bias, and if *through* those of the state before."""
    (batch, count, width), (_, features, size) = maps.shape, matrix.shape
    sizes, blocks, e = {"E": features // 6, "D": size}, _blocks(count), features // 6
    d_maps, d_recalled = torch.empty_like(maps), torch.empty_like(written.recalled)
    d_alike, d_overlap = torch.empty_like(written.alike), matrix.new_empty(batch, 1, count)
    row_gradient_kernel[(batch,)](
        maps, written.recalled, written.numbers, written.alike, product(written.features, d_matrix, maps),
        d_maps, d_recalled, d_alike, d_overlap, count, width, decay, unit, **sizes, **blocks,
    )  # fmt: skip
    d_features = product(written.change, d_matrix.transpose(1, 2), maps)
    product(d_recalled, matrix.transpose(1, 2), maps, add_to=d_features)
    alike_gradient_kernel[(triton.cdiv(features, COLUMNS), batch)](
        written.features, normalizer, d_normalizer, written.numbers, d_alike, d_overlap, d_features, count, decay,
        F=features, **blocks,
    )  # fmt: skip
    gradient_into(d_maps, maps, d_features)
    d_bias = d_maps[..., e + size].sum(dtype=torch.float32).view(1)
    if not through:
        return d_maps, d_bias, None, None
    d_old = torch.baddbmm(d_normalizer.unsqueeze(1), d_overlap, written.features, beta=decay, alpha=decay)
    return d_maps, d_bias, outer(d_matrix, written.features, d_recalled, decay), d_old.squeeze(1)


def _blocks(count: int) -> dict[str, int]:
    return {"BLOCK_M": block_of(count), "BLOCK": COLUMNS}
