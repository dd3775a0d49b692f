"""Triton kernels: a histogram of Gaussian densities, summed over queries, and its quantiles.

Every program adds up some of the queries, and the programs' sums are added in order, so that runs agree to the last
bit.

Shapes: B streams, T densities of each, P programs, S samples.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels.shared_kernels import TILE, programs

SAMPLES = 16  # of a program


@triton.jit
def histogram_kernel(p_mean, p_variance, p_partial, T, BINS: tl.constexpr, ROWS: tl.constexpr):
    program, count, stream = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    below = tl.arange(0, BINS)[None, :] / BINS
    b_mass = tl.zeros([ROWS, BINS], tl.float32)
    for start in range(program * ROWS, T, count * ROWS):
        row = start + tl.arange(0, ROWS)
        b_mean = tl.load(p_mean + stream * T + row, row < T, other=0.0)[:, None]
        b_scale = tl.sqrt(0.5 / tl.load(p_variance + stream * T + row, row < T, other=1.0))[:, None]
        b_inside = tl.erf((below + 1 / BINS - b_mean) * b_scale) - tl.erf((below - b_mean) * b_scale)
        b_mass += tl.where((row < T)[:, None], b_inside, 0.0)
    offset = (stream * count + program) * BINS + tl.arange(0, BINS)
    tl.store(p_partial + offset, 0.5 * tl.sum(b_mass, 0))


def histogram(mean: Tensor, variance: Tensor, bins: int) -> Tensor:
    """Return the mass in *bins* bins of [0, 1], a power of 2: ``[B, bins]`` of contiguous ``[B, T]`` in float32."""
    streams, queries = mean.shape
    tile_rows = max(1, TILE // bins)
    count = programs(mean.device, triton.cdiv(queries, tile_rows), max(1, streams))
    partial = mean.new_empty(streams, count, bins)
    if partial.numel():
        histogram_kernel[(count, streams)](mean, variance, partial, queries, BINS=bins, ROWS=tile_rows, num_warps=4)
    return partial.sum(1, dtype=torch.float32)


@triton.jit
def quantile_kernel(p_mass, p_out, S, floor, tiny, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Write quantiles of one stream's histogram, at the middles of S equal parts."""
    stream, bins = tl.program_id(0).to(tl.int64), tl.arange(0, BINS)
    sample = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_mass = tl.load(p_mass + stream * BINS + bins)
    b_probability = b_mass / tl.maximum(tl.sum(b_mass, 0), tiny) + floor
    b_upto = tl.cumsum(b_probability, 0)
    level = (sample + 0.5) / S * tl.sum(tl.where(bins == BINS - 1, b_upto, 0.0), 0)
    # [BLOCK, BINS]
    index = tl.minimum(tl.sum((b_upto[None, :] <= level[:, None]).to(tl.int32), 1), BINS - 1)
    below = tl.sum(tl.where(bins[None, :] + 1 == index[:, None], b_upto[None, :], 0.0), 1)
    there = tl.sum(tl.where(bins[None, :] == index[:, None], b_probability[None, :], 0.0), 1)
    inside = (level - below) / there
    inside = tl.where(inside < 0, 0.0, tl.where(inside > 1, 1.0, inside))  # NaN stays, as in PyTorch's clamp
    tl.store(p_out + stream * S + sample, (index + inside) / BINS, sample < S)


def quantiles(mass: Tensor, count: int, floor: float) -> Tensor:
    """Return the quantiles ``[B, S]`` of contiguous ``[B, bins]`` in float32 at the middles of S = *count* equal parts.

    Args:
        floor: is added to the share of every bin.
    """
    out, (streams, bins) = mass.new_empty(mass.size(0), count), mass.shape
    if out.numel():
        quantile_kernel[(streams, triton.cdiv(count, SAMPLES))](
            mass, out, count, floor, torch.finfo(mass.dtype).tiny, BINS=bins, BLOCK=SAMPLES, num_warps=4
        )
    return out
