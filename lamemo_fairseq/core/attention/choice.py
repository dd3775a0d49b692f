"""The backends that users name: `eager`, `fused` or `blocked` or an error, `auto` the fastest that can run, said once.

Shapes: B streams, H heads, Q queries, D size of a head.
"""

import logging
from functools import cache
from typing import Callable, Optional

from torch import Tensor

from ..kernels.rows import has_triton
from . import blocked
from .operation import BACKENDS, Operation, refusal

logger = logging.getLogger(__name__)


@BACKENDS.register("eager")
def _eager(operation: Operation[...], q: Tensor) -> str:
    return "eager"


@BACKENDS.register("fused")
def _fused_or_error(operation: Operation[...], q: Tensor) -> str:
    return _or_error("fused", operation, q, why_not_fused)


@BACKENDS.register("blocked")
def _blocked_or_error(operation: Operation[...], q: Tensor) -> str:
    return _or_error("blocked", operation, q, blocked.why_not)


def _or_error(name: str, operation: Operation[...], q: Tensor, why_not: Callable[[Tensor], Optional[str]]) -> str:
    """Return the name; `Operation` refuses it if it has no such implementation."""
    reason = why_not(q) if operation.has(name) else None
    if reason is not None:
        raise ValueError(refusal(name, reason))
    return name


@BACKENDS.register("auto")
def _fastest(operation: Operation[...], q: Tensor) -> str:
    if q.is_meta:  # a model is made, and its device is not known
        return "eager"
    reason = why_not_fused(q, operation) if q.is_cuda else f"the fused backend is for GPUs, and this is {q.device}"
    otherwise = "eager" if blocked.why_not(q, operation) else "blocked"
    _tell(None if reason is None else f"{otherwise}, as {reason}")
    return "fused" if reason is None else otherwise


def why_not_fused(q: Tensor, operation: Optional[Operation[...]] = None) -> Optional[str]:
    """Return why the fused kernels cannot take queries ``q [B, H, Q, D]`` of an operation, None if they can."""
    if operation is not None and not operation.has("fused"):
        return operation.lacks("fused")
    if not has_triton():
        return "Triton is not installed (pip install triton)"
    from .fused import why_not

    return why_not(q)


@cache
def _tell(other: Optional[str]) -> None:
    logger.info("--attention-backend auto: %s", other or "fused")
