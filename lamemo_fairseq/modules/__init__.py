"""Building blocks that all memories share."""

from .attention import AttentionConfig, SelfAttention
from .layer import DecoderLayer, LayerConfig

__all__ = ["AttentionConfig", "DecoderLayer", "LayerConfig", "SelfAttention"]
