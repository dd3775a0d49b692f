"""Projections as heads, and their gradients."""

import pytest
import torch

from lamemo_fairseq.core.layers.heads import split_heads

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
