"""Position encodings by name."""

from . import absolute, shaw, sinusoidal  # noqa: F401  (each registers itself)
from .base import POSITIONS, LayerBias, PositionConfig, PositionEncoding

__all__ = ["POSITIONS", "LayerBias", "PositionConfig", "PositionEncoding"]
