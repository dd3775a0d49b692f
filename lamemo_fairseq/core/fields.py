"""Fields of configurations, with the text and the choices that a host shows for them."""

import dataclasses
from typing import Any, Iterable, Mapping, Optional, TypeVar

T = TypeVar("T")
Values = Mapping[str, Any]  # of fields by name, as JSON has them; a configuration checks what it needs


def option(default: T, help: str, choices: Optional[Iterable[str]] = None) -> T:
    """Return a dataclass field that a host can offer as an option, typed as the values that it holds.

    Args:
        default: the value if nothing is passed.
        help: one line for users.
        choices: the possible names; None if the value is not a name.
    """
    metadata = {"help": help} if choices is None else {"help": help, "choices": tuple(choices)}
    return dataclasses.field(default=default, metadata=metadata)
