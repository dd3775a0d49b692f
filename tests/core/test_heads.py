"""Projections as heads, and their gradients."""

import pytest
import torch

from lamemo_fairseq.core.kernels import rows, unit
from lamemo_fairseq.core.layers.heads import split_heads

from ..gpus import DEVICE

B, R, H, D = 2, 5, 3, 4


def beside(count):
    """Gradients as the fused attention makes them: the parts of one tensor."""
    torch.manual_seed(2)
    whole = torch.randn(B, R, count, H, D)
    return whole, [part.transpose(1, 2) for part in whole.unbind(2)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_gradients_side_by_side_are_not_copied(count):
    rows = torch.randn(B, R, count * H * D, requires_grad=True)
    parts = split_heads(rows, count, H)
    for n, part in enumerate(parts):
        assert part.equal(rows.unflatten(-1, (count, H, D))[:, :, n].transpose(1, 2))
    whole, grads = beside(count)
    (found,) = torch.autograd.grad(parts, rows, grads)
    assert found.data_ptr() == whole.data_ptr() and found.equal(whole.flatten(2))


@pytest.mark.parametrize(
    "arrange",
    [
        lambda whole, grads: [grads[1], grads[0], grads[2]],
        lambda whole, grads: [grads[0], grads[1].clone(), grads[2]],
        lambda whole, grads: [grad.contiguous() for grad in grads],
        lambda whole, grads: [grads[0], grads[1], torch.ones(()).expand_as(grads[2])],
        lambda whole, grads: [part.transpose(1, 2) for part in torch.cat([whole, whole], 2)[:, :, :3].unbind(2)],
        lambda whole, grads: [part.transpose(1, 2) for part in torch.cat([whole, whole])[::2].unbind(2)],
    ],
    ids=["other order", "one elsewhere", "of their own", "expanded", "wider rows", "every other stream"],
)
def test_any_other_gradients(arrange):
    rows = torch.randn(B, R, 3 * H * D, requires_grad=True)
    grads = arrange(*beside(3))
    (found,) = torch.autograd.grad(split_heads(rows, 3, H), rows, grads)
    assert found.equal(torch.stack([grad.transpose(1, 2) for grad in grads], dim=2).flatten(2))


def test_heads_that_are_not_used_have_no_gradient():
    rows = torch.randn(B, R, 2 * H * D, requires_grad=True)
    k, _ = split_heads(rows, 2, H)
    (found,) = torch.autograd.grad(k.sum(), rows)
    assert found[..., : H * D].eq(1).all() and found[..., H * D :].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("with_factor", [True, False])
def test_heads_of_length_one_by_a_kernel(with_factor, dtype, monkeypatch):
    """As plain operations in float64, of heads that are views; one is a row of zeros, as padding is."""
    shared_kernels = pytest.importorskip("lamemo_fairseq.core.kernels.shared_kernels", reason="the kernels need Triton")
    monkeypatch.setattr(shared_kernels, "PROGRAMS_PER_MULTIPROCESSOR", 6)  # two of a head: each has several tiles
    generator = torch.Generator().manual_seed(0)
    wide, grad = (torch.randn(3, 300, 3, 24, generator=generator).to(DEVICE, dtype) for _ in range(2))
    wide[1, 2] = 0
    factor = torch.tensor([0.5, -2.0, 3.0], device=DEVICE) if with_factor else None

    def results(function, exact):
        heads = wide.to(exact).requires_grad_()
        factors = None if factor is None else factor.to(torch.promote_types(exact, torch.float32)).requires_grad_()
        found = function(heads[..., 2:20].transpose(1, 2), factors)
        inputs = [heads] if factors is None else [heads, factors]
        return [found, *torch.autograd.grad(found, inputs, grad[..., :18].transpose(1, 2).to(exact))]

    monkeypatch.setattr(rows, "fusable", lambda t: True)
    for found, exact in zip(results(unit.unit, dtype), results(unit.plain, torch.float64), strict=True):
        assert float((found.double() - exact).detach().norm() / exact.detach().norm()) < 8 * torch.finfo(dtype).eps
