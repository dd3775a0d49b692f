"""A Triton kernel: batches of products in float32, by tensor cores.

With `SINGLE` each number is split into two of TF32 and a rest, and three of their four products are summed. So a
product is off by some 2^-21 of its size, as in float32. With `ROUNDED` a number is one of TF32, off by up to 2^-10.
That is how half precision rounds, and no number has to be split on its way to the tensor cores.

Shapes: B products of ``[M, K]`` and ``[K, N]``.
"""

from typing import Dict, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

SINGLE, ROUNDED = "tf32x3", "tf32"
FEW = 16  # rows of one product at most
TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
NARROW_TILE = {"BLOCK_M": FEW, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}


@triton.jit
def product_kernel(
    p_a, p_b, p_out, s_ab, s_bb, M, K,
    N: tl.constexpr, s_am: tl.constexpr, s_ak: tl.constexpr, s_bk: tl.constexpr, s_bn: tl.constexpr,
    TAIL: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write a tile of a product, or with ADD add it; TAIL if the last block along K has less than BLOCK_K columns.

    Widths and strides that do not depend on rows are constants, so that the compiler knows which addresses are aligned.
    """
    b = tl.program_id(2).to(tl.int64)
    m, n = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n, k = (m < M)[:, None], (n < N)[None, :], tl.arange(0, BLOCK_K)
    p_a += b * s_ab
    p_b += b * s_bb
    at_a, at_b = m[:, None] * s_am + k[None, :] * s_ak, k[:, None] * s_bk + n[None, :] * s_bn
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, K // BLOCK_K):
        # [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N]
        b_a, b_b = tl.load(p_a + at_a, m_m, other=0.0), tl.load(p_b + at_b, m_n, other=0.0)
        b_sum += tl.dot(b_a, b_b, input_precision=PRECISION)
        p_a += BLOCK_K * s_ak
        p_b += BLOCK_K * s_bk
    if TAIL:
        left = K % BLOCK_K
        b_a = tl.load(p_a + at_a, m_m & (k < left)[None, :], other=0.0)
        b_b = tl.load(p_b + at_b, m_n & (k < left)[:, None], other=0.0)
        b_sum += tl.dot(b_a, b_b, input_precision=PRECISION)
    at = p_out + (b * M + m[:, None]) * N + n[None, :]
    if ADD:
        b_sum += tl.load(at, m_m & m_n, other=0.0)
    tl.store(at, b_sum, m_m & m_n)


def product(a: Tensor, b: Tensor, like: Tensor, add_to: Optional[Tensor] = None, precision: str = SINGLE) -> Tensor:
    """Return ``a [B, M, K]`` times ``b [B, K, N]``, in float32; with *add_to* ``[B, M, N]``, it is added to that.

    A model in single precision rounds nothing: PyTorch computes the product if *like* is in float32.
    """
    if like.dtype == torch.float32:
        return torch.bmm(a, b) if add_to is None else add_to.baddbmm_(a, b)
    (batch, rows, inner), columns = a.shape, b.size(2)
    out = a.new_empty(batch, rows, columns) if add_to is None else add_to
    tile: Dict[str, int] = NARROW_TILE if rows <= FEW else TILE
    product_kernel[(triton.cdiv(columns, tile["BLOCK_N"]), triton.cdiv(rows, tile["BLOCK_M"]), batch)](
        a, b, out, a.stride(0), b.stride(0), rows, inner,
        N=columns, s_am=a.stride(1), s_ak=a.stride(2), s_bk=b.stride(1), s_bn=b.stride(2),
        TAIL=inner % tile["BLOCK_K"] > 0, ADD=add_to is not None, PRECISION=precision, **tile,
    )  # fmt: skip
    return out
