"""What a layer does to single rows, in one pass over them where a GPU's kernels serve, else as PyTorch does it.

Shapes: B streams, Q rows, d model width.
"""

from typing import Any, Callable, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 4096
TILE = 2048  # numbers of a program at a time


def residual_norm(x: Tensor, residual: Tensor, norm: nn.LayerNorm, dropout: float) -> Tensor:
    """``norm(residual + dropout(x))`` of ``[B, Q, d]`` each."""
    if not (_serves(x, norm.weight, residual) and x.dim() == 3 and norm.bias is not None):
        return norm(residual + F.dropout(x, dropout, training=dropout > 0))
    return _ResidualNorm.apply(x, residual, norm.weight, norm.bias, norm.eps, dropout, _seed(x, dropout))


def activation_dropout(x: Tensor, activation: Callable[[Tensor], Tensor], dropout: float) -> Tensor:
    """``dropout(activation(x))``."""
    if activation not in (F.relu, torch.relu) or not (_serves(x) and x.is_contiguous()):
        return F.dropout(activation(x), dropout, training=dropout > 0)
    return _ReluDropout.apply(x, dropout, _seed(x, dropout))


def _serves(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take these: rows and parameters of one dtype on a GPU, outside of autocast."""
    if not x.is_cuda or x.dtype not in DTYPES or torch.is_autocast_enabled("cuda"):
        return False
    return x.numel() > 0 and x.size(-1) <= WIDEST and all(t.dtype == x.dtype for t in others)


def _seed(x: Tensor, dropout: float) -> Optional[Tensor]:
    """On the device, so that a CUDA graph draws a new one at every replay."""
    return torch.randint(1 << 31, (1,), device=x.device, dtype=torch.int32) if dropout > 0 else None


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dropout: float,
        seed: Optional[Tensor],
    ) -> Tensor:
        import triton

        from .residual_kernels import residual_norm_kernel

        x, residual = _dense_rows(x), _dense_rows(residual)
        learns = any(ctx.needs_input_grad[:4])
        out = wide_empty(x)
        total = wide_empty(x) if learns else out
        rows, block = x.size(0) * x.size(1), _block(x.size(2))
        mean, rstd = (x.new_empty(rows if learns else 0, dtype=torch.float32) for _ in range(2))
        tile = max(1, TILE // (4 * block))
        residual_norm_kernel[(triton.cdiv(rows, tile),)](
            x, residual, weight, bias, seed, out, total, mean, rstd,
            *x.stride()[:2], *residual.stride()[:2], out.stride(1),
            rows, x.size(1), x.size(2), _reach(x, residual), out.stride(1), eps, dropout,
            ROWS=tile, BLOCK=block, DROPOUT=dropout > 0, LEARNS=learns, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(total, weight, mean, rstd, seed)
        ctx.dropout = dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        import triton

        from .residual_kernels import residual_norm_gradient_kernel

        total, weight, mean, rstd, seed = ctx.saved_tensors
        grad = _dense_rows(grad)
        d_residual = wide_empty(total)
        d_x = wide_empty(total) if ctx.dropout > 0 else d_residual
        rows, block = total.size(0) * total.size(1), _block(total.size(2))
        tile = max(1, TILE // (4 * block))
        programs = min(_programs(total.device), triton.cdiv(rows, tile))
        parts = total.new_empty(programs, 2, total.size(2), dtype=torch.float32)
        residual_norm_gradient_kernel[(programs,)](
            grad, total, weight, seed, mean, rstd, d_x, d_residual, parts,
            *grad.stride()[:2], total.stride(1),
            rows, total.size(1), total.size(2), _reach(grad), total.stride(1), ctx.dropout,
            ROWS=tile, BLOCK=block, DROPOUT=ctx.dropout > 0, num_warps=4,
        )  # fmt: skip
        d_weight, d_bias = parts.sum(0).to(weight.dtype)
        return d_x, d_residual, d_weight, d_bias, None, None, None


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: float, seed: Optional[Tensor]) -> Tensor:
        import triton

        from .residual_kernels import relu_dropout_kernel

        out = torch.empty_like(x)
        block = TILE // 4
        relu_dropout_kernel[(triton.cdiv(x.numel(), 4 * block),)](
            x, seed, out, x.numel(), dropout, BLOCK=block, DROPOUT=dropout > 0, num_warps=4
        )
        ctx.save_for_backward(out)
        ctx.scale = 1 / (1 - dropout)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        # What was dropped or not positive is 0 in the output.
        (out,) = ctx.saved_tensors
        return torch.ops.aten.native_dropout_backward(grad, out > 0, ctx.scale), None, None


def wide_empty(x: Tensor) -> Tensor:
    """Rows for a kernel that writes zeros behind them: like ``x [B, Q, d]``, where half precision wants 16 bytes."""
    width = x.size(2) + (-x.size(2) % 8 if x.element_size() == 2 else 0)
    return x.new_empty(*x.shape[:2], width)[..., : x.size(2)]


def _reach(*rows: Tensor) -> int:
    """How far all of these rows may be read: their width, or up to the next 16 bytes where the storage goes on."""
    width, end = rows[0].size(2), rows[0].size(2) - rows[0].size(2) % -8
    for x in rows:
        last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape[:2], x.stride()[:2], strict=True))
        if x.stride(1) % 8 or last + end > x.untyped_storage().nbytes() // x.element_size():
            return width
    return end


def _programs(device: torch.device) -> int:
    """That share the rows of a backward pass: three are at home on a multiprocessor at a time."""
    return 3 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _block(width: int) -> int:
    """Columns of a quarter of a row."""
    return max(4, 1 << (width - 1).bit_length()) // 4
