"""Rows that a product and a residual share: their gradient, and that nothing else adds it up."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lamemo_fairseq.core.kernels import rows as rows_module
from lamemo_fairseq.core.kernels import shared as shared_module
from lamemo_fairseq.core.kernels.shared import as_residual, product, shared_of
from lamemo_fairseq.core.layers import layer

from ..gpus import DEVICE
from .helpers import random_tokens, tiny_decoder

B, R, D, E = 2, 3, 5, 4


class Sum(torch.autograd.Function):
    """The sum of both, as a residual's operation stores its gradient."""

    @staticmethod
    def forward(ctx, x, residual, shared):
        ctx.shared = shared
        return x + residual

    @staticmethod
    def backward(ctx, grad):
        ctx.shared.store(grad.clone())
        return grad, grad.clone(), None


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    monkeypatch.setattr(shared_module, "fusable", lambda rows: True)


def given():
    torch.manual_seed(0)
    rows, weight, back = torch.randn(B, R, D), torch.randn(E, D), torch.randn(D, E)
    return rows.double().requires_grad_(), weight.double().requires_grad_(), back.double()


def plain(rows, weight, back):
    return F.linear(F.linear(rows, weight).square(), back) + rows


def once(rows, weight, back):
    residual, shared = as_residual(rows)
    return Sum.apply(F.linear(product(rows, weight, shared).square(), back), residual, shared)


def twice(rows, weight, back):
    """Half of each of two products."""
    residual, shared = as_residual(rows)
    made = (product(rows, weight, shared).square() + product(rows, weight, shared).square()) / 2
    return Sum.apply(F.linear(made, back), residual, shared)


def apart(rows, weight, back):
    """The rows' product does not know of the residual."""
    residual, shared = as_residual(rows)
    return Sum.apply(F.linear(F.linear(rows, weight).square(), back), residual, shared)


def of_some(rows, weight, back):
    """A product of fewer rows than the residual has comes first in the backward pass."""
    residual, shared = as_residual(rows)
    first, last = product(rows[:, :1], weight, shared), product(rows[:, 1:], weight, shared)
    return Sum.apply(F.linear(torch.cat([first, last], 1).square(), back), residual, shared)


@pytest.mark.parametrize("function", [once, twice, apart, of_some])
@pytest.mark.parametrize("wanted", ["rows", "weight", "both", "rows before"])
def test_gradients(function, wanted):
    rows, weight, back = given()
    inputs = {"rows": [rows], "weight": [weight], "both": [rows, weight], "rows before": [rows, weight]}[wanted]

    def result(function):
        return function(rows.sin() if wanted == "rows before" else rows, weight, back).cos().sum()

    made, expected = result(function), result(plain)
    other = torch.autograd.grad(expected, inputs)
    for keeps in (True, True, False):  # the same graph several times
        for one, exact in zip(torch.autograd.grad(made, inputs, retain_graph=keeps), other, strict=True):
            torch.testing.assert_close(one, exact, rtol=1e-12, atol=1e-12)


def test_a_product_that_nobody_uses_takes_nothing():
    rows, weight, _ = given()
    residual, shared = as_residual(rows)
    product(rows, weight, shared)
    (found,) = torch.autograd.grad(Sum.apply(rows.detach(), residual, shared).sum(), rows)
    assert found.equal(torch.ones_like(rows))


def test_rows_that_have_changed_share_nothing():
    rows, _, _ = given()
    rows = rows * 1
    as_residual(rows)
    assert shared_of(rows) is not None
    rows.mul_(2)
    assert shared_of(rows) is None
    with torch.no_grad():
        assert as_residual(rows) == (rows, None)


class Sums(TorchDispatchMode):
    """Counts sums of whole rows."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        if operation in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
            self.count += made.shape[:-1] == self.shape
        return made


@pytest.fixture
def kernels(monkeypatch):
    pytest.importorskip("triton", reason="the kernels need Triton")
    if DEVICE == "cpu":
        for module in (rows_module, layer):
            monkeypatch.setattr(module, "fusable", lambda t: t.dtype in rows_module.DTYPES)


def decoder_of(memory, positions, **options):
    sizes = {"attention_backend": "fused", "dropout": 0.5, "dtype": torch.float32, "decoder_layers": 3, **options}
    return tiny_decoder(memory=memory, position_encoding=positions, **sizes).to(DEVICE).train()


@pytest.mark.parametrize(("memory", "positions"), [("recurrent", "transformer-xl"), ("lookahead", "disentangled")])
def test_a_decoder_adds_no_gradients_of_rows(memory, positions, kernels):
    """In LaMemo's last layer queries and residual are slices of rows that all have a gradient."""
    decoder = decoder_of(memory, positions)
    first, second = random_tokens(2, 6).to(DEVICE).split(3, dim=1)
    features = decoder.read_segment(second, decoder.read_segment(first, None).state).features
    with Sums((2, 6 if memory == "lookahead" else 3)) as sums:
        features.sum().backward()
    assert sums.count == (2 if memory == "lookahead" else 0)


TXL, LAMEMO = ("recurrent", "transformer-xl"), ("lookahead", "disentangled")


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        (TXL, {"dropout": 0.0}),
        (TXL, {"checkpoint_activations": True}),
        (TXL, {"decoder_normalize_before": True}),
        (LAMEMO, {}),
        (LAMEMO, {"hook": True}),
    ],
    ids=str,
)
def test_a_decoder_has_the_same_gradients(variant, options, kernels, monkeypatch):
    """As one whose residuals share nothing, with the same random numbers."""
    options, found = dict(options), []
    hook = options.pop("hook", False)
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(layer, "as_residual", lambda rows: (rows, None))
        decoder, seen = decoder_of(*variant, **options), []
        if hook:
            decoder.layers[1].register_full_backward_hook(lambda module, given, made, seen=seen: seen.extend(given))
        torch.manual_seed(0)
        state, loss = None, 0.0
        for segment in random_tokens(2, 9).to(DEVICE).split(3, dim=1):
            features, state, _ = decoder.read_segment(segment, state)
            loss = loss + features.square().mean()
        loss.backward()
        found.append(
            [loss, *(p.grad for p in decoder.parameters() if p.grad is not None), *filter(torch.is_tensor, seen)]
        )
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
