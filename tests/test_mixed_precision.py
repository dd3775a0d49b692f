"""Copies between parameters and the float32 ones behind them, against fairseq's own."""

import pytest
import torch
from fairseq.optim.fp16_optimizer import _FP16OptimizerMixin as Mixin
from torch.nn import Parameter

from lamemo_fairseq.modules.copies import copy_all

SHAPES = [(3, 4), (5,), (1, 1), (2, 3, 4)]


def optimizer_of(layout, dtype):
    """The mixin with parameters that have gradients, and other float32 ones behind them."""
    torch.manual_seed(1)
    optimizer = Mixin()
    optimizer.fp16_params = [Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    for p in optimizer.fp16_params:
        p.grad = torch.randn(p.shape).to(dtype)
    optimizer.fp32_params = [Parameter(torch.randn(p.shape)) for p in optimizer.fp16_params]
    if layout == "flat":
        optimizer.fp32_params = {None: Parameter(torch.cat([p.data.flatten() for p in optimizer.fp32_params]))}
    for p in optimizer.fp32_params.values() if layout == "flat" else optimizer.fp32_params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer._needs_sync = True
    return optimizer


def held(optimizer):
    params = optimizer.fp32_params
    masters = list(params.values()) if isinstance(params, dict) else params
    return [*masters, *(p.grad for p in masters), *optimizer.fp16_params]


def with_a_missing_gradient(optimizer):
    optimizer.fp16_params[1].grad = None


def with_nothing_new(optimizer):
    optimizer._needs_sync = False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["flat", "each"])
@pytest.mark.parametrize("change", [lambda optimizer: None, with_a_missing_gradient, with_nothing_new])
@pytest.mark.parametrize("name", ["_sync_fp16_grads_to_fp32", "_sync_fp32_params_to_fp16"])
def test_the_same_as_one_by_one(dtype, layout, change, name):
    ours, theirs = optimizer_of(layout, dtype), optimizer_of(layout, dtype)
    for optimizer in (ours, theirs):
        change(optimizer)
    getattr(ours, name)()
    getattr(Mixin, name).__wrapped__(theirs)
    for one, other in zip(held(ours), held(theirs), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    assert ours._needs_sync == theirs._needs_sync


def test_gradients_of_any_strides():
    """Of those fairseq's own takes no flat copy."""
    plain, strided = optimizer_of("flat", torch.float16), optimizer_of("flat", torch.float16)
    strided.fp16_params[0].grad = plain.fp16_params[0].grad.t().contiguous().t()
    for optimizer in (plain, strided):
        optimizer._sync_fp16_grads_to_fp32()
    assert torch.equal(plain.fp32_params[None].grad, strided.fp32_params[None].grad)


def test_pairs_of_any_dtypes():
    sources = [torch.randn(2, 3), torch.randn(4).half(), torch.randn(5).double(), torch.randn(3)]
    targets = [torch.empty(2, 3).half(), torch.empty(4), torch.empty(5).double(), torch.empty(3)]
    copy_all(targets, sources)
    assert all(torch.equal(t, s.to(t.dtype)) for t, s in zip(targets, sources, strict=True))
    copy_all([], [])
    with pytest.raises(ValueError):
        copy_all(targets, sources[1:])
