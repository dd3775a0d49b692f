"""Adam in one launch against fairseq's own."""

import copy

import pytest
import torch
from fairseq.optim.adam import Adam
from torch.nn import Parameter

from lamemo_fairseq.host.adam import FusedAdam


def trained(kind, dtype, updates=5, missing=(), saved=None, **options):
    """Parameters and moments after some updates; those in *missing* get no gradient in the first three."""
    torch.manual_seed(1)
    params = [Parameter(torch.randn(shape).to(dtype)) for shape in ((4, 3), (7,), ())]
    optimizer = kind(params, lr=0.1, eps=1e-3, **options)
    if saved is not None:
        optimizer.load_state_dict(copy.deepcopy(saved))
    for update in range(updates):
        for index, p in enumerate(params):
            gradient = torch.randn(p.shape).to(dtype)
            p.grad = None if index in missing and update < 3 else gradient
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"betas": (0.5, 0.7)}, {"amsgrad": True}])
@pytest.mark.parametrize("missing", [(), (1,), (0, 2)])
def test_the_same_update(dtype, options, missing):
    """Eps is large, so that its place in the formula shows."""
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    (ours, one), (expected, other) = (trained(kind, dtype, missing=missing, **options) for kind in (FusedAdam, Adam))
    torch.testing.assert_close(ours, expected, **tolerance)
    for p, q in zip(ours, expected, strict=True):
        assert one.state[p].keys() == other.state[q].keys()
        torch.testing.assert_close(dict(one.state[p]), dict(other.state[q]), **tolerance)


def test_half_precision_is_left_to_fairseq():
    (ours, _), (expected, _) = (trained(kind, torch.float16) for kind in (FusedAdam, Adam))
    assert all(torch.equal(p, q) for p, q in zip(ours, expected, strict=True))


def test_either_goes_on_from_the_other():
    _, before = trained(FusedAdam, torch.float64)
    saved = before.state_dict()
    (ours, _), (expected, _) = (trained(kind, torch.float64, saved=saved) for kind in (FusedAdam, Adam))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_a_closure_is_called_once():
    _, optimizer = trained(FusedAdam, torch.float32)
    calls = []
    assert optimizer.step(lambda: calls.append(1) or 3.0) == 3.0 and len(calls) == 1


def test_an_update_on_condition():
    """It is the usual one, unless it is to be skipped; then only what is counted later could tell."""
    (expected, other), (params, optimizer) = (trained(FusedAdam, torch.float32) for _ in range(2))
    gradients = [torch.randn(p.shape) for p in params]
    before = copy.deepcopy((params, optimizer.state_dict()))
    for p, q, gradient in zip(params, expected, gradients, strict=True):
        p.grad, q.grad = gradient.clone(), gradient.clone()
    optimizer.begin_step(skip=torch.tensor(1.0))
    for p, q in zip(params, before[0], strict=True):
        assert torch.equal(p, q)
    torch.testing.assert_close(optimizer.state_dict(), before[1], rtol=0, atol=0)
    optimizer.begin_step(skip=torch.tensor(0.0))()
    other.step()
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p, q)
    torch.testing.assert_close(optimizer.state_dict(), other.state_dict(), rtol=0, atol=0)
