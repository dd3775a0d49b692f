"""Fused attention in Triton: scores, softmax, merge and their gradients without a tensor of weights. See README.md."""

from .api import causal_attention, causal_band, why_not
from .function import BandedAttention, attend
from .launch import UNBOUNDED, Band

__all__ = ["UNBOUNDED", "Band", "BandedAttention", "attend", "causal_attention", "causal_band", "why_not"]
