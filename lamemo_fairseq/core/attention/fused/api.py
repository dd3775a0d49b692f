"""The public functions of the fused backend: `attention/eager.py` says what they compute."""

import os
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Attended, LookaheadWindow, RelativeBias
from .function import Part, attend
from .launch import UNBOUNDED, Band

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_HEAD = 128


def why_not(q: Tensor) -> Optional[str]:
    """Why these kernels cannot take queries like ``q [B, H, Q, D]``; None if they can."""
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
) -> Attended:
    """As `eager.causal_attention`; where a bias has no part, PyTorch's kernel serves."""
    if all(part is None for part in bias) and q.size(2) == k.size(2) and span is None and not need_normalizer:
        output = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
        return Attended(output, q.new_empty(0, dtype=torch.float32))
    part = _causal(slice(0, q.size(2)), q.size(2), k.size(2), bias, span)
    return attend(q, k, v, [part], dropout, scale)


def lookahead_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: RelativeBias,
    window: LookaheadWindow,
    stored: Attended,
    dropout: float = 0.0,
    scale: Optional[float] = None,
) -> Attended:
    """As `eager.lookahead_attention`."""
    return attend(q, k, v, [_ahead(q.size(2), slice(0, k.size(2)), bias, window, stored)], dropout, scale)


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
) -> Attended:
    """As `eager.memory_attention`, without a copy of any of its rows."""
    slots, rows = stored.output.size(2), q.size(2)
    causal, ahead = biases
    current = _causal(slice(slots, rows), rows - slots, rows, causal, span)
    look_ahead = _ahead(slots, slice(window.first, slots + 1), ahead, window, stored)
    return attend(q, k, v, [current, look_ahead], dropout, scale)


def _causal(rows: slice, queries: int, keys: int, bias: RelativeBias, span: Optional[int]) -> Part:
    past = keys - queries  # of query 0
    band = Band(-UNBOUNDED if span is None else past - span + 1, past, queries - 1)
    return Part(rows, slice(0, keys), band, bias)


def _ahead(slots: int, keys: slice, bias: RelativeBias, window: LookaheadWindow, stored: Attended) -> Part:
    first = None
    if window.lengths is not None:
        first = (slots - window.first + 1 - window.lengths.clamp(min=1)).to(torch.int32)
    low = -UNBOUNDED if window.both_sides else 1 - window.first
    band = Band(low, UNBOUNDED, window.first - window.distances(slots).start)
    return Part(slice(0, slots), keys, band, bias, first, stored)
