"""The continuous memory's own options."""

# No postponed annotations: a host reads the types of the fields.
import math
from dataclasses import dataclass

from ...fields import option
from ..base import MemoryOptions
from .basis import RadialBasis
from .sampling import SAMPLINGS

# Standard deviations on [0, 1] whose squares float32 holds.
_NARROWEST, _WIDEST = 1e-6, 1e6


@dataclass(frozen=True)
class ContinuousOptions(MemoryOptions):
    num_basis_functions: int = option(512, "radial basis functions of a continuous memory")
    basis_widths: str = option(
        "0.01,0.05", "comma separated standard deviations of the radial basis functions", fixed=True
    )
    ridge_penalty: float = option(1.0, "penalty of the ridge regression that fits a continuous memory", fixed=True)
    contraction_factor: float = option(
        0.75, "share of a continuous memory that its past is squeezed into, tau", fixed=True
    )
    memory_samples: int = option(512, "samples of the past to which a continuous memory is fitted again")
    memory_sampling: str = option(
        "sticky",
        "samples of a continuous memory: dense where tokens attended, or evenly spaced",
        list(SAMPLINGS),
        fixed=True,
    )
    kl_weight: float = option(1e-6, "weight of the KL divergence of a continuous attention from a narrow one")
    kl_sigma: float = option(0.05, "standard deviation of the narrow attention of --kl-weight, sigma_0")

    def basis(self) -> RadialBasis:
        """Return the basis that the options name."""
        return RadialBasis(self.num_basis_functions, tuple(float(width) for width in self.basis_widths.split(",")))

    def check(self) -> None:
        try:
            widths = self.basis().widths
        except ValueError:
            raise ValueError(f"--basis-widths '{self.basis_widths}': pass numbers such as 0.01,0.05") from None
        if not all(_NARROWEST <= width <= _WIDEST for width in widths):
            raise ValueError(
                f"--basis-widths '{self.basis_widths}': every width must be positive, from {_NARROWEST:g} to "
                f"{_WIDEST:g}"
            )
        if self.num_basis_functions <= 0 or self.num_basis_functions % len(widths):
            raise ValueError(
                f"--num-basis-functions is {self.num_basis_functions}, it must be a positive multiple of the number of "
                f"--basis-widths, {len(widths)}: every centre has a function of each width"
            )
        if not 0 < self.ridge_penalty < math.inf:
            raise ValueError(f"--ridge-penalty is {self.ridge_penalty}, it must be positive")
        if not 0 < self.contraction_factor < 1:
            raise ValueError(
                f"--contraction-factor is {self.contraction_factor}, it must lie between 0 and 1: the past takes that "
                "part of the memory, and new rows the rest"
            )
        if self.memory_samples <= 0:
            raise ValueError(f"--memory-samples is {self.memory_samples}, it must be positive")
        if not 0 <= self.kl_weight < math.inf:
            raise ValueError(f"--kl-weight is {self.kl_weight}: pass 0 for no such loss, or a positive weight")
        if not _NARROWEST <= self.kl_sigma <= _WIDEST:
            raise ValueError(f"--kl-sigma is {self.kl_sigma}, it must be positive, from {_NARROWEST:g} to {_WIDEST:g}")
