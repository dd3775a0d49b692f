"""The functions of fairseq's commands, imported or run as scripts."""

import inspect
import sys
from pathlib import PurePath
from typing import Any, Dict, Iterator

_FUNCTIONS = {"train": "validate_and_save", "eval_lm": "eval_lm"}  # a function of each command


class Names:
    """The global names by which the functions of a command call each other, as attributes.

    A process that is spawned for ``python -m fairseq_cli.train`` runs the module again, and its ``__main__`` has copies
    of these names. A function put in the place of such a copy is never called.
    """

    def __init__(self, names: Dict[str, Any]):
        self.__dict__ = names


def names_of(command: str) -> Iterator[Any]:
    """Yield the `Names` of ``fairseq_cli.COMMAND``: imported, or run as a script, or both."""
    for module in (sys.modules.get(f"fairseq_cli.{command}"), sys.modules.get("__main__")):
        function: Any = getattr(module, _FUNCTIONS[command], None)
        names = getattr(inspect.unwrap(function), "__globals__", {})  # another script may have a module of that name
        if PurePath(names.get("__file__", "")).parts[-2:] == ("fairseq_cli", f"{command}.py"):
            yield Names(names)
