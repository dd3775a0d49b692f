"""Checks of a user's own memory: what is wrong is named in one line, in place of an error from within a host.

They look at types and shapes, never at numbers, for which the host would wait.
"""

from dataclasses import fields
from inspect import get_annotations
from typing import Any, List, Mapping, Optional, Tuple, TypeVar, cast

import torch
from torch import Tensor, nn

from ..decoding.cache import SegmentCache
from ..names import check_spelling

P = TypeVar("P")


def check_names(memory: Any, others: Mapping[str, Any]) -> None:
    """Refuse names that another memory has: a host knows options and models by them.

    Memories are registered in alphabetical order. So the error may stop a shipped memory, and names both.

    Args:
        memory: a subclass of `Memory`.
        others: those registered before, by name.

    Raises:
        ValueError: an option, or the architecture, has the name of another memory's, or there is no architecture.
    """
    if not hasattr(getattr(memory, "architecture", None), "class_name"):
        raise ValueError(
            f"{memory.__name__} has no architecture: write architecture = Architecture(name, class_name, summary)"
        )
    for name, other in others.items():
        shared = [f.name for f in fields(memory.options) if f.name in {g.name for g in fields(other.options)}]
        if shared:
            raise ValueError(
                f"{memory.options.__name__}.{shared[0]} is an option of --memory {name} too, in "
                f"{other.options.__name__}: give your own another name"
            )
        for kind in ("name", "class_name"):
            value = getattr(memory.architecture, kind)
            if value == getattr(other.architecture, kind):
                raise ValueError(
                    f"{memory.__name__}.architecture has the {kind} '{value}', which {other.__name__} of --memory "
                    f"{name} has too: give your own another one"
                )


def check_methods(memory: Any, base: Any) -> None:
    """Refuse a class that lacks a method, or names a state that its tensors cannot be told from.

    Args:
        memory: a subclass of *base*, which is `Memory`.

    Raises:
        ValueError: the message names the method to define.
    """

    def lacks(method: str) -> bool:
        return getattr(memory, method) is getattr(base, method)

    name = memory.__name__
    if lacks("pass_layer") and lacks("pass_segment"):
        raise ValueError(f"{name} reads no segment: define pass_layer(n, layer, rows, before, segment)")
    if lacks("initial_state"):
        raise ValueError(f"{name} has no state before the first segment: define initial_state(x)")
    if "__dataclass_fields__" not in vars(memory.state) and get_annotations(memory.state):
        raise ValueError(f"{memory.state.__name__} is no dataclass: write @dataclass(frozen=True) above it")
    for attribute, method in (("fills_caches", "fill_cache"), ("has_losses", "losses_of")):
        if getattr(memory, attribute) and lacks(method) and (method == "fill_cache" or lacks("pass_segment")):
            raise ValueError(f"{name} has {attribute} = True: define {method} too, or leave {attribute} out")
    if not issubclass(memory.cache, SegmentCache) or memory.cache.empty.__func__ is SegmentCache.empty.__func__:  # type: ignore[attr-defined]
        raise ValueError(f"{memory.cache.__name__} begins no decoding: extend SegmentCache, and define empty in it")
    check_spelling(memory.cache, SegmentCache)
    if isinstance(memory.layout, str):
        raise ValueError(f"{name}.layout is a string: write ({memory.layout!r},)")
    unknown = sorted(set(memory.layout) - {f.name for f in fields(memory.options)})
    if unknown:
        raise ValueError(f"{name}.layout has '{unknown[0]}', which is no option: name fields of the class's options")


def check_parts(module: nn.Module) -> None:
    """Refuse modules and parameters that a list, tuple or dictionary hides from the model.

    Raises:
        ValueError: they would not be trained, saved or moved to a device; the message names the attribute.
    """
    for owner in module.modules():
        for name, value in vars(owner).items():
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            if not name.startswith("_") and any(isinstance(part, (nn.Module, nn.Parameter)) for part in parts):
                kind = "Dict" if isinstance(value, dict) else "List"
                raise ValueError(
                    f"{type(owner).__name__}.{name} is a {type(value).__name__} that hides weights from the model, "
                    f"which would not be trained or saved: make it an nn.Module{kind} or nn.Parameter{kind}"
                )


