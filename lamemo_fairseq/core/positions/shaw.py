"""Learned relative positions (Shaw et al. 2018), keys only.

Shapes: L layers, H heads, D size of a head, U distances.
"""

import logging
from typing import Dict, List, Optional

import torch
from torch import Tensor, nn

from ..attention import RelativeBias
from .base import POSITIONS, PositionEncoding
from .bias import LayerBias, PositionConfig

logger = logging.getLogger(__name__)


@POSITIONS.register("shaw")
class ShawPositions(PositionEncoding):
    """``(q + u_l) . k + q . E_l[i - j] + b_l[i - j]``, all learned for each layer l.

    So many distances from 0 on are told apart as were trained, ``N + M``, or ``clamp_len`` if that is less, as in the
    released code. Farther ones use the farthest of these. There are no distances to the right, so that a memory that
    attends there is refused.
    """

    @classmethod
    def check(cls, looks_ahead: bool) -> None:
        if looks_ahead:
            raise ValueError(
                "--position-encoding shaw has no distances to the right, which look-ahead memory and memory tokens "
                "need: take disentangled or transformer-xl, or --memory recurrent"
            )

    def __init__(self, config: PositionConfig):
        super().__init__(config)
        layers, heads, size = config.layers, config.heads, config.head_dim
        distances = config.trained_distances
        # Entry t is the distance `distances - 1 - t`, as in the released checkpoints.
        self.distance_embedding = nn.Parameter(torch.empty(layers, distances, heads, size))
        self.content_bias = nn.Parameter(torch.empty(layers, heads, size))
        self.distance_bias = nn.Parameter(torch.empty(layers, distances, heads))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)
        self._told = False

    def biases(self, causal: int, ahead: Optional[range], like: Tensor) -> List[LayerBias]:
        trained = self.distance_embedding.size(1)
        told_apart = min(trained, self.config.clamp_len or trained)
        index = (torch.arange(causal, device=like.device) + trained - causal).clamp(min=trained - told_apart)
        table = self.distance_embedding[:, index].transpose(1, 2)
        score = self.distance_bias[:, index].transpose(1, 2)
        if causal > trained and not self._told:
            logger.info("distances of %d and more use the farthest learned one, %d", trained, trained - 1)
            self._told = True
        return [
            LayerBias(RelativeBias(content=u, table=e, score=b), None)
            for u, e, b in zip(self.content_bias, table, score, strict=True)
        ]

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args: object) -> None:
        """Take the learned distances as they are, also where this model reads longer or shorter segments."""
        for name in ("distance_embedding", "distance_bias"):
            current, saved = getattr(self, name), state_dict.get(prefix + name)
            if saved is not None and saved.dim() == current.dim() and saved.shape[1] != current.shape[1]:
                setattr(self, name, nn.Parameter(current.new_empty(saved.shape)))
        super()._load_from_state_dict(state_dict, prefix, *args)
