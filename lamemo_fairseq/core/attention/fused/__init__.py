"""Fused attention in Triton: scores, softmax, merge and their gradients without a tensor of weights. See README.md."""

from .api import causal_attention, causal_part, why_not
from .function import Part, attend
from .launch import UNBOUNDED, Band

__all__ = ["UNBOUNDED", "Band", "Part", "attend", "causal_attention", "causal_part", "why_not"]
