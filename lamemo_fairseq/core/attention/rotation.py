"""Queries and keys that are rotated by their positions, before any backend sees them.

Shapes: B streams, H heads, R rows, D size of a head, D' its padded size, U positions, k new tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .padding import as_wide


class Rotation(NamedTuple):
    """An angle for each position and each pair of adjacent numbers ``(x_2i, x_2i+1)`` of a head.

    The product of a rotated query and a rotated key depends on the difference of their angles alone. So positions may
    be counted from any row, as long as queries and keys are counted from the same one.
    """

    cos: Tensor  # [U, D/2], or [B, 1, k, D/2] of chosen positions; float32 or wider, without gradient
    sin: Tensor

    def at(self, positions: Tensor) -> "Rotation":
        """Return the angles of ``positions [B, k]``."""
        return Rotation(self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1))

    def rotate(self, heads: Tensor, first: int = 0) -> Tensor:
        """Rotate heads whose rows stand at the positions ``first, first + 1, ..``.

        ``(a, b) <- (a cos - b sin, a sin + b cos)`` for each pair.

        Args:
            heads: ``[B, H, R, D or D']``; the zeros behind D stay zeros.
            first: position of the first row; 0 with chosen positions.

        Returns:
            The rotated heads, in the shape and dtype of *heads*.
        """
        length, pairs = heads.size(-2), self.cos.size(-1)
        cos, sin = self.cos.narrow(-2, first, length), self.sin.narrow(-2, first, length)
        real = heads if heads.size(-1) == 2 * pairs else heads[..., : 2 * pairs]
        a, b = real.reshape(*real.shape[:-1], pairs, 2).unbind(-1)
        rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        return as_wide(heads, rotated.to(heads.dtype))
