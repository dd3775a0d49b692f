"""Attention backends by name.

A backend offers ``causal_attention``, ``lookahead_attention`` and ``memory_attention``, as `eager.py` describes them.
"""

from ..registry import Registry
from . import eager
from .choice import Choice, fused_or_eager, fused_or_error
from .rotation import Rotation
from .types import Attended, Backend, LookaheadWindow, RelativeBias

BACKENDS: Registry[Backend] = Registry("attention backend")
BACKENDS.register("eager")(eager)
BACKENDS.register("fused")(Choice(fused_or_error))
BACKENDS.register("auto")(Choice(fused_or_eager))

__all__ = ["BACKENDS", "Attended", "Backend", "LookaheadWindow", "RelativeBias", "Rotation"]
