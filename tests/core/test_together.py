"""Biases of all layers, padded and summed together, against those of each layer."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lamemo_fairseq.core.attention import RelativeBias
from lamemo_fairseq.core.attention.padding import as_wide
from lamemo_fairseq.core.kernels import aligned
from lamemo_fairseq.core.positions import LayerBias
from lamemo_fairseq.core.positions.together import together

HEADS, SIZE = 2, 5


class Counting(TorchDispatchMode):
    """Counts operations that compute something."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.operations += not operation.is_view
        return operation(*args, **(kwargs or {}))


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def case(layers):
    """Biases that layers share, tables of their own, and a second bias to the right in the upper layers."""
    torch.manual_seed(0)
    content, position, ahead = (leaf(HEADS, SIZE) for _ in range(3))
    past, future, score = leaf(layers, HEADS, 7, SIZE), leaf(layers - 1, HEADS, 4, SIZE), leaf(HEADS, 7)
    biases = [LayerBias(RelativeBias(content, position, table, score), None) for table in past]
    for n, table in enumerate(future, 1):
        biases[n] = biases[n]._replace(ahead=RelativeBias(content, ahead, table))
    return [content, position, ahead, past, future], biases


def product(biases, width):
    """A number that depends on every entry of every field of every layer."""
    like, total = torch.empty(width), 0.0
    for n, bias in enumerate(biases):
        for m, part in enumerate((bias.causal, bias.ahead)):
            fields = [] if part is None else [t for t in (part.content, part.position, part.table) if t is not None]
            total = total + sum(((n + 1) * as_wide(like, t) ** (2 + m)).sum() for t in fields)
    return total


@pytest.mark.parametrize("pads", [False, True])
def test_each_layer_gets_its_own(pads, monkeypatch):
    monkeypatch.setattr(aligned, "matters", lambda x: pads)
    width = 8 if pads else SIZE
    leaves, biases = case(3)
    new = together(biases, torch.empty(1, 1, 1))
    for bias, other in zip(new, biases, strict=True):
        assert bias.causal.table.shape == (HEADS, 7, width) and bias.causal.content.shape == (HEADS, width)
        assert (bias.ahead is None) == (other.ahead is None) and bias.causal.score is other.causal.score
        if bias.ahead is not None:  # memory tokens take both sides in one call if they have the same biases
            assert bias.ahead.content is bias.causal.content and bias.ahead.position is not bias.causal.position
    one, other = product(new, width), product(biases, width)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    for gradient, expected in zip(torch.autograd.grad(one, leaves), torch.autograd.grad(other, leaves), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_more_layers_need_no_more_operations(monkeypatch):
    monkeypatch.setattr(aligned, "matters", lambda x: True)
    counts = []
    for layers in (3, 9):
        leaves, biases = case(layers)
        with Counting() as forward:
            new = together(biases, torch.empty(1, 1, 1))
        fields = [t for bias in new for part in (bias.causal, bias.ahead) if part is not None for t in part[:3]]
        outputs = list({id(t): t for t in fields if t is not None}.values())
        grads = [torch.ones_like(t) for t in outputs]
        with Counting() as backward:
            torch.autograd.grad(outputs, leaves, grads)
        counts.append((forward.operations, backward.operations))
    assert counts[0] == counts[1]


def test_gradients_of_what_one_layer_uses_alone(monkeypatch):
    """A bias that the others leave out, and one that none uses."""
    monkeypatch.setattr(aligned, "matters", lambda x: True)
    leaves, biases = case(3)
    new = together(biases, torch.empty(1, 1, 1))
    used = new[1].causal.content.sum()
    content, position = torch.autograd.grad(used, leaves[:2], allow_unused=True)
    assert torch.equal(content, torch.ones_like(content)) and position is None
