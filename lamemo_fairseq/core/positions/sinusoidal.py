"""Relative positions by sinusoids: Transformer-XL's, and LaMemo's disentangled ones.

Shapes: L layers, H heads, D size of a head, U distances, d model width.
"""

from typing import List, Optional

import torch
from torch import Tensor, nn

from ..attention import RelativeBias
from .base import POSITIONS, PositionEncoding, require_pairs
from .bias import LayerBias, PositionConfig


@POSITIONS.register("transformer-xl")
class TransformerXLPositions(PositionEncoding):
    """``(q + u) . k + (q + v) . W_r sinusoid(i - j)`` (Dai et al. 2019, section 3.3).

    To the right of a slot the distance is negative, and distance and direction share the sinusoid.
    """

    def __init__(self, config: PositionConfig):
        super().__init__(config)
        require_pairs(config.embed_dim)
        self.content_bias = nn.Parameter(torch.empty(config.heads, config.head_dim))
        self.position_bias = nn.Parameter(torch.empty(config.heads, config.head_dim))
        self.projection = nn.Parameter(torch.empty(config.layers, config.heads * config.head_dim, config.embed_dim))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def biases(self, causal: int, ahead: Optional[range], like: Tensor) -> List[LayerBias]:
        past = self._project(self._sinusoids(range(causal - 1, -1, -1), like))
        causal_biases = [RelativeBias(self.content_bias, self.position_bias, table) for table in past]
        if ahead is None:
            return [LayerBias(bias, None) for bias in causal_biases]
        first = self.config.first_ahead
        tables = self._project(self._sinusoids(self._ahead_distances(ahead), like), first=first)
        future = [None] * first + [RelativeBias(*self._ahead_biases(), table) for table in tables]
        return [LayerBias(*biases) for biases in zip(causal_biases, future, strict=True)]

    def _ahead_distances(self, ahead: range) -> range:
        return range(-ahead.start, -ahead.stop, -ahead.step)

    def _ahead_biases(self) -> tuple[Tensor, Tensor]:
        return self.content_bias, self.position_bias

    def _project(self, sinusoids: Tensor, columns: slice = slice(None), first: int = 0) -> Tensor:
        """Project sinusoids of width w into heads, by w *columns* of W_r: ``[U, w] -> [L, H, U, D]``.

        The layers below *first* are left out.
        """
        projected: Tensor = sinusoids @ self.projection[first:, :, columns].transpose(1, 2)
        return projected.view(*projected.shape[:-1], self.config.heads, self.config.head_dim).transpose(1, 2)


@POSITIONS.register("disentangled")
class DisentangledPositions(TransformerXLPositions):
    """Direction by a second position bias, distance by the sinusoid of its size (LaMemo, section 3.3).

    ``(q + u) . k + (q + v) . R_|i-j|`` to the left, ``(q + u) . k + (q + v') . R_|i-j|`` to the right.
    """

    @classmethod
    def check(cls, looks_ahead: bool) -> None:
        if not looks_ahead:
            raise ValueError(
                "--position-encoding disentangled and its variants tell right from left, but without "
                "look-ahead memory nothing attends to its right: take transformer-xl, or --memory lookahead"
            )

    def __init__(self, config: PositionConfig):
        super().__init__(config)
        self.ahead_position_bias = nn.Parameter(torch.empty(config.heads, config.head_dim))
        # As released; its entries are ten times those of the other biases in the paper's sizes.
        nn.init.xavier_uniform_(self.ahead_position_bias)

    def _ahead_distances(self, ahead: range) -> range:
        return ahead

    def _clamp(self, distances: Tensor) -> Tensor:
        return super()._clamp(distances.abs())

    def _ahead_biases(self) -> tuple[Tensor, Tensor]:
        return self.content_bias, self.ahead_position_bias


@POSITIONS.register("disentangled-normal")
class DisentangledNormalPositions(DisentangledPositions):
    """As disentangled, with the second position bias N(0, .02) at first like the other biases."""

    def __init__(self, config: PositionConfig):
        super().__init__(config)
        nn.init.normal_(self.ahead_position_bias, std=0.02)


@POSITIONS.register("disentangled-content")
class DisentangledContentPositions(DisentangledPositions):
    """As disentangled, with a second content bias to the right as well (LaMemo's ablation)."""

    def __init__(self, config: PositionConfig):
        super().__init__(config)
        self.ahead_content_bias = nn.Parameter(torch.empty(config.heads, config.head_dim))
        nn.init.xavier_uniform_(self.ahead_content_bias)

    def _ahead_biases(self) -> tuple[Tensor, Tensor]:
        return self.ahead_content_bias, self.ahead_position_bias
