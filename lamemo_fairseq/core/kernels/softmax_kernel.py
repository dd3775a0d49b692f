"""Triton kernel: the loss of a softmax and the gradient of its scores, in place.

Shapes: T tokens, V words.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def softmax_gradient_kernel(
    p_scores, p_target, p_nll, s_row, V, LEARNS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute a token's normaliser, then overwrite its scores with ``softmax - onehot``; one program a token."""
    row = tl.program_id(0).to(tl.int64)
    p_scores += row * s_row
    target = tl.load(p_target + row)
    at_target = tl.load(p_scores + target).to(tl.float32)
    b_top = tl.full([BLOCK], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        word = start + tl.arange(0, BLOCK)
        b_s = tl.load(p_scores + word, word < V, other=-float("inf")).to(tl.float32)
        top = tl.maximum(b_top, b_s)
        finite = tl.where(top == -float("inf"), 0.0, top)
        b_sum = b_sum * tl.exp(b_top - finite) + tl.exp(b_s - finite)
        b_top = top
    top = tl.max(b_top, 0)
    lse = top + tl.log(tl.sum(b_sum * tl.exp(b_top - top), 0))
    tl.store(p_nll + row, lse - at_target)
    if LEARNS:
        for start in range(0, V, BLOCK):
            word = start + tl.arange(0, BLOCK)
            b_s = tl.load(p_scores + word, word < V, other=-float("inf")).to(tl.float32)
            b_d = tl.exp(b_s - lse) - (word == target).to(tl.float32)
            tl.store(p_scores + word, b_d.to(p_scores.dtype.element_ty), word < V)


def softmax_gradient_(scores: Tensor, target: Tensor, learns: bool) -> Tensor:
    """Replace scores ``[T, V]`` by the gradient of their summed loss if *learns*; returns the losses ``[T]``."""
    nll = torch.empty(len(target), dtype=torch.float32, device=scores.device)
    block = min(4096, triton.next_power_of_2(scores.size(1)))
    if len(target):
        softmax_gradient_kernel[(len(target),)](
            scores, target, nll, scores.stride(0), scores.size(1), LEARNS=learns, BLOCK=block, num_warps=8
        )
    return nll
