"""Names to classes, with an error that lists the known names."""

from typing import Callable, Dict, Generic, List, Optional, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named variants, filled by a decorator.

    Args:
        what: the kind of variant, for errors.
        check: raises a ValueError for an entry that must not be registered.
    """

    def __init__(self, what: str, check: Optional[Callable[[T], None]] = None):
        self.what, self._check = what, check
        self._entries: Dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its object under *name*.

        Raises:
            ValueError: the name is taken, or the entry must not be registered.
        """

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.what} '{name}' is registered already")
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
            raise ValueError(f"unknown {self.what} '{name}'; the known ones are {', '.join(self.names())}")
        return self._entries[name]
