"""The parameters of a module, again and again."""

from typing import List
from weakref import WeakKeyDictionary

from torch import nn

_FOUND: "WeakKeyDictionary[nn.Module, List[nn.Parameter]]" = WeakKeyDictionary()


def parameters_of(module: nn.Module) -> List[nn.Parameter]:
    """Collected once, as fairseq's optimizer does: walking through all modules takes as long as many launches."""
    if module not in _FOUND:
        _FOUND[module] = list(module.parameters())
    return _FOUND[module]
