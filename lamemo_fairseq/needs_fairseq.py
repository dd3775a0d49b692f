"""Imported first by the packages that need fairseq: the error says how to install it, and which part works without."""

import importlib.util
import sys
from types import TracebackType
from typing import Any, Optional, Type

_WHEEL = "pip install ve-fairseq"
_SOURCE = "pip install cython wheel, then pip install --no-build-isolation fairseq-fixed (compiles for some minutes)"
BUILDS = {(3, 10): _SOURCE, (3, 11): _WHEEL, (3, 12): _WHEEL, (3, 13): _SOURCE}


class MissingFairseqError(ModuleNotFoundError):
    """fairseq is not installed. A process that this error ends prints its message alone."""


def _print(
    kind: Type[BaseException], error: BaseException, raised: Optional[TracebackType], otherwise: Any = sys.excepthook
) -> None:
    if isinstance(error, MissingFairseqError):
        print(error, file=sys.stderr)
    else:
        otherwise(kind, error, raised)


if importlib.util.find_spec("fairseq") is None:
    _version = sys.version_info[:2]
    _remedy = BUILDS.get(_version, f"no build is known for Python {_version[0]}.{_version[1]}, take 3.10 to 3.13")
    sys.excepthook = _print
    raise MissingFairseqError(
        f"fairseq is not installed: {_remedy}; lamemo_fairseq.core needs torch alone and works without", name="fairseq"
    )
