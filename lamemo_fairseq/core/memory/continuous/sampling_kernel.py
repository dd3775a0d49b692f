"""Triton kernel: a histogram of Gaussian densities, summed over queries.

Every program adds up some of the queries, and the programs' sums are added in order, so that runs agree to the last
bit.

Shapes: B streams, T densities of each, P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels.shared_kernels import TILE, programs


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
