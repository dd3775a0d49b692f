"""Triton kernel: the linear maps of decoding, one new row a text, with the operations before and after them.

A token needs so few operations that launches determine its time. So a map normalises its input itself, and adds
its bias, activation and residual.

Shapes: R rows, K numbers of each, N of each afterwards.
"""

from typing import Optional

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from .dependent import launch_options, wait_for_inputs

WIDEST = 1024  # rows up to here are normalised within a map
LONGEST = 8192  # and up to here one row is a single tile
ROWS = 16  # rows of a tile for tensor cores
FEW_ROWS = 4  # fewer rows are multiplied one by one: only reading the weights takes time then
PROGRAMS = 96  # most of a large GPU


@triton.jit
def _moments(b_x, in_row, width, eps):
    """Return the mean and the reciprocal standard deviation of rows ``[R, K]``."""
    mean = tl.sum(b_x, axis=1) / width
    centred = tl.where(in_row, b_x - mean[:, None], 0.0)
    return mean, 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)


@triton.jit
def row_map_kernel(
    p_x, p_w, p_bias, p_gain, p_shift, p_residual, p_residual_gain, p_residual_shift, p_out,
    R, K, N, s_x, s_w, s_residual, eps, residual_eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr, RESIDUAL_NORM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE_K: tl.constexpr, WIDE_N: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_r, in_n = row < R, n < N
    p_rows = p_x + row[:, None] * s_x
    p_weights = p_w + n[:, None] * s_w
    in_out = in_r[:, None] & in_n[None, :]
    # All loads are issued before any is waited for, the weights first: no kernel before this one made them.
    if BLOCK_R == 1:
        b_w = tl.load(p_weights + k[None, :], mask=in_n[:, None] & (k < K)[None, :], other=0)
    if EARLY:
        if BLOCK_R == 1 and NORM:
            gain = tl.load(p_gain + k, mask=k < K, other=0)
            shift = tl.load(p_shift + k, mask=k < K, other=0)
        if BIAS:
            b_bias = tl.load(p_bias + n, mask=in_n, other=0)
        if RESIDUAL_NORM:
            residual_gain = tl.load(p_residual_gain + n, mask=in_n, other=0)
            residual_shift = tl.load(p_residual_shift + n, mask=in_n, other=0)
    wait_for_inputs(PDL)
    if BLOCK_R == 1:
        in_x = in_r[:, None] & (k < K)[None, :]
        b_x = tl.load(p_rows + k[None, :], mask=in_x, other=0).to(tl.float32)
        if NORM and not EARLY:
            gain = tl.load(p_gain + k, mask=k < K, other=0)
            shift = tl.load(p_shift + k, mask=k < K, other=0)
    elif NORM:
        wide = tl.arange(0, WIDE_K)
        in_x = in_r[:, None] & (wide < K)[None, :]
        b_x = tl.load(p_rows + wide[None, :], mask=in_x, other=0).to(tl.float32)
    if BIAS:
        if not EARLY:
            b_bias = tl.load(p_bias + n, mask=in_n, other=0)
        b_bias = b_bias.to(tl.float32)
    if RESIDUAL:
        p_before = p_residual + row[:, None] * s_residual
        b_before = tl.load(p_before + n[None, :], mask=in_out, other=0).to(tl.float32)
        if RESIDUAL_NORM:
            every = tl.arange(0, WIDE_N)
            in_before = in_r[:, None] & (every < N)[None, :]
            b_whole = tl.load(p_before + every[None, :], mask=in_before, other=0).to(tl.float32)
            if not EARLY:
                residual_gain = tl.load(p_residual_gain + n, mask=in_n, other=0)
                residual_shift = tl.load(p_residual_shift + n, mask=in_n, other=0)
            residual_gain, residual_shift = residual_gain.to(tl.float32), residual_shift.to(tl.float32)
            mean, rstd = _moments(b_whole, in_before, N, residual_eps)
            b_before = (b_before - mean[:, None]) * rstd[:, None] * residual_gain[None, :] + residual_shift[None, :]
    if NORM:
        mean, rstd = _moments(b_x, in_x, K, eps)
    if BLOCK_R == 1:
        if NORM:
            gain, shift = gain.to(tl.float32), shift.to(tl.float32)
            b_x = (b_x - mean[:, None]) * rstd[:, None] * gain[None, :] + shift[None, :]
        b_out = tl.sum(b_x[:, None, :] * b_w.to(tl.float32)[None, :, :], axis=2)
    else:
        b_out = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            at = start + k
            b_chunk = tl.load(p_rows + at[None, :], mask=in_r[:, None] & (at < K)[None, :], other=0)
            b_w = tl.load(p_weights + at[None, :], mask=in_n[:, None] & (at < K)[None, :], other=0)
            if NORM:
                gain = tl.load(p_gain + at, mask=at < K, other=0).to(tl.float32)
                shift = tl.load(p_shift + at, mask=at < K, other=0).to(tl.float32)
                normed = (b_chunk.to(tl.float32) - mean[:, None]) * rstd[:, None] * gain[None, :] + shift[None, :]
                b_chunk = normed.to(b_w.dtype)
            b_out = tl.dot(b_chunk, tl.trans(b_w), b_out, input_precision="ieee")
    if BIAS:
        b_out += b_bias[None, :]
    if RELU:
        b_out = tl.maximum(b_out, 0.0)
    if RESIDUAL:
        b_out += b_before
    tl.store(p_out + row[:, None] * N + n[None, :], b_out.to(p_out.dtype.element_ty), mask=in_out)


def row_map(
    rows: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    *,
    norm: Optional[nn.LayerNorm] = None,
    relu: bool = False,
    residual: Optional[Tensor] = None,
    residual_norm: Optional[nn.LayerNorm] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """Return ``act(norm(rows) @ weight.T + bias) + residual_norm(residual)``, ``[R, N]``, by one launch.

    An argument that is None is left out. Sums and intermediate results are in float32, whatever the dtype of the
    tensors.

    Args:
        rows: ``[R, K]``, its last dimension contiguous.
        weight: ``[N, K]``, likewise.
        norm: with gain and shift; rows wider than `WIDEST` are normalised by a launch of their own.
        residual: ``[R, N]``, likewise, and its *residual_norm*.
        dtype: of the result; None takes that of *rows*.
    """
    if norm is not None and rows.size(1) > WIDEST:
        rows, norm = norm(rows), None
    if residual is not None and residual_norm is not None and residual.size(1) > WIDEST:
        residual, residual_norm = residual_norm(residual), None
    count, size = rows.shape
    width = weight.size(0)
    out = torch.empty(count, width, device=rows.device, dtype=dtype or rows.dtype)
    tile = _tile(count, size, width, weight.element_size())
    grid = (triton.cdiv(width, tile["BLOCK_N"]), triton.cdiv(count, tile["BLOCK_R"]))
    row_map_kernel[grid](
        rows, weight, weight if bias is None else bias, *_gain_and_shift(norm, weight),
        weight if residual is None else residual, *_gain_and_shift(residual_norm, weight), out,
        count, size, width, rows.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0),
        0.0 if norm is None else norm.eps, 0.0 if residual_norm is None else residual_norm.eps,
        NORM=norm is not None, BIAS=bias is not None, RELU=relu, RESIDUAL=residual is not None,
        RESIDUAL_NORM=residual_norm is not None,
        WIDE_K=triton.next_power_of_2(size), WIDE_N=triton.next_power_of_2(width), **tile,
        **launch_options(count, rows.device),
    )  # fmt: skip
    return out


def _tile(count: int, size: int, width: int, bytes_each: int) -> dict[str, int]:
    if count < FEW_ROWS and size <= LONGEST:
        block = 4
        while block < 16 and width >= 2 * block * PROGRAMS:
            block *= 2
        return {"BLOCK_R": 1, "BLOCK_N": block, "BLOCK_K": triton.next_power_of_2(size), "num_warps": 4}
    block = 64
    while block > 16 and triton.cdiv(count, ROWS) * triton.cdiv(width, block) < PROGRAMS:
        block //= 2
    keys = min(256 // bytes_each, max(16, triton.next_power_of_2(size)))
    warps = 4 if max(size, width) <= WIDEST // 2 else 8  # 8 warps have the registers for a whole row's moments
    return {"BLOCK_R": ROWS, "BLOCK_N": block, "BLOCK_K": keys, "num_warps": warps, "num_stages": 4}


def _gain_and_shift(norm: Optional[nn.LayerNorm], unused: Tensor) -> tuple[Tensor, Tensor]:
    return (unused, unused) if norm is None else (norm.weight, norm.bias)


def normalized(rows: Tensor, norm: Optional[nn.LayerNorm]) -> Tensor:
    """Return rows after a norm that no map applies, and rows without a norm as they are."""
    return rows if norm is None else F.layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
