"""The inputs and results of attention.

Shapes: B streams, H heads, Q queries, K keys, D size of a head, U distances.
"""

from typing import NamedTuple, Optional

from torch import Tensor


class RelativeBias(NamedTuple):
    """The scores of one layer for a key by its distance from the query.

    The score of query ``q`` for a key ``k`` at the distance of entry ``t`` of the table is
    ``((q + content) . k + (q + position) . table[t] + score[t]) / sqrt(D)``.
    Every field may be None, which leaves it out. Without a table the position bias has no effect and no gradient, and
    the distances are those of ``score``.
    """

    content: Optional[Tensor] = None  # [H, D]
    position: Optional[Tensor] = None  # [H, D]
    table: Optional[Tensor] = None  # [H, U, D]
    score: Optional[Tensor] = None  # [H, U]


class Attended(NamedTuple):
    """The read-out of an attention and the normaliser of its softmax."""

    output: Tensor  # [B, H, Q, D]
    normalizer: Tensor  # [B, H, Q], logsumexp of the scores, float32 or wider
