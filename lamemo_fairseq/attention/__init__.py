"""Attention backends by name. A backend offers ``causal_attention`` and ``lookahead_attention``."""

from types import ModuleType

from ..registry import Registry
from . import eager
from .types import Attended, LookaheadWindow, RelativeBias

BACKENDS: Registry[ModuleType] = Registry("attention backend")
BACKENDS.register("eager")(eager)
# A fused backend registers here; `auto` then prefers it where it can run.
BACKENDS.register("auto")(eager)

__all__ = ["BACKENDS", "Attended", "LookaheadWindow", "RelativeBias"]
