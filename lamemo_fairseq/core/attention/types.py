"""The inputs and results of attention backends, and the functions that a backend offers.

Shapes: B streams, H heads, Q queries, K keys, D size of a head, T distances.
"""

from typing import NamedTuple, Optional, Protocol, Tuple

from torch import Tensor


class RelativeBias(NamedTuple):
    """The scores of one layer for a key by its distance from the query.

    The score of query ``q`` for a key ``k`` at the distance of row ``t`` of the table is
    ``((q + content) . k + (q + position) . table[t] + score[t]) / sqrt(D)``.
    Every part may be None, which leaves it out. Without a table there is nothing that the position bias could be
    multiplied with: it then has no effect and no gradient, and the distances are those of ``score``.
    """

    content: Optional[Tensor] = None  # [H, D]
    position: Optional[Tensor] = None  # [H, D]
    table: Optional[Tensor] = None  # [H, T, D]
    score: Optional[Tensor] = None  # [H, T]


class Attended(NamedTuple):
    """The read-out of an attention and the normaliser of its softmax."""

    output: Tensor  # [B, H, Q, D]
    normalizer: Tensor  # [B, H, Q], logsumexp of the scores, float32 or wider


class LookaheadWindow(NamedTuple):
    """The key positions that the memory slots attend to when they look ahead.

    Slots stand at positions 0 .. m-1 and the first current token at m. The keys are the positions ``first .. m``;
    ``both_sides`` lets a slot see those on its left as well. There are as many keys as current tokens, at most
    m, so that a stream which ends before the others in its batch looks ahead at fewer.
    """

    first: int
    both_sides: bool
    lengths: Optional[Tensor] = None  # [B], current tokens that are not padding; None if none is padding

    def distances(self, slots: int) -> range:
        """The signed distances ``key - slot`` that *slots* slots meet, masked pairs left out."""
        return range(self.first - (slots - 1) if self.both_sides else 1, slots + 1)


class Backend(Protocol):
    """The functions of a backend, a module for one; `eager.py` describes their arguments."""

    def causal_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: RelativeBias,
        span: Optional[int] = None,
        dropout: float = 0.0,
        scale: Optional[float] = None,
        need_normalizer: bool = True,
    ) -> Attended: ...

    def lookahead_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: RelativeBias,
        window: LookaheadWindow,
        stored: Attended,
        dropout: float = 0.0,
        scale: Optional[float] = None,
    ) -> Attended: ...

    def memory_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        biases: Tuple[RelativeBias, RelativeBias],
        window: LookaheadWindow,
        stored: Attended,
        span: Optional[int] = None,
        dropout: float = 0.0,
        scale: Optional[float] = None,
    ) -> Attended: ...
