"""Absolute positions: a sinusoid added to the embeddings (Vaswani et al. 2017)."""

from typing import List, Optional

import torch
from torch import Tensor

from ..attention import RelativeBias
from .base import POSITIONS, LayerBias, PositionEncoding, sinusoid


@POSITIONS.register("absolute")
class AbsolutePositions(PositionEncoding):
    """Position within the segment, counted down to 0 at its end as in the released model."""

    def embed(self, x: Tensor) -> Tensor:
        distances = torch.arange(x.size(1) - 1, -1, -1, device=x.device)
        return x + sinusoid(self._clamp(distances), self.config.embed_dim, x.dtype)

    def forward(self, causal: int, ahead: Optional[range], like: Tensor) -> List[LayerBias]:
        return [LayerBias(RelativeBias(), None if ahead is None else RelativeBias())] * self.config.layers
