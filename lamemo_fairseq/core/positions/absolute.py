"""Absolute positions: a sinusoid added to the embeddings (Vaswani et al. 2017).

Shapes: B streams, N tokens of a segment, d model width.
"""

from typing import ClassVar, List, Optional

import torch
from torch import Tensor

from ..attention import RelativeBias
from .base import POSITIONS, PositionEncoding, require_pairs, sinusoid
from .bias import LayerBias, PositionConfig


@POSITIONS.register("absolute")
class AbsolutePositions(PositionEncoding):
    """Position within the segment, counted down to 0 at its end as in the released model."""

    reaches_memory: ClassVar[bool] = False

    def __init__(self, config: PositionConfig):
        super().__init__(config)
        require_pairs(config.embed_dim)

    def embed(self, x: Tensor, lengths: Optional[Tensor] = None) -> Tensor:
        from_end = torch.arange(x.size(1) - 1, -1, -1, device=x.device)
        if lengths is not None:
            from_end = (from_end + (lengths - x.size(1)).unsqueeze(1)).clamp(min=0)
        table = sinusoid(self._clamp(from_end).flatten(), self.config.embed_dim, x.dtype)
        return x + table.view(*from_end.shape, -1)

    def biases(self, causal: int, ahead: Optional[range], like: Tensor) -> List[LayerBias]:
        return [LayerBias(RelativeBias(), None if ahead is None else RelativeBias())] * self.config.layers
