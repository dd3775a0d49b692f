"""Names that users write: options, and the nearest known name to a misspelt one."""

import difflib
from typing import Callable, Iterable, Optional


def option_name(field: str) -> str:
    """Return the name on the command line of an option's field."""
    return "--" + field.replace("_", "-")


def did_you_mean(
    name: str, known: Iterable[str], cutoff: float = 0.6, shown: Callable[[str], str] = str
) -> Optional[str]:
    """Return the question that ends a message on an unknown name, None if no known name is near.

    Args:
        name: the unknown name.
        known: the names to choose from.
        cutoff: the least similarity, from 0 to 1.
        shown: formats a known name for the question.
    """
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f"did you mean {' or '.join(map(shown, near))}?" if near else None
