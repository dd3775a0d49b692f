"""Attention with a bias on its scores, by backends that compute the same.

`causal_attention` is an operation: its first argument names the backend, and `eager.py` describes the others. Modules
of this folder are imported automatically, so that a backend in one registers itself. Folders, such as `fused`, are not:
kernels are imported when they run.
"""

import importlib
import pkgutil
from types import ModuleType

from . import blocked, choice, eager
from .counted import Counted
from .inputs import check_causal
from .operation import BACKENDS, Backend, Operation
from .rotation import Rotation
from .types import Attended, RelativeBias


def _fused() -> ModuleType:
    from . import fused

    return fused


causal_attention = Operation("causal attention", eager.causal_attention, _fused, blocked.causal_attention, check_causal)
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

for _module in pkgutil.iter_modules(__path__):
    if not _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")
