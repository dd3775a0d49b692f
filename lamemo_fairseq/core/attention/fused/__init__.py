"""Fused attention in Triton: scores, softmax, merge and their gradients without a tensor of weights. See README.md."""

from ..bands import UNBOUNDED, Band, BandedAttention, causal_band
from .api import causal_attention, why_not
from .function import attend

__all__ = ["UNBOUNDED", "Band", "BandedAttention", "attend", "causal_attention", "causal_band", "why_not"]
