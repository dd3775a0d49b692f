"""Learned relative positions (Shaw et al. 2018), keys only.

Shapes: L layers, H heads, D size of a head, T distances.
"""

from typing import List, Optional

import torch
from torch import Tensor, nn

from ..attention import RelativeBias
from .base import POSITIONS, LayerBias, PositionConfig, PositionEncoding


@POSITIONS.register("shaw")
class ShawPositions(PositionEncoding):
    """``(q + u_l) . k + q . E_l[i - j] + b_l[i - j]``, all learned for each layer l.

    Distances beyond the trained ``N + M``, or beyond ``clamp_len``, use the farthest one below. There is none
    to the right, so that look-ahead memory is refused.
    """

    def __init__(self, config: PositionConfig):
        super().__init__(config)
        if config.looks_ahead:
            raise ValueError(
                "--position-encoding shaw has no distances to the right, which look-ahead memory needs: "
                "take disentangled, or --memory recurrent"
            )
        layers, heads, size = config.layers, config.heads, config.head_dim
        distances = config.trained_distances
        # Row t is the distance `distances - 1 - t`, as in the released checkpoints.
        self.distance_embedding = nn.Parameter(torch.empty(layers, distances, heads, size))
        self.content_bias = nn.Parameter(torch.empty(layers, heads, size))
        self.distance_bias = nn.Parameter(torch.empty(layers, distances, heads))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(self, causal: int, ahead: Optional[range], like: Tensor) -> List[LayerBias]:
        trained = self.distance_embedding.size(1)
        told_apart = min(trained, self.config.clamp_len or trained)
        row = (torch.arange(causal, device=like.device) + trained - causal).clamp(min=trained - told_apart)
        table = self.distance_embedding[:, row].transpose(1, 2)
        score = self.distance_bias[:, row].transpose(1, 2)
        return [
            LayerBias(RelativeBias(content=u, table=e, score=b), None)
            for u, e, b in zip(self.content_bias, table, score, strict=True)
        ]
