"""Rows as the layers' kernels take them: which ones, how they lie in memory, how dropout is seeded.

Shapes: B streams, R rows of each, d width.
"""

import importlib.util
from functools import cache
from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autograd import Context, Function

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fusable(rows: Tensor) -> bool:
    """Whether the kernels take *rows*: on a GPU, in single or half precision, outside autocast and compilation."""
    fits = rows.is_cuda and rows.dtype in DTYPES
    return fits and not torch.is_autocast_enabled("cuda") and not torch.compiler.is_compiling() and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def draw_seed(like: Tensor, dropout: float) -> Optional[Tensor]:
    """One integer on the device, by PyTorch's generator, so that CUDA graphs and checkpointing know of it."""
    return torch.randint(1 << 31, (1,), device=like.device, dtype=torch.int32) if dropout > 0 else None


def stored_width(like: Tensor, width: int) -> int:
    """Columns that rows of *width* take in storage: whole units of 16 bytes in half precision."""
    return width + -width % 8 if like.element_size() == 2 else width


def empty_rows(like: Tensor, width: int) -> Tensor:
    """Rows for a kernel to write, ``[*, stored]``: all of *like*'s, in storage that suits aligned products."""
    return like.new_empty(*like.shape[:-1], stored_width(like, width))


def cut(rows: Tensor, width: int) -> Tensor:
    """The first *width* columns; no view to autograd, which would refuse changes in place."""
    return rows if rows.size(-1) == width else rows[..., :width].detach()


def strided(rows: Tensor) -> Tensor:
    """``[*, d]`` as ``[B, R, d]`` with columns next to each other, by a copy only where strides cannot say it."""
    rows = rows if rows.stride(-1) == 1 or rows.size(-1) == 1 else rows.contiguous()
    if rows.dim() == 3:
        return rows
    return rows.reshape(1, -1, rows.size(-1)) if rows.dim() < 3 else rows.flatten(0, -3)


def readable(rows: Tensor) -> int:
    """Columns of ``rows [B, R, d]`` that may be read at aligned addresses: padding as well, if it is there."""
    width = rows.size(-1)
    wide = stored_width(rows, width)
    if any(stride % 8 for stride in rows.stride()[:-1]) or rows.storage_offset() % 8:
        return width
    last = sum((size - 1) * stride for size, stride in zip(rows.shape[:-1], rows.stride()[:-1], strict=True))
    end = (rows.storage_offset() + last + wide) * rows.element_size()
    return wide if end <= rows.untyped_storage().nbytes() else width


def join(past: Tensor, rows: Tensor) -> Tensor:
    """Rows ``[B, m, d]`` without gradient and ``[B, R, d]`` after them, in storage that suits aligned products."""
    if not fusable(rows) or stored_width(rows, rows.size(-1)) == rows.size(-1):
        return torch.cat([past, rows], dim=1)
    joined: Tensor = _Join.apply(past, rows)
    return joined


class _JoinContext(Context):
    slots: int


class _Join(Function):
    @staticmethod
    def forward(ctx: _JoinContext, past: Tensor, rows: Tensor) -> Tensor:
        ctx.slots = past.size(1)
        width = rows.size(-1)
        joined = rows.new_empty(rows.size(0), ctx.slots + rows.size(1), stored_width(rows, width))
        joined[..., width:].zero_()
        joined[:, : ctx.slots, :width].copy_(past)
        joined[:, ctx.slots :, :width].copy_(rows)
        return cut(joined, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: _JoinContext, grad: Tensor) -> Tuple[None, Tensor]:
        return None, grad[:, ctx.slots :]
