"""Copies between parameters and the float32 ones behind them, and updates begun early, against fairseq's own."""

import math

import pytest
import torch
from fairseq import optim
from fairseq.optim import FairseqOptimizer
from fairseq.optim.dynamic_loss_scaler import DynamicLossScaler
from torch.nn import Parameter

from lamemo_fairseq.core.kernels.copies import copy_all
from lamemo_fairseq.host.adam import FusedAdam
from lamemo_fairseq.host.mixed_precision import FP16Optimizer
from lamemo_fairseq.host.optimizers import adopt, meanwhile

from .gpus import DEVICE

SHAPES = [(3, 4), (5,), (1, 1), (2, 3, 4)]


def optimizer_of(layout, dtype, device="cpu", kind=FP16Optimizer):
    """An optimizer with parameters that have gradients, and other float32 ones behind them."""
    torch.manual_seed(1)
    optimizer = kind.__new__(kind)
    optimizer._multiply_factor = 1.0
    optimizer.fp16_params = [Parameter(torch.randn(shape).to(device, dtype)) for shape in SHAPES]
    for p in optimizer.fp16_params:
        p.grad = torch.randn(p.shape).to(p)
    optimizer.fp32_params = [Parameter(torch.randn(p.shape, device=device)) for p in optimizer.fp16_params]
    if layout == "flat":
        optimizer.fp32_params = {
            optimizer.fp16_params[0].device.index: Parameter(
                torch.cat([p.data.flatten() for p in optimizer.fp32_params])
            )
        }
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
    ours, theirs = optimizer_of(layout, dtype), optimizer_of(layout, dtype, kind=optim.FP16Optimizer)
    for optimizer in (ours, theirs):
        change(optimizer)
    assert getattr(type(ours), name) is not getattr(type(theirs), name)
    getattr(ours, name)()
    getattr(theirs, name)()
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


class Inner(FairseqOptimizer):
    def __init__(self, params, **options):
        super().__init__(None)
        self._optimizer = FusedAdam(params, lr=0.1, **options)


def trained(begins, layout, scale, max_norm, gradients, factor=1 / 7, **options):
    """What is held after some updates, and the loss scale, if they begin before the norm is known or do not."""
    optimizer = optimizer_of(layout, torch.float16, DEVICE)
    masters = optimizer.fp32_params
    optimizer.fp32_optimizer = Inner(list(masters.values()) if isinstance(masters, dict) else masters, **options)
    adopt(optimizer.fp32_optimizer)
    optimizer.scaler = scale and DynamicLossScaler(scale, scale_window=2)
    begun = []
    for number, gradient in enumerate(gradients):
        optimizer.zero_grad()
        for p in optimizer.fp16_params:
            p.grad = torch.full_like(p, gradient)
        optimizer._needs_sync = True
        optimizer.multiply_grads(factor)
        if begins:
            before = [t.clone() for t in held(optimizer)]
            with meanwhile(lambda norm: begun.append(optimizer.begin_step(norm, max_norm))):
                norm = attempt(optimizer, max_norm)
            assert len(begun) == number + 1
            changed = not all(torch.equal(t, b) for t, b in zip(optimizer.fp16_params, before[-4:], strict=True))
            assert changed == (begun[-1] and math.isfinite(gradient))
        else:
            norm = attempt(optimizer, max_norm)
        if norm is not None:
            optimizer.step()
    moments = [t for state in optimizer.fp32_optimizer.optimizer.state.values() for t in state.items()]
    return held(optimizer), moments, optimizer.scaler and vars(optimizer.scaler), begun


def attempt(optimizer, max_norm):
    """The norm, None where the update is not made."""
    try:
        norm = optimizer.clip_grad_norm(max_norm)
    except OverflowError:
        norm = torch.tensor(math.inf)
    if norm.isfinite():
        return norm
    optimizer.zero_grad()


@pytest.mark.parametrize("layout", ["flat", "each"])
@pytest.mark.parametrize("scale", [None, 64.0])
@pytest.mark.parametrize("max_norm", [0.0, 0.01, 0.7, 1e3])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"factor": torch.tensor(1 / 7, dtype=torch.float64)}])
def test_an_update_begun_early_is_the_same_to_the_last_bit(layout, scale, max_norm, options):
    gradients = [1.0, 0.3, math.inf, 7.0, math.nan, 0.01, 0.5]
    if scale is None:  # the first that is not finite is the end
        gradients = [1.0, 0.3, 7.0, 0.01, 0.5, math.nan]
    ours, moments, scaler, begun = trained(True, layout, scale, max_norm, gradients, **options)
    theirs, expected, wanted, _ = trained(False, layout, scale, max_norm, gradients, **options)
    assert begun == ["amsgrad" not in options] * len(gradients)  # which fairseq alone has
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert [n for n, _ in moments] == [n for n, _ in expected] and scaler == wanted
    assert all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for (_, a), (_, b) in zip(moments, expected, strict=True)
    )
    if scale:
        assert scaler["_last_overflow_iter"] > 0