def check_members(options: Any, base: type) -> None:
    """Refuse an option with the name of a member that all classes of options have.

    Args:
        options: a subclass of *base*, which is `MemoryOptions`.

    Raises:
        ValueError: the message names the option.
    """
    for f in fields(options):
        if hasattr(base, f.name):
            raise ValueError(
                f"{options.__name__}.{f.name} would hide {base.__name__}.{f.name}: give the option another name"
            )


def check_fields(memory: Any, state: Any, x: Tensor, method: str = "") -> None:
    """Refuse a state of another class, or with a field that is not made of tensors with the streams first.

    Args:
        x: the segment ``[B, N, d]``.
        method: the one that returned it, if not the pass over a segment.

    Raises:
        ValueError: the class or a field's type is wrong, or a tensor has another number of streams or another device.
    """
    streams, device = len(x), x.device
    name = type(memory).__name__ + (f".{method}" if method else "")
    if type(state) is not memory.state:
        raise ValueError(
            f"{name} returned a state of type {type(state).__name__}, and the class names {memory.state.__name__}: "
            f"return that, or write state = {type(state).__name__} in the class, by which a saved state is read"
        )
    for field, value in state.own().items():
        for tensor in value if isinstance(value, tuple) else (value,):
            if not isinstance(tensor, Tensor):
                raise ValueError(
                    f"{name} returned a state whose {field} is {_kind(value)}: return a tensor or a tuple of tensors, "
                    "each with the streams first"
                )
            if tensor.dim() == 0 or tensor.size(0) != streams:
                raise ValueError(
                    f"{name} returned a state whose {field} is {list(tensor.shape)} for {streams} streams: return "
                    f"tensors with the streams first, [{streams}, ..]"
                )
            if tensor.device != device:
                raise ValueError(
                    f"{name} returned a state whose {field} is on {tensor.device}, and the segment on {device}: make "
                    "it of the segment's tensors, as by x.new_empty"
                )


def versions(state: Any) -> List[int]:
    """Return how often each tensor of a state has been changed in place."""
    if torch.compiler.is_compiling():  # which does not follow them
        return []
    return [0 if tensor.is_inference() else tensor._version for tensor in state.tensors()]


def check_unchanged(memory: Any, state: Any, before: List[int]) -> None:
    """Refuse a pass over a segment that has changed the *state* before it, whose `versions` were those *before*.

    Raises:
        ValueError: it has. The same batch is read again after an overflow, and a state may serve several segments.
    """
    if versions(state) != before:
        raise ValueError(
            f"{type(memory).__name__} changed the state before a segment in place, which may be read again: change a "
            "copy, as of clone()"
        )


def check_passage(memory: Any, passage: Any, x: Tensor) -> None:
    """Refuse results of a segment ``x [B, N, d]`` that a `Memory` must not return; shipped ones never do.

    Raises:
        ValueError: there are not as many features as tokens, or losses that no host asks for. Or the state is none of
            this memory's or not of B streams, has more rows than the options say, so that tokens would attend further,
            or a gradient, so that the next update's backward pass would need this one's graph.
    """
    name, state = type(memory).__name__, passage.state
    if passage.features.shape != x.shape:
        raise ValueError(
            f"{name} returned features {list(passage.features.shape)}, and the segment is {list(x.shape)}: return the "
            "last layer's rows of its tokens, without slots"
        )
    if passage.losses and not memory.has_losses:
        raise ValueError(
            f"{name} returned losses, and its class says that it has none, so that training would not add them: write "
            "has_losses = True in the class"
        )
    loss = next((loss for loss in passage.losses.values() if loss.dim() > 0), None)
    if loss is not None:
        raise ValueError(f"{name} returned a loss {list(loss.shape)}: return scalars, means over tokens")
    check_fields(memory, state, x)
    for option, (rows, most) in memory.rows_held(state).items():
        if rows > most:
            raise ValueError(
                f"{name} returned a state of {rows} rows a layer, and {option} is {most}: keep the "
                f"last {most}, as by last_rows, or let rows_held return the option that counts these rows"
            )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in state.tensors()):
        raise ValueError(
            f"{name} returned a state with a gradient, which would go on into the next update: call "
            "detach() on its tensors, as last_rows does, or write carries_gradient = True in the class"
        )


