"""Cross-entropy of a linear layer without a score for every token and word at once.

Shapes: T tokens, V words, d width.
"""

from functools import cache
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.autograd import Context, Function
from ..kernels.padded import with_zeros
from ..kernels.rows import has_triton

SMALLEST_CHUNK = 1 << 25  # scores, 64 MiB in half precision


def linear_cross_entropy(features: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """Return the sum of the negative log-likelihoods (nats) of *target*, a float32 (or wider) scalar.

    Scores are made for some tokens at a time, and their gradients at once, so that memory does not grow with T V. torch
    2.13's `torch.nn.functional.linear_cross_entropy` does the same. This function serves all versions, with larger
    chunks, and pads widths that break alignment for the products.

    Args:
        features: ``[T, d]``.
        weight, bias: ``[V, d]`` and ``[V]``.
        target: ``[T]`` word ids.
    """
    if torch.is_autocast_enabled(features.device.type):
        half = torch.get_autocast_dtype(features.device.type)
        features, weight = features.to(half), weight.to(half)
    loss: Tensor = _LinearCrossEntropy.apply(features, weight, bias, target)
    return loss


def tokens_at_once(words: int, width: int) -> int:
    """Return the number of tokens whose scores are computed at a time.

    In half precision, their scores take no more memory than the weights' gradient. Fewer tokens would cost more passes
    over that gradient.
    """
    return max(2 * width, SMALLEST_CHUNK // words)


class _LossContext(Context):
    dtypes: Tuple[torch.dtype, torch.dtype, torch.dtype]  # of features, weight and bias


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: _LossContext, features: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        width, exact = features.size(1), torch.promote_types(features.dtype, torch.float32)
        learns = any(ctx.needs_input_grad)
        x, w, b = features, weight, bias.to(weight.dtype)
        inside = False
        if features.element_size() == 2:
            # Whatever is padded gets a probability of zero, and no gradient.
            x, w, b = with_zeros(x), with_zeros(w, 2), F.pad(b, (0, -len(b) % 8), value=torch.finfo(w.dtype).min)
            inside = x.size(1) > width
            if inside:  # a column of padding takes the biases, whose gradient then comes with that of the weights
                x[:, width], w[:, width] = 1, b
        loss = features.new_zeros((), dtype=exact)
        d_x = torch.empty_like(x) if learns else x
        d_w: Optional[Tensor] = None
        d_b = torch.zeros(b.shape, dtype=exact, device=w.device)
        size = tokens_at_once(*w.shape)
        for chunk, words, d_chunk in zip(x.split(size), target.split(size), d_x.split(size), strict=True):
            scores = F.linear(chunk, w, None if inside else b)
            nll, d_scores = _softmax_gradient(scores, words, learns)
            loss += nll
            if learns:
                torch.mm(d_scores, w, out=d_chunk)
                d_w = _add_product(d_w, d_scores, chunk, exact)
                if not inside:
                    d_b += d_scores.sum(0, dtype=exact)
            del scores, d_scores  # before the next chunk's are made
        if d_w is not None:
            d_b = d_w[:, width] if inside else d_b
            ctx.save_for_backward(d_x[:, :width], d_w[: len(weight), :width], d_b[: len(weight)])
            ctx.dtypes = features.dtype, weight.dtype, bias.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: _LossContext, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        gradients = (
            torch.mul(t, grad, out=torch.empty(t.shape, dtype=dtype, device=t.device)) if needed else None
            for t, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        )
        return (*gradients, None)


def _softmax_gradient(scores: Tensor, target: Tensor, learns: bool) -> Tuple[Tensor, Tensor]:
    """Return the summed loss, and its gradient with respect to scores ``[T, V]``, which may be overwritten."""
    if scores.is_cuda and scores.dtype != torch.float64 and has_triton():
        from ..kernels.softmax_kernel import softmax_gradient_

        return softmax_gradient_(scores, target, learns).sum(), scores
    exact = torch.promote_types(scores.dtype, torch.float32)
    log_probs = scores.log_softmax(-1, dtype=exact)
    loss = -log_probs.gather(1, target.unsqueeze(1)).sum()
    if not learns:
        return loss, scores
    probs = log_probs.exp_()
    probs.scatter_add_(1, target.unsqueeze(1), -torch.ones_like(target, dtype=exact).unsqueeze(1))
    return loss, probs.to(scores.dtype)


def _add_product(total: Optional[Tensor], d_scores: Tensor, features: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``total + d_scores^T features``, in place if there is a total, summed in *dtype* where PyTorch can."""
    scores = d_scores.t()
    if dtype == features.dtype:
        return scores @ features if total is None else total.addmm_(scores, features)
    if not (features.is_cuda and len(features) and _sums_in_single()):
        product = (scores @ features).to(dtype)
        return product if total is None else total.add_(product)
    if total is None:
        return torch.mm(scores, features, out_dtype=dtype)
    torch.ops.aten.addmm.dtype_out(total, scores, features, dtype, out=total)
    return total


@cache
def _sums_in_single() -> bool:
    """Return whether PyTorch has products of half-precision numbers that come out in float32."""
    return "dtype_out" in torch.ops.aten.addmm.overloads()
