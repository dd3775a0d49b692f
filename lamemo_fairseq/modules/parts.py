"""Parts of a module, collected once: walking through all modules takes as long as many launches."""

from typing import Any, Dict, List, Type, TypeGuard, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

_PARAMETERS: "WeakKeyDictionary[nn.Module, List[nn.Parameter]]" = WeakKeyDictionary()
_HOOKS: "WeakKeyDictionary[nn.Module, List[Dict[int, Any]]]" = WeakKeyDictionary()


def parameters_of(module: nn.Module) -> List[nn.Parameter]:
    """All parameters, as fairseq's optimizer collects them."""
    if module not in _PARAMETERS:
        _PARAMETERS[module] = list(module.parameters())
    return _PARAMETERS[module]


Kind = TypeVar("Kind", bound=nn.Module)


def is_plain(module: Any, kind: Type[Kind]) -> TypeGuard[Kind]:
    """Whether calling *module* does what *kind* does and nothing else: neither a subclass of it nor one with hooks.

    Only then may its parameters be read in place of the call.
    """
    if type(module) is not kind:
        return False
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a call would call a hook, of any module in it."""
    if module not in _HOOKS:
        kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        _HOOKS[module] = [getattr(part, kind) for part in module.modules() for kind in kinds]
    return any(_HOOKS[module])
