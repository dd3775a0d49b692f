"""Attention without a mask in plain PyTorch.

Shapes: B streams, H heads, Q queries, K keys, D size of a head.
"""

import torch
from torch import Tensor

from ...attention import Attended, RelativeBias
from ...attention.eager import relative_scores


def unmasked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Attended:
    """Let every query ``[B, H, Q, D]`` attend to all of the keys and values ``[B, H, K, D]``.

    Returns:
        The read-out ``[B, H, Q, D]``, and an empty normaliser.
    """
    weights = relative_scores(q, k, RelativeBias(), 0, scale).softmax(-1)
    return Attended(weights.to(v.dtype) @ v, q.new_empty(0, dtype=torch.float32))
