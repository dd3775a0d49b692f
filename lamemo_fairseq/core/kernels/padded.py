"""Rows whose width breaks alignment, and the zeros behind them: two types, so that nothing else is read as padding.

Such a width is 410; d' is the next multiple of 8. `PaddedRows [.., d]` have the zeros behind them in storage, and
`WideRows [.., d']` as columns of their own.

Shapes: B streams, R rows of each, d width.
"""

import threading
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Callable, Dict, Iterator, NewType, Optional, SupportsIndex, Tuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import rows as layout
from .autograd import Context, Function

WideRows = NewType("WideRows", Tensor)  # [.., d] or [.., d'], the columns from d on zeros


class PaddedRows(Tensor):
    """Rows ``[.., d]`` with zeros in storage behind each, up to d'. Only `cut` makes them, no operation does."""

    __torch_function__ = cast(Any, torch._C._disabled_torch_function_impl)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Tuple[object, ...]:  # saved and copied as a plain tensor
        reduced: Tuple[object, ...] = self.as_subclass(Tensor).__reduce_ex__(protocol)
        return reduced

    def __deepcopy__(self, memo: Dict[int, object]) -> Tensor:
        return deepcopy(self.as_subclass(Tensor), memo)


def stored_width(like: Tensor, width: int) -> int:
    """Return the columns that rows of *width* take in storage: whole units of 16 bytes in half precision."""
    return width + -width % 8 if like.element_size() == 2 else width


def empty_rows(like: Tensor, width: int) -> Tensor:
    """Return rows ``[.., stored]`` for a kernel to write, zeros behind *width* included: as many as *like* has."""
    return like.new_empty(*like.shape[:-1], stored_width(like, width))


def cut(rows: Tensor, width: int) -> Tensor:
    """Return the first *width* columns of rows whose other columns are zeros; with other columns, as `PaddedRows`.

    The result is no view to autograd, which would refuse changes in place.
    """
    if rows.size(-1) == width:
        return rows
    assert rows.size(-1) == stored_width(rows, width), "more than padding would be cut off"
    cut_off: PaddedRows = Tensor._make_subclass(PaddedRows, rows[..., :width])
    return cut_off


def with_zeros(t: Tensor, dims: int = 1) -> Tensor:
    """Return *t* with zeros behind its last *dims* dimensions, up to multiples of 8."""
    amounts = [amount for size in reversed(t.shape[-dims:]) for amount in (0, -size % 8)]
    return F.pad(t, amounts) if any(amounts) else t


class _Made(threading.local):
    """The weights that were made of others within `made_once`, by what they are; None outside."""

    weights: Optional[Dict[object, Tuple[Tensor, Tensor]]] = None


_MADE = _Made()


@contextmanager
def made_once(active: bool = True) -> Iterator[None]:
    """Within it, `of_weight` makes a weight once: segments of an update then share it, and one gradient of it.

    Not *active*, it makes each one anew, as activations have to that are computed again.
    """
    before, _MADE.weights = _MADE.weights, {} if active else None
    try:
        yield
    finally:
        _MADE.weights = before


def of_weight(weight: Tensor, name: object, make: Callable[[], Tensor]) -> Tensor:
    """Return what *make* returns, which depends on *weight* and the *name* alone."""
    if _MADE.weights is None:
        return make()
    key = id(weight), name, torch.is_grad_enabled()
    if key not in _MADE.weights:
        _MADE.weights[key] = weight, make()  # with the weight, whose number another one would get otherwise
    return _MADE.weights[key][1]


def widened(rows: Tensor) -> WideRows:
    """Return ``rows [.., d]`` as ``[.., d']``, without a copy if they are `PaddedRows`."""
    if isinstance(rows, PaddedRows):
        wide: WideRows = _Widen.apply(rows)
        return wide
    return WideRows(with_zeros(rows))


def narrowed(rows: Tensor, width: int) -> Tensor:
    """Return the first *width* columns of `WideRows`."""
    return rows if rows.size(-1) == width else rows[..., :width]


class _WidenContext(Context):
    width: int


class _Widen(Function):
    @staticmethod
    def forward(ctx: _WidenContext, rows: PaddedRows) -> Tensor:
        ctx.width = rows.size(-1)
        # No view to autograd, which would refuse changes in place.
        return rows.as_strided((*rows.shape[:-1], stored_width(rows, ctx.width)), rows.stride()).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: _WidenContext, grad: Tensor) -> Tensor:
        return grad[..., : ctx.width]


def readable(rows: Tensor) -> int:
    """Return how many columns of ``rows [B, R, d]`` can be read at aligned addresses: d' if storage reaches there.

    Columns behind d may hold anything, NaN included: the reader discards them.
    """
    width = rows.size(-1)
    wide = stored_width(rows, width)
    if any(stride % 8 for stride in rows.stride()[:-1]) or rows.storage_offset() % 8:
        return width
    last = sum((size - 1) * stride for size, stride in zip(rows.shape[:-1], rows.stride()[:-1], strict=True))
    end = (rows.storage_offset() + last + wide) * rows.element_size()
    return wide if end <= rows.untyped_storage().nbytes() else width


_JOINED = "_lamemo_joined"


def join(past: Tensor, new: Tensor) -> Tensor:
    """Return rows ``[B, m, d]`` and ``[B, R, d]`` after them, as `PaddedRows` where kernels run.

    `newest_of` finds *new* again, if *past* has no gradient.

    Raises:
        ValueError: they are of two dtypes, of which each path would make another one.
    """
    if past.dtype != new.dtype and not torch.is_autocast_enabled(new.device.type):
        raise ValueError(f"slots are {past.dtype}, and the rows after them {new.dtype}: call .to(rows) on the slots")
    if not layout.fusable(new) or stored_width(new, new.size(-1)) == new.size(-1):
        joined = torch.cat([past, new], dim=1)
    else:
        joined = _Join.apply(past, new)
    if not past.requires_grad and not (new.is_inference() or joined.is_inference()):
        setattr(joined, _JOINED, (new, joined._version, new._version))
    return joined


def newest_of(rows: Tensor) -> Tensor:
    """Return the rows that `join` has put last in *rows*, as they were, or all *rows* if they are not joined.

    All, too, if one of them has changed since, or if somebody waits for the gradient of all rows.
    """
    new, version, of_new = getattr(rows, _JOINED, (None, 0, 0))
    if new is None or rows._version != version or new._version != of_new:
        return rows
    if rows.retains_grad or rows._backward_hooks:
        return rows
    found: Tensor = new
    return found


def last_of(rows: Tensor, count: int) -> Tensor:
    """Return the last *count* of ``rows [B, R, d]``: those of `newest_of` if they are as many, else a slice.

    The gradient of a slice is one of all rows, zero for the others.
    """
    newest = newest_of(rows)
    return newest if newest.size(1) == count else rows[:, rows.size(1) - count :]


class _JoinContext(Context):
    slots: int


class _Join(Function):
    @staticmethod
    def forward(ctx: _JoinContext, past: Tensor, new: Tensor) -> Tensor:
        ctx.slots, width = past.size(1), new.size(-1)
        joined = new.new_empty(new.size(0), ctx.slots + new.size(1), stored_width(new, width))
        joined[..., width:].zero_()
        joined[:, : ctx.slots, :width].copy_(past)
        joined[:, ctx.slots :, :width].copy_(new)
        return cut(joined, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: _JoinContext, grad: Tensor) -> Tuple[Optional[Tensor], Tensor]:
        # Slots have a gradient where a memory maps them by parameters.
        return grad[:, : ctx.slots] if ctx.needs_input_grad[0] else None, grad[:, ctx.slots :]
