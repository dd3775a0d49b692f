"""Attention with linear biases (Press et al. 2022, arXiv 2108.12409): a penalty in proportion to the distance.

Shapes: H heads, U distances.
"""

import math
from typing import List, Optional

import torch
from torch import Tensor

from ..attention import RelativeBias
from .base import POSITIONS, PositionEncoding
from .bias import LayerBias


@POSITIONS.register("alibi")
class AlibiPositions(PositionEncoding):
    """``softmax(q . k / sqrt(D) - slope_h |i - j|)``, without parameters (section 3).

    The paper is causal. To the right of a memory slot, this encoding penalises the absolute distance likewise. So it
    distinguishes distances, not directions. Distances beyond ``clamp_len`` have the penalty of ``clamp_len``.
    """

    def biases(self, causal: int, ahead: Optional[range], like: Tensor) -> List[LayerBias]:
        past = RelativeBias(score=self._scores(range(causal - 1, -1, -1), like))
        future = None if ahead is None else RelativeBias(score=self._scores(ahead, like))
        return [LayerBias(past, future)] * self.config.layers

    def _scores(self, distances: range, like: Tensor) -> Tensor:
        """Return scores ``[H, U]`` without gradient, in the dtype of *like*.

        A backend divides scores by ``sqrt(D)``; the paper does not divide the penalty, so it is multiplied here.
        """
        exact = torch.promote_types(like.dtype, torch.float32)
        values = torch.arange(distances.start, distances.stop, distances.step, device=like.device)
        distance = self._clamp(values.abs()).to(exact)
        slope = slopes(self.config.heads, exact, like.device) * math.sqrt(self.config.head_dim)
        # Half of the range leaves room for a content score: in half precision, their sum must stay finite.
        return (-slope.unsqueeze(1) * distance).clamp(min=torch.finfo(like.dtype).min / 2).to(like.dtype)


def slopes(heads: int, dtype: torch.dtype, device: Optional[torch.device] = None) -> Tensor:
    """Return the slope of each head, ``2^(-8 h / H)`` for h from 1 to H where H is a power of two: ``[H]``.

    For another H, as in the paper's code, the slopes for the next smaller power P come first. Every other slope for 2 P
    follows, from the first on.
    """
    power = 1 << (heads.bit_length() - 1)
    own = torch.arange(1, power + 1, device=device, dtype=dtype) * (-8 / power)
    others = torch.arange(heads - power, device=device, dtype=dtype).mul(2).add(1) * (-4 / power)
    return torch.cat([own, others]).exp2()
