"""Causal attention by the fused kernels, and the inputs that they can take.

Shapes: B streams, H heads, Q queries, K keys, D size of a head.
"""

import os
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bands import causal_band
from ..types import Attended, RelativeBias
from .function import attend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_HEAD = 128


def why_not(q: Tensor) -> Optional[str]:
    """Return why these kernels cannot take queries like ``q [B, H, Q, D]``; None if they can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not q.is_cuda and not (interpreted and q.device.type == "cpu"):
        return f"it runs on GPUs, and this is {q.device}"
    if q.dtype not in DTYPES or (interpreted and q.dtype == torch.bfloat16):
        return f"it has no {q.dtype}"
    if q.size(-1) > LARGEST_HEAD:
        return f"it takes heads up to {LARGEST_HEAD}, and these are {q.size(-1)}"
    return None


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: RelativeBias,
    span: Optional[int] = None,
    dropout: float = 0.0,
    scale: Optional[float] = None,
    need_normalizer: bool = True,
    nearest: int = 0,
) -> Attended:
    """Attend as `eager.causal_attention`; without any bias, by PyTorch's kernel."""
    plain = all(given is None for given in bias) and q.size(2) == k.size(2) and span is None and nearest == 0
    if plain and not need_normalizer:
        output = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
        return Attended(output, q.new_empty(0, dtype=torch.float32))
    band = causal_band(slice(0, q.size(2)), q.size(2), k.size(2), bias, span, nearest)
    return attend(q, k, v, [band], dropout, scale)
