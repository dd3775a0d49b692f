"""Fused attention in Triton: scores, softmax, merge and their gradients without a tensor of weights. See README.md."""

from .api import causal_attention, lookahead_attention, memory_attention, why_not

__all__ = ["causal_attention", "lookahead_attention", "memory_attention", "why_not"]
