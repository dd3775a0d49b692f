"""The continuous signal that stands for the past, and its extension by new rows.

Shapes: B streams, J basis functions, L new rows, S samples of the past, d model width.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .basis import RadialBasis
from .sampling import SAMPLINGS, Density, midpoints


class Fit(NamedTuple):
    """Linear maps from rows to coefficients, by ridge regression."""

    first: Tensor  # [J, L], of rows on the whole of [0, 1]
    past: Tensor  # [J, S], of samples on [0, tau]
    new: Tensor  # [J, L], of rows on (tau, 1] after the samples


@dataclass(frozen=True)
class Signal:
    """``x(t) = B^T psi(t)``: a row of width d for every t in [0, 1], where 1 is now (the paper's sections 3.1 and 3.2).

    Its coefficients are ``B [B, J, d]``, in float32 or wider: ``B = (F F^T + penalty I)^-1 F X`` for rows X at points
    whose basis functions are the columns of F.
    """

    basis: RadialBasis
    penalty: float
    contraction: float  # tau
    samples: int  # S
    sampling: str

    def growth(self, length: int) -> float:
        """Return the factor by which the past grows in the long run with every *length* new rows, sampled evenly.

        It is the spectral radius of the map from coefficients to coefficients, about ``contraction`` for a good fit.

        Raises:
            ValueError: the penalty is lost in rounding.
        """
        exact = torch.zeros((), dtype=torch.float64, device="cpu")
        past = _fit(self, length, exact.device, exact.dtype).past
        squeezed = past @ self.basis.evaluate(midpoints(self.samples, exact))  # [J, J]
        return float(torch.linalg.eigvals(squeezed).abs().max())

    @torch.no_grad()
    def extend(self, coefficients: Tensor, taken_in: Tensor, rows: Tensor, density: Density) -> Tensor:
        """Return the signal of the past and of *rows* after it: samples of the past shrink into [0, tau].

        Args:
            coefficients: ``[B, J, d]`` of the past.
            taken_in: ``[B, 1]``, the count of rows in the past; where it is 0, the new rows fill [0, 1].
            rows: ``[B, L, d]``, of any dtype.
            density: of the attention to the past.
        """
        if rows.size(1) == 0:
            return coefficients
        with torch.autocast(coefficients.device.type, enabled=False):
            fit = _fit(self, rows.size(1), coefficients.device, coefficients.dtype)
            rows = rows.to(coefficients.dtype)
            points = SAMPLINGS[self.sampling](density, self.samples)
            # Not (fit.past @ psi) @ coefficients, which takes half as long: it loses half a digit.
            past = self.basis.evaluate(points) @ coefficients  # [B, S, d]
            known = (taken_in > 0).unsqueeze(-1)
            return (fit.past * known) @ past + torch.where(known, fit.new, fit.first) @ rows


# A process reads segments of few lengths; see basis.py on caches by value.
@lru_cache(maxsize=16)
def _fit(signal: Signal, length: int, device: torch.device, dtype: torch.dtype) -> Fit:
    with torch.inference_mode(False):
        exact = torch.zeros((), dtype=torch.float64, device="cpu")
        points, tau = midpoints(length, exact), signal.contraction
        after = torch.cat([tau * midpoints(signal.samples, exact), tau + (1 - tau) * points])
        first, later = (_regression(signal.basis.evaluate(p), signal.penalty) for p in (points, after))
        return Fit(*(m.to(device, dtype) for m in (first, *later.split([signal.samples, length], dim=1))))


def _regression(features: Tensor, penalty: float) -> Tensor:
    """Return ``(F F^T + penalty I)^-1 F`` ``[J, P]`` for points with the basis functions ``F^T [P, J]``.

    Raises:
        ValueError: the penalty is lost in the rounding of ``F F^T``.
    """
    gram = features.T @ features
    gram.diagonal().add_(penalty)
    try:
        factor = torch.linalg.cholesky(gram)
    except torch.linalg.LinAlgError:
        raise ValueError(
            f"--ridge-penalty is {penalty:g}, too little to fit {features.size(1)} basis functions to "
            f"{features.size(0)} rows: pass a larger one, such as 1e-6"
        ) from None
    return torch.cholesky_solve(features.T, factor)
