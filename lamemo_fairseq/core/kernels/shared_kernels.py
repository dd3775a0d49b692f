"""Triton functions that the kernels over rows share: the mask of dropout, and sums over programs.

Gradients of parameters are sums over rows. Each of a fixed number of programs stores a sum of its own. A second kernel
adds these in order, so that runs agree to the last bit.

Shapes: P programs, d columns.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements that a program of four warps holds at a time
PROGRAMS_PER_MULTIPROCESSOR = 6  # as many as registers allow at a time
WORDS = tl.constexpr(1 << 31)


@triton.jit
def dropout_mask(p_seed, row, groups, first, DROPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the elements of a tile that dropout keeps. Four columns, a group, share one call of the generator.

    There are *groups* groups a row, and *first* is the number of the tile's first group. An element is dropped if its
    31-bit random word is below DROPPED.
    """
    number = row[:, None] * groups + first + tl.arange(0, BLOCK // 4)[None, :]
    a, b, c, d = tl.randint4x(tl.load(p_seed), number)
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [ROWS, BLOCK])
    return (words >> 1).to(tl.int32) >= DROPPED


@triton.jit
def sum_kernel(p_partial, p_out, P, width, d, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    which, column = tl.program_id(1), tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, P, BLOCK_P):
        program = start + tl.arange(0, BLOCK_P)
        offset = (which * P + program[:, None]) * width + column[None, :]
        b_sum += tl.load(p_partial + offset, (program[:, None] < P) & (column[None, :] < d), other=0.0)
    tl.store(p_out + which * d + column, tl.sum(b_sum, 0).to(p_out.dtype.element_ty), column < d)


def sums(partial: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    """Return ``partial [n, P, >= d]`` in float32, summed over the programs: ``[n, d]``."""
    count, programs, width = partial.shape
    out = partial.new_empty(count, d, dtype=dtype)
    # Tiles are narrow, since the time goes into the loop over programs.
    sum_kernel[(triton.cdiv(d, 16), count)](partial, out, programs, width, d, BLOCK_P=256, BLOCK_D=16, num_warps=8)
    return out


def dropped(dropout: float) -> int:
    """Return how many of the 2^31 random words drop an element."""
    return round(dropout * (1 << 31))


def block_of(columns: int) -> int:
    """Return the width of a block that holds all *columns*: a power of 2, and 16 at least, for products."""
    width: int = triton.next_power_of_2(columns)
    return max(16, width)


def programs(device: torch.device, tiles: int, columns: int = 1) -> int:
    """Return the number of programs, at least 1, for the *tiles* of rows; the grid has *columns* programs for each."""
    return max(1, min(tiles, PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(device) // columns))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
