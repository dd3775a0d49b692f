"""The modules and parameters inside a module, walked through once: a walk takes as long as many launches."""

from itertools import chain, count
from operator import is_
from typing import Dict, List, Mapping, NamedTuple, Tuple, Type, TypeGuard, TypeVar, cast

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_plain(module: object, kind: Type[Kind]) -> TypeGuard[Kind]:
    """Return whether a call of *module* runs only the code of *kind*: no subclass, no hook, no `forward` of its own.

    Only then may its parameters be read in place of the call. (Global hooks do not count.)
    """
    if type(module) is not kind:
        return False
    assert isinstance(module, nn.Module)
    # Spelled out, as every layer asks this several times in every pass.
    before, after = module._forward_pre_hooks, module._forward_hooks
    return not (before or after or module._backward_pre_hooks or module._backward_hooks or "forward" in vars(module))


def is_product(module: object) -> bool:
    """Return whether calling *module* is a product with its weight."""
    return is_plain(module, nn.Linear) and module.bias is None


_NUMBERS = count()


class Signature(NamedTuple):
    """All that a recorded call of a module depends on."""

    number: int  # number of the walk
    parameters: List[Tuple[int, bool]]  # address, and whether it is trained
    training: List[bool]
    dropouts: List[float]
    hooked: bool


class ModuleTree:
    """Modules and parameters of a module, at all depths, as they were when it was walked through."""

    def __init__(self, module: nn.Module):
        self.number = next(_NUMBERS)
        modules = list(module.modules())
        self.inner = modules[1:]  # without the module, which would otherwise wait for the garbage collector
        self.parameters: List[nn.Parameter] = list(module.parameters())  # as fairseq's optimizer collects them
        tables = [table for inner in modules for table in (inner._modules, inner._parameters)]
        self._tables = cast(List[Dict[str, object]], tables)
        self._entries = self._now()
        self._hooks: List[Mapping[int, object]] = [getattr(inner, hooks) for inner in modules for hooks in HOOKS]
        self._dropouts = [inner for inner in self.inner if isinstance(inner, nn.modules.dropout._DropoutNd)]

    def __reduce__(self) -> Tuple[object, ...]:
        return (type(None), ())  # a copied or stored module is walked through anew

    @property
    def unchanged(self) -> bool:
        """Return whether the module still has these modules and parameters, and no others."""
        now = self._now()
        return len(now) == len(self._entries) and all(map(is_, now, self._entries))

    @property
    def hooked(self) -> bool:
        """Return whether a call would call a hook of any module."""
        return any(self._hooks)

    def signature(self) -> "Signature":
        """Return the state that a recorded call depends on. A parameter that moved would be read at its old address."""
        return Signature(
            self.number,
            [(p.data_ptr(), p.requires_grad) for p in self.parameters],
            [inner.training for inner in self.inner],
            [dropout.p for dropout in self._dropouts],
            self.hooked,
        )

    def _now(self) -> List[object]:
        return list(chain.from_iterable(map(dict.values, self._tables)))


def tree_of(module: nn.Module) -> ModuleTree:
    """Return the tree of a module as it is now; a walk is repeated only if modules or parameters were replaced."""
    walked = vars(module).get("_module_tree")
    if not isinstance(walked, ModuleTree) or not walked.unchanged:
        walked = vars(module)["_module_tree"] = ModuleTree(module)
    return walked
