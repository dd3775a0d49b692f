"""Position encodings by name, found automatically: one module or folder each, which registers itself."""

import importlib
import pkgutil

from .base import POSITIONS, PositionEncoding, Positions
from .bias import LayerBias, PositionConfig

__all__ = ["POSITIONS", "LayerBias", "PositionConfig", "PositionEncoding", "Positions"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
