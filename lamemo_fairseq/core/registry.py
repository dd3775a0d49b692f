"""Names to classes, with an error that lists the known names."""

from typing import Callable, Dict, Generic, List, Optional, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named variants, filled by a decorator.

    Args:
        what: the kind of variant, for errors.
        check: raises a ValueError for an entry that must not be registered.
        own: ends the error on an unknown name: how a variant of the user's own becomes known.
    """

    def __init__(self, what: str, check: Optional[Callable[[T], None]] = None, own: str = ""):
        self.what, self.own, self._check = what, own, check
        self._entries: Dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its object under *name*.

        Raises:
            ValueError: the name is taken, or the entry must not be registered.
        """

        def add(entry: T) -> T:
            if name in self._entries:
                first, second = _origin(self._entries[name]), _origin(entry)
                raise ValueError(
                    f"{self.what} '{name}' is registered already: {first} and {second} have the same name, give one of "
                    "them another, or remove its file"
                )
            try:
                if self._check is not None:
                    self._check(entry)
            except ValueError as error:
                raise ValueError(f"{self.what} '{name}': {error}") from None
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> List[str]:
        """Return all names in alphabetical order."""
        return sorted(self._entries)

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            known = ", ".join(self.names())
            own = f"; {self.own}" if self.own else ""
            raise ValueError(f"unknown {self.what} '{name}'; the known ones are {known}{own}")
        return self._entries[name]


def _origin(entry: object) -> str:
    """Return where an entry comes from: its name, after that of its module."""
    return f"{getattr(entry, '__module__', '')}.{getattr(entry, '__qualname__', repr(entry))}".lstrip(".")
