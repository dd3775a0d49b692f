"""Backends by name, as the options mean them: `fused` or an error, `auto` whichever can run, said once."""

import importlib.util
import logging
from functools import cache
from typing import Any, Callable, Optional

from torch import Tensor

from . import eager
from .types import Attended, Backend

logger = logging.getLogger(__name__)


class Choice:
    """A backend that looks at the queries and hands the call on. Its functions are those of `eager`."""

    def __init__(self, choose: Callable[[Tensor], Backend]):
        self._choose = choose

    def causal_attention(self, q: Tensor, *args: Any, **kwargs: Any) -> Attended:
        return self._choose(q).causal_attention(q, *args, **kwargs)

    def lookahead_attention(self, q: Tensor, *args: Any, **kwargs: Any) -> Attended:
        return self._choose(q).lookahead_attention(q, *args, **kwargs)

    def memory_attention(self, q: Tensor, *args: Any, **kwargs: Any) -> Attended:
        return self._choose(q).memory_attention(q, *args, **kwargs)


def fused_or_error(q: Tensor) -> Backend:
    """Return the fused backend.

    Raises:
        ValueError: it cannot take these queries.
    """
    reason = why_not_fused(q)
    if reason is not None:
        raise ValueError(
            f"--attention-backend fused cannot run here: {reason}; pass --attention-backend auto or eager, "
            "for a trained model --model-overrides \"{'attention_backend': 'auto'}\""
        )
    return _fused()


def fused_or_eager(q: Tensor) -> Backend:
    """Return the fused backend where it can run, else the eager one."""
    reason = why_not_fused(q) if q.is_cuda else f"the fused backend is for GPUs, and this is {q.device}"
    _tell(reason)
    return eager if reason is not None else _fused()


def why_not_fused(q: Tensor) -> Optional[str]:
    """Return why the fused backend cannot take queries ``q [B, H, Q, D]``, None if it can."""
    if not _has_triton():
        return "Triton is not installed (pip install triton)"
    from .fused import why_not

    return why_not(q)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _fused() -> Backend:
    from . import fused

    return fused


@cache
def _tell(reason: Optional[str]) -> None:
    logger.info("--attention-backend auto: %s", "fused" if reason is None else f"eager, as {reason}")
