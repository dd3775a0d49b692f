"""Fields of configurations, with the text and the choices that a host shows for them."""

import dataclasses
import inspect
from typing import Any, Dict, Iterable, Mapping, Optional, Set, TypeVar

T = TypeVar("T")
Values = Mapping[str, Any]  # of fields by name, as JSON has them; a configuration checks what it needs


def option(default: T, help: str, choices: Optional[Iterable[str]] = None, fixed: bool = False) -> T:
    """Return a dataclass field that a host can offer as an option, typed as the values that it holds.

    Args:
        default: the value if nothing is passed.
        help: one line for users.
        choices: the possible names; None if the value is not a name.
        fixed: whether another value makes another function of weights that still fit, so that no training goes on with
            it. Lengths that a model may be read with are not fixed.
    """
    metadata: Dict[str, object] = {"help": help, "fixed": fixed}
    if choices is not None:
        metadata["choices"] = tuple(choices)
    return dataclasses.field(default=default, metadata=metadata)


def fixed_options(config: type) -> Set[str]:
    """Return the names of a dataclass's `option`s that are fixed."""
    return {field.name for field in dataclasses.fields(config) if field.metadata.get("fixed")}


def check_options(config: type) -> None:
    """Refuse a dataclass with fields that a host would not offer as options.

    Raises:
        ValueError: a field is not made by `option`, or its type cannot be read; the message names it and the remedy.
    """
    if "__dataclass_fields__" not in vars(config) and inspect.get_annotations(config):
        raise ValueError(f"{config.__name__} has fields and is no dataclass: write @dataclass(frozen=True) above it")
    for field in dataclasses.fields(config):
        name = f"{config.__name__}.{field.name}"
        if "help" not in field.metadata:
            raise ValueError(
                f"{name} would not be an option: write {field.name}: TYPE = option(DEFAULT, 'one line of help'), "
                f"with option from {__name__}"
            )
        if isinstance(field.type, str):
            raise ValueError(
                f"{name} has a type that no host can read: leave out from __future__ import annotations, and quotes"
            )
