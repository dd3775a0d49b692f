"""Look-ahead attention by a backend that takes bands: `eager.py` describes the functions.

Shapes: B streams, H heads, K keys, R rows, D size of a head, m memory slots.
"""

from typing import Optional, Protocol, Sequence, Tuple

import torch
from torch import Tensor

from ...attention import Attended, RelativeBias
from ...attention.bands import UNBOUNDED, Band, BandedAttention, causal_band
from . import eager
from .windows import LookaheadWindow


class Attend(Protocol):
    """Attends as each of *attentions* says, whose queries together are ``q [B, H, R, D]``."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attentions: Sequence[BandedAttention],
        dropout: float,
        scale: Optional[float] = None,
    ) -> Attended: ...


def lookahead_attention(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: RelativeBias,
    window: LookaheadWindow,
    stored: Attended,
    dropout: float = 0.0,
    scale: Optional[float] = None,
) -> Attended:
    """Attend as `eager.lookahead_attention` does."""
    return attend(q, k, v, [_ahead(q.size(2), slice(0, k.size(2)), bias, window, stored)], dropout, scale)


def memory_attention(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    biases: Tuple[RelativeBias, RelativeBias],
    window: LookaheadWindow,
    stored: Attended,
    span: Optional[int] = None,
    dropout: float = 0.0,
    scale: Optional[float] = None,
) -> Attended:
    """Attend as `eager.memory_attention` does, without copies."""
    slots, total = stored.output.size(2), q.size(2)
    causal, ahead = biases
    current = causal_band(slice(slots, total), total - slots, total, causal, span)
    look_ahead = _ahead(slots, slice(window.first, slots + 1), ahead, window, stored)
    return attend(q, k, v, [current, look_ahead], dropout, scale)


def _ahead(slots: int, keys: slice, bias: RelativeBias, window: LookaheadWindow, stored: Attended) -> BandedAttention:
    first = None
    if window.lengths is not None:
        first = (slots - window.first + 1 - window.lengths.clamp(min=1)).to(torch.int32)
    low = -UNBOUNDED if window.both_sides else 1 - window.first
    band = Band(low, UNBOUNDED, window.first - window.distances(slots).start)
    return BandedAttention(slice(0, slots), keys, band, bias, first, stored, eager.INTERPOLATION_EPS)
