"""Attention with a bias on its scores, by backends that compute the same.

`causal_attention` is an operation: its first argument names the backend, and `eager.py` describes the others.
"""

from types import ModuleType

from . import choice, eager
from .operation import BACKENDS, Backend, Operation
from .rotation import Rotation
from .types import Attended, RelativeBias


def _fused() -> ModuleType:
    from . import fused

    return fused


causal_attention = Operation("causal attention", eager.causal_attention, _fused)

__all__ = ["BACKENDS", "Attended", "Backend", "Operation", "RelativeBias", "Rotation", "causal_attention", "choice"]
