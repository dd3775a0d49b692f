"""Building blocks that all memories share."""

from .layer import DecoderLayer, LayerConfig
from .self_attention import AttentionConfig, CausalSelfAttention, SelfAttention

__all__ = ["AttentionConfig", "CausalSelfAttention", "DecoderLayer", "LayerConfig", "SelfAttention"]
