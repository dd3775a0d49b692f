"""Triton's interpreter without work that has no effect: interpreted kernels take a quarter of the time."""

import functools
import inspect
from dataclasses import replace
from typing import Any, Dict, List

VERSION = "3.9.0"  # whose inner functions are replaced here; another one's interpreter is left as slow as it is


def quicken() -> None:
    """Leave out what the interpreter computes for nothing."""
    import triton

    if triton.__version__ == VERSION:
        operands = _spare_shapes, _spare_comparisons, _spare_broadcasts, _spare_types
        for spare in (_spare_assertions, _spare_patches, _spare_tables, *operands):
            spare()


def _spare_assertions() -> None:
    """Every operation on integers is repeated in int64, for an assertion that only `debug` makes."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)


def _spare_patches() -> None:
    """For every call of a kernel's function, all names of Triton's modules are searched for what to replace."""
    from triton.runtime import interpreter

    is_builtin, semantic = interpreter.tl.core.is_builtin, interpreter.interpreter_semantic
    assert callable(interpreter._patch_builtin) and callable(interpreter._LangPatchScope)

    @functools.cache
    def builtins_of(owner: Any) -> List[str]:
        return [name for name, member in inspect.getmembers(owner) if is_builtin(member)]

    @functools.cache
    def interpreted(member: Any) -> Any:
        checked = getattr(member, "__wrapped__", member)  # without the question for `_semantic`

        def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
            return checked(*args, **kwargs, _semantic=semantic)

        return call

    def patch_builtins(owner: Any, builder: Any, scope: Any) -> None:
        for name in builtins_of(owner):
            if is_builtin(member := getattr(owner, name)):
                scope.set_attr(owner, name, interpreted(member))

    # And again for every function that it calls, though everything is replaced while a kernel runs.
    patch_all, modules = interpreter._patch_lang, (interpreter.tl, interpreter.tl.core)

    @functools.cache
    def modules_of(function: Any) -> List[Any]:
        return [value for value in function.__globals__.values() if any(value is module for module in modules)]

    def patch_once(function: Any) -> Any:
        if any(is_builtin(module.load) for module in modules_of(function)):
            return patch_all(function)
        return interpreter._LangPatchScope()

    interpreter._patch_builtin, interpreter._patch_lang = patch_builtins, patch_once


def _spare_tables() -> None:
    """For every tensor a table of all types is made."""
    from triton.runtime import interpreter

    numpy_type, types = interpreter._get_np_dtype, {}  # type: Any, Dict[str, Any]

    def type_of(dtype: Any) -> Any:
        if dtype.scalar.name not in types:
            types[dtype.scalar.name] = numpy_type(dtype.scalar)
        return types[dtype.scalar.name]

    interpreter._get_np_dtype = type_of


def _spare_shapes() -> None:
    """For every tensor its shape is checked, made a tuple of Triton's with types of its own, and written in a name."""
    from triton.language import core

    check_block, check_tensor = core.block_type.__init__, core.tensor.__init__
    blocks, tensors = {}, {}  # type: Dict[Any, Any], Dict[Any, Any]

    def init_block(block: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if type(size) is core.constexpr else size for size in shape])
        if sizes not in blocks:
            check_block(block, element_ty, shape)
            blocks[sizes] = block.shape, block.numel, str(block.shape)
        block.element_ty = element_ty
        block.shape, block.numel, text = blocks[sizes]
        block.name = f"<{text}, {element_ty}>"

    def init_tensor(tensor: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in tensors:
            check_tensor(tensor, handle, type)
            tensors[sizes] = tensor.shape, tensor.numel
        tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
        tensor.shape, tensor.numel = tensors[sizes]

    core.block_type.__init__, core.tensor.__init__ = init_block, init_tensor


def _spare_comparisons() -> None:
    """What is no constant is asked whether it is a list, a tuple or one of Triton's; shapes are copied to compare."""
    from triton.language import core

    unwrap, equal_tuples = core._unwrap_if_constexpr, core.tuple.__eq__
    plain = frozenset((int, float, bool, str, type(None), core.tensor, core.dtype, core.block_type, core.pointer_type))

    def unwrap_constant(value: Any) -> Any:
        if type(value) in plain:
            return value
        return value.value if type(value) is core.constexpr else unwrap(value)

    def equal_types(one: Any, other: Any) -> bool:
        other = unwrap_constant(other)
        return one is other or (isinstance(other, core.dtype) and one.name == other.name)

    def equal_shapes(one: Any, other: Any) -> Any:
        if type(other) is list and set(map(type, other)) == {int}:
            return core.constexpr(one.values == other)
        return equal_tuples(one, other)

    core._unwrap_if_constexpr, core.dtype.__eq__, core.tuple.__eq__ = unwrap_constant, equal_types, equal_shapes


def _spare_broadcasts() -> None:
    """Operands of the same type and shape are asked what would make them so; shapes are compared size by size."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    check, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
    joint: Dict[Any, Any] = {}  # of two shapes the one that both are spread to

    def check_others(semantic: Any, one: Any, other: Any, *allowed: Any, **options: Any) -> Any:
        divides = options or len(allowed) > 3  # which may need a wider type
        if divides or not type(one) is type(other) is core.tensor or one.dtype is not other.dtype or one.dtype.is_ptr():
            return check(semantic, one, other, *allowed, **options)
        return semantic.broadcast_impl_value(one, other)

    def spread(semantic: Any, tensor: Any, shape: Any) -> Any:
        if not tensor.type.is_block():
            wide = core.block_type(tensor.dtype, shape)
            return semantic.make_tensor(semantic.builder.create_splat(wide, tensor.handle), wide)
        if tensor.type.shape is shape:
            return tensor
        data = semantic.builder.create_broadcast(tensor.handle, shape.values)
        return semantic.make_tensor(data, core.block_type(tensor.dtype, shape))

    def spread_both(semantic: Any, one: Any, other: Any) -> Any:
        blocks = [operand.type.shape for operand in (one, other) if operand.type.is_block()]
        if len(blocks) == 2 and blocks[0] is not blocks[1]:
            sizes = (*blocks[0].values, "and", *blocks[1].values)
            if sizes not in joint:
                joint[sizes] = broadcast(semantic, one, other)[0].type.shape
            blocks = [joint[sizes]]
        return (spread(semantic, one, blocks[0]), spread(semantic, other, blocks[0])) if blocks else (one, other)

    TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value = check_others, spread_both


def _spare_types() -> None:
    """For every operation the type of its result is found by its operands', of which there are few."""
    from triton.language.semantic import TritonSemantic

    find, found = TritonSemantic.computation_type_impl, {}  # type: Any, Dict[Any, Any]

    def find_once(semantic: Any, one: Any, one_is_scalar: bool, other: Any, other_is_scalar: bool, div: bool) -> Any:
        key = (one.name, one_is_scalar, other.name, other_is_scalar, div)
        if key not in found:
            found[key] = find(semantic, one, one_is_scalar, other, other_is_scalar, div)
        return found[key]

    TritonSemantic.computation_type_impl = find_once
