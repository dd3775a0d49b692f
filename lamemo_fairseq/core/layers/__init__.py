"""Building blocks that all memories share."""

from .layer import DecoderLayer, LayerConfig
from .self_attention import AttentionConfig, SelfAttention

__all__ = ["AttentionConfig", "DecoderLayer", "LayerConfig", "SelfAttention"]
