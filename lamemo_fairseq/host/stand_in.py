"""Putting a function in the place of one of fairseq's."""

import functools
from typing import Any, Callable


def stand_in(owner: Any, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function takes the place of ``owner.name``, and gets what was there as its first argument.

    *owner* is a module or a class.
    """
    original = getattr(owner, name)

    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def stands_in(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        setattr(owner, name, stands_in)
        return stands_in

    return put
