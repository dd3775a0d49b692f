"""Positions in a layer's attention, and the sizes that an encoding is built from.

Shapes: B streams, H heads, Q queries, K keys, D size of a head, D' its padded size.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, Optional, Sequence, Tuple

from torch import Tensor

from ..attention import Counted, RelativeBias, Rotation


@dataclass(frozen=True)
class PositionConfig:
    """Sizes that a position encoding is built from."""

    layers: int
    embed_dim: int
    heads: int
    head_dim: int
    looks_ahead: bool  # whether memory slots attend to their right
    first_ahead: int = field(default=0, kw_only=True)  # the first layer, from 0, in which they do
    trained_distances: int  # distances met in training, N + M
    score_scale: float = field(default=1.0, kw_only=True)  # by which attention multiplies scores and biases at first
    clamp_len: int = 0  # largest distance that is distinguished (0: no limit)
    dropout: float = 0.0
    sentence_ends: Sequence[int] = ()  # words that end a sentence
    paragraph_ends: Sequence[int] = ()


class LayerBias(NamedTuple):
    """The positions in a layer's attention: a rotation, a bias on scores, both or neither, and counted distances.

    Queries and keys are passed around unrotated. Every attention with a bias rotates queries and keys first.
    """

    causal: RelativeBias  # of the causal attention
    ahead: Optional[RelativeBias]  # of the slots' attention to their right; None where nothing attends there
    rotation: Optional[Rotation] = None  # of queries and keys; None leaves them as they are
    counted: Optional[Counted] = None  # added to the scores; None if no distances are counted in the text

    def rotate(self, q: Tensor, k: Tensor) -> Tuple[Tensor, Tensor]:
        """Rotate the queries ``[B, H, Q, D or D']`` of the last rows, and the keys ``[B, H, K, D or D']`` of all rows.

        Scores depend on differences of positions, so that the first key's position may count as 0.
        """
        if self.rotation is None:
            return q, k
        return self.rotation.rotate(q, k.size(2) - q.size(2)), self.rotation.rotate(k)
