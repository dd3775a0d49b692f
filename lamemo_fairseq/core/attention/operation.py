"""Functions of attention that have an implementation by backend.

Shapes: B streams, H heads, Q queries, D size of a head.
"""

from types import ModuleType
from typing import Callable, Concatenate, Dict, Generic, Optional, ParamSpec

import torch
from torch import Tensor

from ..registry import Registry
from .types import Attended

P = ParamSpec("P")


class LackingError(ValueError):
    """A backend has no implementation of an operation, whatever the queries are."""


def refusal(backend: str, reason: str) -> str:
    """Return the message that refuses a backend for a reason, with the remedy."""
    return (
        f"--attention-backend {backend} cannot run here: {reason}; pass --attention-backend auto or eager, "
        "for a trained model --model-overrides \"{'attention_backend': 'auto'}\""
    )


class Operation(Generic[P]):
    """A function of attention: of queries ``[B, H, Q, D]`` and other arguments.

    Its implementations compute the same. The backend that a call names chooses an implementation, by the queries.

    Args:
        name: stands in errors.
        eager: the reference, in plain PyTorch.
        fused: imports and returns the module of the fused implementation, a function of the same name. It is called
            when the fused kernels are to run, so that nothing else needs Triton.
        blocked: the implementation for CPUs.
        check: refuses arguments, by a ValueError; kernels read what they are told to.
    """

    def __init__(
        self,
        name: str,
        eager: Callable[Concatenate[Tensor, P], Attended],
        fused: Optional[Callable[[], ModuleType]] = None,
        blocked: Optional[Callable[..., Attended]] = None,
        check: Optional[Callable[Concatenate[Tensor, P], None]] = None,
    ):
        self.name, self.__doc__, self._check = name, eager.__doc__, check
        self._implementations: Dict[str, Callable[Concatenate[Tensor, P], Attended]] = {"eager": eager}
        if blocked is not None:
            self._implementations["blocked"] = blocked
        if fused is not None:

            def imported(q: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Attended:
                attended: Attended = getattr(fused(), eager.__name__)(q, *args, **kwargs)
                return attended

            self._implementations["fused"] = imported

    def __call__(self, backend: str, q: Tensor, *args: P.args, **kwargs: P.kwargs) -> Attended:
        """Call the implementation that *backend*, a name of `BACKENDS`, chooses.

        Raises:
            LackingError: the backend does not implement this operation.
            ValueError: the backend is unknown, or cannot take these queries; or arguments do not fit together.
        """
        if self._check is not None:
            self._check(q, *args, **kwargs)
        return self._implementations[self._chosen(backend, q)](q, *args, **kwargs)

    def check(self, backend: str) -> None:
        """Refuse a backend without an implementation of this operation, while a model is made.

        The backend is asked with queries on the meta device. If it refuses these, it is left to judge the real ones.

        Raises:
            LackingError: as for a call.
        """
        try:
            self._chosen(backend, torch.empty(1, 1, 1, 1, device="meta"))
        except LackingError:
            raise
        except (ValueError, RuntimeError):
            return

    def _chosen(self, backend: str, q: Tensor) -> str:
        name = BACKENDS[backend](self, q)
        if not self.has(name):
            raise LackingError(refusal(backend, self.lacks(name)))
        return name

    def lacks(self, implementation: str) -> str:
        """Return the reason why a backend without this implementation is refused."""
        return f"{self.name} has no {implementation} implementation"

    def has(self, implementation: str) -> bool:
        """Tell whether an implementation of this name is registered."""
        return implementation in self._implementations

    def register(self, name: str, implementation: Callable[Concatenate[Tensor, P], Attended]) -> None:
        """Add an implementation.

        Raises:
            ValueError: the name is taken.
        """
        if self.has(name):
            raise ValueError(f"{self.name} has an implementation '{name}' already")
        self._implementations[name] = implementation


# From an operation and its queries to the name of an implementation.
Backend = Callable[[Operation[...], Tensor], str]
BACKENDS: Registry[Backend] = Registry(
    "attention backend",
    own="one of your own goes into lamemo_fairseq/core/attention, and attention_backend='auto' takes a known one",
)
