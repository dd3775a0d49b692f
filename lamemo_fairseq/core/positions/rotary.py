"""Rotary positions (Su et al. 2021, arXiv 2104.09864): queries and keys are rotated by their positions.

Shapes: D size of a head, U positions.
"""

from typing import List, Optional

import torch
from torch import Tensor

from ..attention import RelativeBias, Rotation
from .base import POSITIONS, PositionEncoding, inverse_frequencies
from .bias import LayerBias, PositionConfig


@POSITIONS.register("rotary")
class RotaryPositions(PositionEncoding):
    """``(R_i q) . (R_j k) / sqrt(D)``, where R_i rotates the pair ``(x_2n, x_2n+1)`` by ``i 10000^(-2n/D)``.

    Pairs are adjacent numbers, as in the paper (equation 15), not halves of a head. The score depends on ``i - j``, to
    the left and to the right. Positions are counted within the rows of one segment, from its oldest memory row on.
    Memories store rows; keys are computed from them and rotated anew in every segment.
    """

    def __init__(self, config: PositionConfig):
        super().__init__(config)
        if config.head_dim % 2:
            raise ValueError(
                f"--position-encoding rotary rotates pairs of numbers, but a head has {config.head_dim}: pass an even "
                "--decoder-head-dim"
            )
        if config.clamp_len > 0:
            raise ValueError(
                f"--clamp-len {config.clamp_len} clamps distances, but --position-encoding rotary rotates by "
                "positions: pass --clamp-len 0, or another encoding"
            )

    def biases(self, causal: int, ahead: Optional[range], like: Tensor) -> List[LayerBias]:
        exact = torch.promote_types(like.dtype, torch.float32)
        positions = torch.arange(causal, device=like.device, dtype=exact)
        angles = positions.unsqueeze(1) * inverse_frequencies(self.config.head_dim, exact, like.device)
        bias = RelativeBias()
        rotation = Rotation(angles.cos(), angles.sin())
        return [LayerBias(bias, None if ahead is None else bias, rotation)] * self.config.layers
