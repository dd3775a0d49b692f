"""Look-ahead attention in plain PyTorch: the reference of `fused.py`, and the path for CPUs.

Shapes: B streams, H heads, K keys, R rows, D size of a head, m memory slots.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention import Attended, RelativeBias
from ...attention.eager import causal_attention, hide, relative_scores, softmax_and_normalizer
from .windows import LookaheadWindow

# Keeps the mixing weight finite in the released model; it is a term of the model's formula.
INTERPOLATION_EPS = 1e-6


def lookahead_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: RelativeBias,
    window: LookaheadWindow,
    stored: Attended,
    dropout: float = 0.0,
    scale: Optional[float] = None,
    added: Optional[Tensor] = None,
) -> Attended:
    """Let memory slots attend to later positions, and merge the result into their stored read-outs.

    ``c`` and ``l`` are the read-out and the normaliser over the window, ``o`` and ``d`` the stored ones:
    ``alpha = e^d / (e^d + e^l + eps)`` and ``o <- alpha o + (1 - alpha) c`` (LaMemo, section 3.2).

    Args:
        q: ``[B, H, m, D]``, the slots.
        k, v: ``[B, H, K, D]``, the positions ``window.first .. m``.
        bias: its table holds ``window.distances(m)``, in this order.
        stored: the slots' read-outs ``[B, H, m, D]`` and normalisers ``[B, H, m]``, without gradient.
        dropout: probability of dropping an attention weight.
        scale: as for `causal_attention`.
        added: further scores ``[B, H, m, K]``, scaled already.

    Returns:
        The merged read-outs and normalisers.
    """
    slots, keys = q.size(-2), k.size(-2)
    scores = relative_scores(q, k, bias, window.first - window.distances(slots).start, scale)
    if added is not None:
        scores = scores + added
    position = window.first + torch.arange(keys, device=q.device)
    if not window.both_sides:
        scores = hide(scores, position <= torch.arange(slots, device=q.device).unsqueeze(1))
    if window.lengths is not None:
        # The first current token stays visible, also to a stream that has ended and whose rows do not matter.
        ended = position <= slots - window.lengths.clamp(min=1).unsqueeze(1)
        scores = hide(scores, ended[:, None, None])
    weights, normalizer = softmax_and_normalizer(scores)
    return merge(stored, Attended(F.dropout(weights, dropout).to(v.dtype) @ v, normalizer))


def memory_attention(
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
) -> Attended:
    """Let slots look ahead and current tokens attend to everything before them, in one call.

    Args:
        q, k, v: ``[B, H, R, D]``, m slots and then the current tokens.
        biases: the biases of the causal attention and of the look-ahead.
        window, stored: as for `lookahead_attention`.
        span, dropout, scale: as for `causal_attention`.
        added: further scores of the current tokens and of the slots, as for both functions.

    Returns:
        Read-outs ``[B, H, R, D]`` and normalisers ``[B, H, R]``, the slots' ones merged.
    """
    slots = stored.output.size(2)
    causal, ahead = biases
    keys = slice(window.first, slots + 1)
    q_slots, q_current = q.split([slots, q.size(2) - slots], dim=2)
    to_current, to_slots = added
    refreshed = lookahead_attention(
        q_slots, k[:, :, keys], v[:, :, keys], ahead, window, stored, dropout, scale, to_slots
    )
    current = causal_attention(q_current, k, v, causal, span, dropout, scale, added=to_current)
    return Attended(*(torch.cat(pair, dim=2) for pair in zip(refreshed, current, strict=True)))


def merge(stored: Attended, new: Attended) -> Attended:
    """Interpolate stored read-outs ``[B, H, m, D]`` with new ones, by the share of each in the common softmax.

    The eps is added after both normalisers were reduced by their maximum, so the maximum has a gradient as well.
    It goes to the new normaliser where both are equal, as in the released code.
    """
    top = torch.where(new.normalizer >= stored.normalizer, new.normalizer, stored.normalizer)
    weight_stored = (stored.normalizer - top).exp()
    weight_new = (new.normalizer - top).exp()
    alpha = (weight_stored / (weight_stored + weight_new + INTERPOLATION_EPS)).unsqueeze(-1)
    output = (alpha * stored.output + (1 - alpha) * new.output).to(new.output.dtype)
    return Attended(output, torch.logaddexp(stored.normalizer, new.normalizer.detach()))
