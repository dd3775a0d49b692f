"""Fields of configurations, with the text and the choices that a host shows for them."""

import dataclasses
import inspect
from typing import Any, Dict, Iterable, Iterator, Mapping, Optional, Set, TypeVar

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


def check_options(config: Any, base: Any) -> None:
    """Refuse a dataclass with fields that a host would not offer as options.

    Raises:
        ValueError: it does not extend *base*, a field is not made by `option`, or its type cannot be read; the message
            names it and the remedy.
    """
    if not (isinstance(config, type) and issubclass(config, base)):
        name = getattr(config, "__name__", f"of type {type(config).__name__}")
        raise ValueError(f"options is {name}: name a class that extends {base.__name__}")
    if "__dataclass_fields__" not in vars(config) and inspect.get_annotations(config):
        raise ValueError(f"{config.__name__} has fields and is no dataclass: write @dataclass(frozen=True) above it")
    for name in (*_untyped(config), *(f.name for f in dataclasses.fields(config) if "help" not in f.metadata)):
        raise ValueError(
            f"{config.__name__}.{name} would not be an option: write {name}: TYPE = option(DEFAULT, 'one line of "
            f"help'), with option from {__name__}"
        )
    for field in dataclasses.fields(config):
        if isinstance(field.type, str):
            raise ValueError(
                f"{config.__name__}.{field.name} has a type that no host can read: leave out from __future__ import "
                "annotations, and quotes"
            )


def _untyped(config: type) -> Iterator[str]:
    """Yield the public names of plain values without a type, as of ``limit = 3``, which dataclasses pass over."""
    for cls in config.__mro__:
        for name in vars(cls).keys() - inspect.get_annotations(cls).keys():
            value = vars(cls)[name]
            if not (name.startswith("_") or callable(value) or hasattr(value, "__get__")):
                yield name
