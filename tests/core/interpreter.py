"""Triton's interpreter without work that has no effect: interpreted kernels take half the time."""

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

        # And again for every function that it calls, though everything is replaced while a kernel runs.
        patch_all, modules = interpreter._patch_lang, (interpreter.tl, interpreter.tl.core)

        @functools.cache
        def modules_of(function: Any) -> List[Any]:
            return [value for value in function.__globals__.values() if any(value is module for module in modules)]

        def patch_once(function: Any) -> Any:
            if any(is_builtin(module.load) for module in modules_of(function)):
                return patch_all(function)
            return interpreter._LangPatchScope()

        # For every tensor a table of all types is made.
        numpy_type, types = interpreter._get_np_dtype, {}  # type: Any, Any

        def type_of(dtype: Any) -> Any:
            if dtype.scalar.name not in types:
                types[dtype.scalar.name] = numpy_type(dtype.scalar)
            return types[dtype.scalar.name]

        assert callable(interpreter._patch_builtin) and callable(interpreter._LangPatchScope)
        interpreter._patch_builtin, interpreter._patch_lang = patch_builtins, patch_once
        interpreter._get_np_dtype = type_of
