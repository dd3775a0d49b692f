"""Points at which the past signal is sampled before it is squeezed, by name.

Shapes: B streams, H heads, Q queries, S samples.
"""

from typing import Callable, Dict, NamedTuple

import torch
from torch import Tensor

from .basis import takes

BINS = 128  # of the histogram over [0, 1], as in the authors' code
# Added to the probability of every bin: rounding then moves no sample far through bins that nothing attended to.
FLOOR = 1e-6


class Density(NamedTuple):
    """A Gaussian on [0, 1] for each query, in float32 or wider: where the query attends."""

    mean: Tensor  # [B, H, Q]
    variance: Tensor  # [B, H, Q]


def midpoints(count: int, like: Tensor) -> Tensor:
    """Return the middles of *count* equal parts of [0, 1]: ``[count]``."""
    return (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count


def even_points(density: Density, count: int) -> Tensor:
    """Return evenly spaced samples ``[S]``."""
    return midpoints(count, density.mean)


def sticky_points(density: Density, count: int) -> Tensor:
    """Return ascending samples ``[B, S]``, dense where more queries attended (section 3.3 of the paper).

    The paper draws them from a histogram of the last segment's attention over equal bins, summed over heads and
    queries. Here they are the quantiles of that histogram at the middles of S equal parts. The expectations of sorted
    draws are about these quantiles, which have no noise.

    Rounding remains. The signal decides where it is attended to, and attention decides where it is sampled again. So in
    trained models a difference can grow nearly twofold a segment, in float64 as in float32. After some segments another
    batch size moves the samples, and scores with them. Evenly spaced samples do not depend on attention.
    """
    if takes(density.mean):
        return quantiles_by_kernel(by_kernel(density), count)
    return quantiles(plain(density), count)


def quantiles(mass: Tensor, count: int) -> Tensor:
    """Return the quantiles ``[B, S]`` of histograms ``[B, BINS]`` at the middles of S = *count* equal parts."""
    probability = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny) + FLOOR
    below = torch.cat([torch.zeros_like(mass[:, :1]), probability.cumsum(-1)], dim=-1)  # [B, bins + 1]
    level = midpoints(count, mass) * below[:, -1:]  # [B, S]
    index = (torch.searchsorted(below, level, right=True) - 1).clamp(0, BINS - 1)
    inside = (level - below.gather(-1, index)) / probability.gather(-1, index)
    return (index + inside.clamp(0, 1)) / BINS


def quantiles_by_kernel(mass: Tensor, count: int) -> Tensor:
    """Return `quantiles` by one kernel, in place of some 20 operations on a few numbers."""
    from .sampling_kernel import quantiles as by_one

    return by_one(mass, count, FLOOR)


def plain(density: Density) -> Tensor:
    """Return the histogram ``[B, BINS]`` by PyTorch's operations."""
    edges = torch.linspace(0, 1, BINS + 1, device=density.mean.device, dtype=density.mean.dtype)
    z = (edges - density.mean.flatten(1).unsqueeze(-1)) * (0.5 / density.variance.flatten(1).unsqueeze(-1)).sqrt()
    return (0.5 * torch.erf(z).diff(dim=-1)).sum(1)


def by_kernel(density: Density) -> Tensor:
    """Return the histogram ``[B, BINS]`` by one kernel, which allocates nothing of size queries times bins."""
    from .sampling_kernel import histogram

    return histogram(density.mean.flatten(1).contiguous(), density.variance.flatten(1).contiguous(), BINS)


SAMPLINGS: Dict[str, Callable[[Density, int], Tensor]] = {"sticky": sticky_points, "even": even_points}