def passed_segment(memory: Any, returned: P) -> P:
    """Return what the ``pass_segment`` of a `Memory` has *returned*.

    Raises:
        ValueError: that is no `Passage`.
    """
    if getattr(returned, "_fields", ()) != ("features", "state", "losses"):
        raise ValueError(
            f"{type(memory).__name__}.pass_segment returned type {type(returned).__name__}: return "
            "Passage(features, state)"
        )
    return returned


def passed_layer(
    memory: Any, returned: Any, rows: Tensor, before: Tuple[Tensor, ...]
) -> Tuple[Tensor, Tuple[Tensor, ...], Tuple[Tensor, ...]]:
    """Return what the ``pass_layer`` of a `Memory` has *returned* for *rows* and the state *before*.

    Raises:
        ValueError: that is no `LayerPassage`, its state is not made of as many tensors, or its rows have another dtype.
    """
    name = f"{type(memory).__name__}.pass_layer"
    if getattr(returned, "_fields", ()) != ("rows", "state", "aside"):
        raise ValueError(f"{name} returned type {type(returned).__name__}: return LayerPassage(rows, state)")
    state, made = returned.state, returned.rows
    if not isinstance(state, tuple) or not all(isinstance(tensor, Tensor) for tensor in state):
        raise ValueError(
            f"{name} returned a state that is {_kind(state)}: return a tuple of tensors, (tensor,) for one"
        )
    if len(state) != len(before):
        raise ValueError(f"{name} returned {len(state)} tensors as state, and got {len(before)}: return as many")
    if not isinstance(made, Tensor) or made.dim() != 3:
        raise ValueError(f"{name} returned rows that are {_kind(made)}: return the layer's output, [B, n, d]")
    if made.dtype != rows.dtype and not torch.is_autocast_enabled(rows.device.type):
        raise ValueError(f"{name} returned rows in {made.dtype}, and got {rows.dtype}: call .to(rows) on what it adds")
    return cast(Tuple[Tensor, Tuple[Tensor, ...], Tuple[Tensor, ...]], returned)


def reached(memory: Any, returned: object, for_positions: bool = False) -> Tuple[int, Optional[range]]:
    """Return what the ``reach`` of a `Memory` has *returned*.

    Args:
        for_positions: the positions are asked for these distances. A memory that asks for others by itself, as memory
            tokens do, may leave `reach` as it is.

    Raises:
        ValueError: that is no pair of a number and a range or None, or the class and the distances do not agree on
            whether the memory looks ahead.
    """
    rows, ahead = returned if isinstance(returned, tuple) and len(returned) == 2 else (None, None)
    if not isinstance(rows, int) or not (ahead is None or isinstance(ahead, range)):
        raise ValueError(
            f"{type(memory).__name__}.reach returned {returned!r}: return the number of rows that the segment's tokens "
            "attend to, their own included, and None or the range of distances ahead"
        )
    if ahead is not None and not memory.looks_ahead:
        raise ValueError(
            f"{type(memory).__name__}.reach returned distances ahead, which not all position encodings have: write "
            "looks_ahead = True in the class, or return None for them"
        )
    if for_positions and ahead is None and memory.looks_ahead:  # their weights would never be trained
        raise ValueError(
            f"{type(memory).__name__} has looks_ahead = True, and its reach returned None for the distances ahead: "
            "return their range, which is range(0) in a segment without, or leave looks_ahead out of the class"
        )
    return rows, ahead


def _kind(value: object) -> str:
    """Return the words for what was returned in place of something else."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(sorted({type(part).__name__ for part in value}))}"
    return f"of type {type(value).__name__}"
