"""Attention with a bias on its scores, by backends that compute the same.

`causal_attention` is an operation: its first argument names the backend, and `eager.py` describes the others.
"""

from types import ModuleType

from . import blocked, choice, eager
from .counted import Counted
from .operation import BACKENDS, Backend, Operation
from .rotation import Rotation
from .types import Attended, RelativeBias


def _fused() -> ModuleType:
    from . import fused

    return fused


causal_attention = Operation("causal attention", eager.causal_attention, _fused, blocked.causal_attention)
# This variant adds further scores for each pair.
counted_attention = Operation("attention by distances counted in the text", eager.causal_attention)

__all__ = [
    "BACKENDS",
    "Attended",
    "Backend",
    "Counted",
    "Operation",
    "RelativeBias",
    "Rotation",
    "causal_attention",
    "choice",
    "counted_attention",
]
