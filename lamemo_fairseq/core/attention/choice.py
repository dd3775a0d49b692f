"""The backends that users name: `eager`, `fused` or an error, `auto` whichever can run, said once.

Shapes: B streams, H heads, Q queries, D size of a head.
"""

import importlib.util
import logging
from functools import cache
from typing import Optional

from torch import Tensor

from .operation import BACKENDS, Operation

logger = logging.getLogger(__name__)


@BACKENDS.register("eager")
def _eager(operation: Operation[...], q: Tensor) -> str:
    return "eager"


@BACKENDS.register("fused")
def _fused_or_error(operation: Operation[...], q: Tensor) -> str:
    reason = why_not_fused(q, operation)
    if reason is not None:
        raise ValueError(
            f"--attention-backend fused cannot run here: {reason}; pass --attention-backend auto or eager, "
            "for a trained model --model-overrides \"{'attention_backend': 'auto'}\""
        )
    return "fused"


@BACKENDS.register("auto")
def _fused_or_eager(operation: Operation[...], q: Tensor) -> str:
    reason = why_not_fused(q, operation) if q.is_cuda else f"the fused backend is for GPUs, and this is {q.device}"
    _tell(reason)
    return "eager" if reason is not None else "fused"


def why_not_fused(q: Tensor, operation: Optional[Operation[...]] = None) -> Optional[str]:
    """Return why the fused kernels cannot take queries ``q [B, H, Q, D]`` of an operation, None if they can."""
    if operation is not None and not operation.has("fused"):
        return f"{operation.name} has no fused implementation"
    if not _has_triton():
        return "Triton is not installed (pip install triton)"
    from .fused import why_not

    return why_not(q)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _tell(reason: Optional[str]) -> None:
    logger.info("--attention-backend auto: %s", "fused" if reason is None else f"eager, as {reason}")
