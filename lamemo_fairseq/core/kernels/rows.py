"""Rows for the layers' kernels: which rows they take, the layout in memory, the seed of dropout.

Shapes: B streams, H heads, R rows of each, D size of a head, d width.
"""

import importlib.util
from functools import cache
from typing import Optional, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fusable(rows: Tensor) -> bool:
    """Tell whether the kernels take *rows*: on a GPU, in single or half precision, outside autocast and compilation."""
    fits = rows.is_cuda and rows.dtype in DTYPES
    return fits and not torch.is_autocast_enabled("cuda") and not torch.compiler.is_compiling() and has_triton()


@cache
def has_triton() -> bool:
    """Return whether Triton is installed, without importing it."""
    return importlib.util.find_spec("triton") is not None


def draw_seed(like: Tensor, dropout: float, count: int = 1) -> Optional[Tensor]:
    """Draw *count* integers on the device, by PyTorch's generator, so that CUDA graphs and checkpointing know of it."""
    return torch.randint(1 << 31, (count,), device=like.device, dtype=torch.int32) if dropout > 0 else None


def heads_like(t: Tensor, count: int = 1) -> Sequence[Tensor]:
    """Return empty tensors like ``t [B, H, R, D]`` that are adjacent views of one buffer, like projections."""
    batch, heads, length, size = t.shape
    return [tensor.transpose(1, 2) for tensor in t.new_empty(batch, length, count, heads, size).unbind(2)]


def by_rows(t: Tensor) -> Tensor:
    """Return a tensor with contiguous rows, as kernels assume: a copy only if it has others."""
    return t if t.stride(-1) == 1 else t.contiguous()


def strided(rows: Tensor) -> Tensor:
    """Return ``[*, d]`` as ``[B, R, d]`` with contiguous columns, by a copy only where strides cannot express it."""
    rows = rows if rows.stride(-1) == 1 or rows.size(-1) == 1 else rows.contiguous()
    if rows.dim() == 3:
        return rows
    return rows.reshape(1, -1, rows.size(-1)) if rows.dim() < 3 else rows.flatten(0, -3)
