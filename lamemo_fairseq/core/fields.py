"""Fields of configurations, with the text and the choices that a host shows for them."""

import dataclasses
from typing import Any, Iterable, Optional


def option(default: Any, help: str, choices: Optional[Iterable[str]] = None) -> Any:
    """Return a dataclass field that a host can offer as an option.

    Args:
        default: the value if nothing is passed.
        help: one line for users.
        choices: the names that the value is one of; None if it is no name.
    """
    metadata = {"help": help} if choices is None else {"help": help, "choices": tuple(choices)}
    return dataclasses.field(default=default, metadata=metadata)
