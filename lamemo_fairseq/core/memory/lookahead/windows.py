"""Windows of keys that the slots look ahead at, by name.

Shapes: B streams, N current tokens, m memory slots.
"""

from typing import Callable, Dict, NamedTuple, Optional, Tuple

from torch import Tensor

from ...attention import Attended, RelativeBias
from ...attention.inputs import check_bias, check_dtypes, check_heads, check_shape, check_span


class LookaheadWindow(NamedTuple):
    """The key positions that the memory slots attend to when they look ahead.

    Slots stand at positions 0 .. m-1 and the first current token at m. The keys are the positions ``first .. m``;
    ``both_sides`` lets a slot see those on its left as well. There are as many keys as current tokens, at most
    m. A stream that ends before the others in its batch looks ahead at fewer keys.
    """

    first: int
    both_sides: bool
    lengths: Optional[Tensor] = None  # [B], current tokens that are not padding; None if none is padding

    def distances(self, slots: int) -> range:
        """Return the signed distances ``key - slot`` that *slots* slots meet, masked pairs left out."""
        return range(self.first - (slots - 1) if self.both_sides else 1, slots + 1)


def right_window(slots: int, current: int) -> LookaheadWindow:
    """Return the keys to the right of a slot, without those that it met in earlier segments: the last ``min(m, N)``."""
    return LookaheadWindow(first=slots - min(slots, current) + 1, both_sides=False)


def full_window(slots: int, current: int) -> LookaheadWindow:
    """Return the keys of `right_window`, on both sides of a slot (the paper's ablation)."""
    return LookaheadWindow(first=slots - min(slots, current) + 1, both_sides=True)


WINDOWS: Dict[str, Callable[[int, int], LookaheadWindow]] = {"right": right_window, "full": full_window}


def check_ahead(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: RelativeBias,
    window: LookaheadWindow,
    stored: Attended,
    dropout: float = 0.0,
    scale: Optional[float] = None,
    added: Optional[Tensor] = None,
) -> None:
    """Refuse arguments of `lookahead_attention` that do not fit together.

    Raises:
        ValueError: the message names the argument and what to pass.
    """
    _check_types(window, stored)
    check_heads(q, k, v, keys=q.size(2) - window.first + 1 if q.dim() == 4 else None)
    _check_slots(q, bias, window, stored, q.size(2))
    check_dtypes(q, k, v, {"the bias ahead": bias})
    check_span(None, dropout)


def check_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    biases: Tuple[RelativeBias, RelativeBias],
    window: LookaheadWindow,
    stored: Attended,
    span: Optional[int] = None,
    dropout: float = 0.0,
    scale: Optional[float] = None,
    added: Tuple[Optional[Tensor], Optional[Tensor]] = (None, None),
) -> None:
    """Refuse arguments of `memory_attention` that do not fit together.

    Raises:
        ValueError: the message names the argument and what to pass.
    """
    if isinstance(biases, RelativeBias) or not isinstance(biases, tuple) or len(biases) != 2:
        raise ValueError("biases are no pair: pass the causal RelativeBias and that ahead, RelativeBias() for none")
    causal, ahead = biases
    _check_types(window, stored)
    check_heads(q, k, v, keys=q.size(2) if q.dim() == 4 else None)
    slots = stored.output.size(2) if stored.output.dim() == 4 else -1
    check_bias("the causal bias", causal, q.size(1), q.size(3), q.size(2))
    _check_slots(q, ahead, window, stored, slots)
    check_dtypes(q, k, v, {"the causal bias": causal, "the bias ahead": ahead})
    check_span(span, dropout)
    if slots >= q.size(2):
        raise ValueError(f"there are {slots} stored read-outs and {q.size(2)} rows: pass slots, then current tokens")


def _check_types(window: LookaheadWindow, stored: Attended) -> None:
    if not isinstance(window, LookaheadWindow):
        raise ValueError(f"window is of type {type(window).__name__}: pass WINDOWS[NAME](slots, current tokens)")
    if not isinstance(stored, Attended):
        raise ValueError(
            f"stored is of type {type(stored).__name__}: pass Attended(output, normalizer), of zeros and -inf if slots "
            "have read nothing yet"
        )


def _check_slots(q: Tensor, ahead: RelativeBias, window: LookaheadWindow, stored: Attended, slots: int) -> None:
    batch, heads, _, size = q.shape
    check_shape("the stored output", stored.output, "[B, H, m, D]", [batch, heads, slots, size])
    check_shape("the stored normalizer", stored.normalizer, "[B, H, m]", [batch, heads, slots])
    if not slots:
        raise ValueError("there are no slots to look ahead: pass one or more, or call causal_attention")
    if not 1 <= window.first <= slots:
        raise ValueError(f"the window begins at {window.first}, and there are {slots} slots: make it for these")
    if window.lengths is not None:
        check_shape("the window's lengths", window.lengths, "[B]", [batch])
    check_bias("the bias ahead", ahead, heads, size, len(window.distances(slots)))
