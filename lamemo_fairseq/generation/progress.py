"""A counter on the terminal while something long is generated or read."""

import os
import sys
from typing import Any, Dict

from tqdm import tqdm


def counter(total: int, what: str) -> tqdm:
    """Count tokens on the standard error stream after two seconds, rarely where the stream is a file."""
    every = 0.2 if sys.stderr.isatty() else 10.0
    shown: Dict[str, Any] = {"desc": what, "unit": " tokens", "leave": False, "file": sys.stderr, **_size()}
    return tqdm(total=total, delay=2, mininterval=every, **shown)


def _size() -> Dict[str, int]:
    """Return a size for a terminal that reports 0 columns, where tqdm would show nothing; tqdm asks any other."""
    try:
        known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):  # no terminal
        known = True
    return {} if known else {"ncols": 80, "nrows": 24}
