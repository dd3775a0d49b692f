"""Learned biases by distance (Raffel et al. 2020, arXiv 1910.10683, section 2.1): far distances share one.

Shapes: L layers, H heads, U distances.
"""

import logging
import math
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor, nn

from ..attention import RelativeBias
from .base import POSITIONS, PositionEncoding
from .bias import LayerBias, PositionConfig

logger = logging.getLogger(__name__)

BUCKETS, FARTHEST = 32, 128  # biases per head; all distances from FARTHEST on share one
EXACT = BUCKETS // 2  # distances with a bias of their own
# Adam moves a number by the learning rate at most, whatever its size. So a bias of scores is this times a number.
UNIT = 128.0


@POSITIONS.register("t5")
class T5Positions(PositionEncoding):
    """``softmax(q . k / sqrt(D) + b_l[bucket(i - j)])``, where b is learned for each layer l and head.

    T5 has one table for all layers. Here each layer has its own, as in Block-Recurrent Transformers. No distance is to
    the right, so that memory which attends there is refused.
    """

    @classmethod
    def check(cls, looks_ahead: bool) -> None:
        if looks_ahead:
            raise ValueError(
                "--position-encoding t5 has no distances to the right, which look-ahead memory and memory tokens need: "
                "take disentangled or transformer-xl, or --memory recurrent"
            )

    def __init__(self, config: PositionConfig):
        super().__init__(config)
        self.unit = UNIT / config.score_scale
        self.table = nn.Parameter(torch.empty(config.layers, config.heads, BUCKETS))  # b / unit
        nn.init.normal_(self.table, std=BUCKETS**-0.5 / UNIT)

    def biases(self, causal: int, ahead: Optional[range], like: Tensor) -> List[LayerBias]:
        distances = torch.arange(causal - 1, -1, -1, device=like.device)
        # A backend divides scores by sqrt(D), and the paper does not divide the bias.
        scores = self.table[..., bucket(self._clamp(distances))] * (self.unit * math.sqrt(self.config.head_dim))
        return [LayerBias(RelativeBias(score=score), None) for score in scores]

    def upgrade(self, weights: Dict[str, Any], prefix: str) -> bool:
        biases = weights.pop(prefix + "bias", None)
        if biases is not None:
            weights[prefix + "table"] = biases / self.unit
        return biases is not None

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        if self.upgrade(state_dict, prefix):
            logger.warning(
                "these weights hold T5's biases themselves, as older versions stored them: results stay the same, and "
                "a training goes on with a new optimizer only"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def bucket(distances: Tensor) -> Tensor:
    """Return the index of the bias of each distance ``[U]``, all at least 0.

    The first `EXACT` distances have a bias each, those up to `FARTHEST` share the others evenly by their logarithm.
    """
    above = (distances.clamp(min=EXACT) / EXACT).log() / math.log(FARTHEST / EXACT)
    shared = EXACT + (above * (BUCKETS - EXACT)).to(distances.dtype)
    return torch.where(distances < EXACT, distances, shared.clamp(max=BUCKETS - 1))
