"""A counter on the terminal while something long is generated or read."""

import sys

from tqdm import tqdm


def counter(total: int, what: str) -> tqdm:
    """Counts tokens on the standard error stream once two seconds have passed, rarely where that is a file."""
    every = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=what, unit=" tokens", delay=2, mininterval=every, leave=False, file=sys.stderr)
