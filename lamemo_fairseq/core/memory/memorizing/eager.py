"""Attention to a store and a segment in plain PyTorch.

Shapes: B streams, H heads, N current tokens, m stored rows, D size of a head, D' its padded size.
"""

from typing import Optional

import torch
from torch import Tensor

from ...attention import Attended, RelativeBias
from ...attention.eager import causal_attention
from ...attention.padding import as_wide


def store_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stored_k: Tensor,
    stored_v: Tensor,
    dropout: float = 0.0,
    scale: Optional[float] = None,
) -> Attended:
    """Let the tokens of a segment attend to all stored rows, and to each other causally, by one softmax.

    Args:
        q, k, v: ``[B, H, N, D or D']``.
        stored_k, stored_v: ``[B, H, m, D]``, which get no gradient.
        dropout: probability of dropping an attention weight.
        scale: of the scores; None is ``1 / sqrt(D)``.

    Returns:
        The read-out, in the shape of *q*, and an empty normaliser.
    """
    k, v = (torch.cat([as_wide(q, old).to(q), new], dim=2) for old, new in ((stored_k, k), (stored_v, v)))
    return causal_attention(q, k, v, RelativeBias(), None, dropout, scale, need_normalizer=False)
