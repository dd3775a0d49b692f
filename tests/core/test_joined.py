"""Rows behind constant ones: their projections, their residual, and gradients of theirs alone."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lamemo_fairseq.core.kernels import aligned
from lamemo_fairseq.core.kernels.padded import join, last_of, newest_of
from lamemo_fairseq.core.layers.heads import project_last

from .helpers import random_tokens, tiny_decoder

B, SLOTS, N, D, WIDTH = 2, 3, 4, 6, 5


class Products(TorchDispatchMode):
    """Counts multiplications of products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if "mm" in operation.overloadpacket.__name__:
            left, right = args[-2:]
            self.count += left.numel() * right.size(-1)
        return operation(*args, **(kwargs or {}))


def given():
    torch.manual_seed(0)
    past, new, weight = torch.randn(B, SLOTS, D), torch.randn(B, N, D), torch.randn(3 * WIDTH, D)
    return past.double(), new.double().requires_grad_(), weight.double().requires_grad_()


def grads():
    torch.manual_seed(1)
    return [torch.randn(B, N, WIDTH).double(), torch.randn(B, SLOTS + N, 2 * WIDTH).double()]


def test_projections_and_their_gradients():
    past, new, weight = given()
    found = project_last(new, torch.cat([past, new], 1), weight)
    expected = F.linear(new, weight[:WIDTH]), F.linear(torch.cat([past, new], 1), weight[WIDTH:])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    for inputs in ([new, weight], [new], [weight]):
        for one, other in zip(
            torch.autograd.grad(found, inputs, grads(), retain_graph=True),
            torch.autograd.grad(expected, inputs, grads(), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_nothing_is_computed_for_constant_rows():
    past, new, weight = given()
    outputs = project_last(new, torch.cat([past, new], 1), weight)
    with Products() as products:
        torch.autograd.grad(outputs, [new, weight], grads())
    weights, rows = N * WIDTH + (SLOTS + N) * 2 * WIDTH, N * 3 * WIDTH
    assert products.count == B * D * (weights + rows)


def test_the_last_rows_of_joined_ones():
    past, new, _ = given()
    rows = join(past, new)
    assert last_of(rows, N) is new and last_of(rows, N - 1).equal(new[:, 1:]) and newest_of(rows) is new
    assert last_of(rows.clone(), N).equal(new) and newest_of(view := rows[:, :]) is view
    rows = join(past.requires_grad_(), new)  # the past has a gradient
    assert newest_of(rows) is rows


@pytest.mark.parametrize("waits", [torch.Tensor.retain_grad, lambda rows: rows.register_hook(lambda grad: None)])
def test_somebody_who_waits_for_the_gradient_of_all_rows_gets_it(waits):
    past, new, _ = given()
    rows = join(past, new)
    waits(rows)
    assert newest_of(rows) is rows


def test_rows_that_have_changed_are_not_taken_for_those_of_before():
    past, new, _ = given()
    with torch.no_grad():
        rows, others = join(past, new), join(past, new)
        rows.mul_(2)
        assert last_of(rows, N).equal(2 * new)
        new.mul_(3)
    assert last_of(others, N).equal(new / 3)
    with torch.inference_mode():
        rows = join(past, new.clone())
        rows.mul_(2)
        assert last_of(rows, N).equal(2 * new)


def doubles(module, inputs):
    inputs[0].mul_(2)


def replaces(module, inputs):
    return (2 * inputs[0], *inputs[1:])


def notes(module, inputs):
    module.noted = inputs[0]
    inputs[0].retain_grad()


@pytest.mark.parametrize("hook", [doubles, replaces, notes])
def test_hooks_before_a_layer(hook):
    """What they do to rows, and gradients that they wait for, are the same with gradients of the last rows alone."""
    found = []
    for backend in ("eager", "blocked"):
        options = {"memory": "recurrent", "position_encoding": "transformer-xl", "attention_backend": backend}
        decoder = tiny_decoder(**options).train()
        layer = decoder.layers[1]
        layer.register_forward_pre_hook(hook)
        first, second = random_tokens(2, 6).split(3, dim=1)
        features = decoder.read_segment(second, decoder.read_segment(first, None).state).features
        features.logsumexp(-1).sum().backward()
        gradients = [p.grad for p in decoder.parameters() if p.grad is not None]
        found.append([features, *gradients, *([layer.noted.grad] if hook is notes else [])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"decoder_normalize_before": True}, {"checkpoint_activations": True}], ids=str)
@pytest.mark.parametrize("matters", [False, True])
def test_a_decoder(options, matters, monkeypatch):
    """Against a decoder whose rows are not known to be joined."""
    monkeypatch.setattr(aligned, "matters", lambda x: matters)
    found = []
    for known in (True, False):
        with monkeypatch.context() as patched:
            if not known:
                for module in ("kernels.padded", "layers.layer", "layers.self_attention"):
                    patched.setattr(f"lamemo_fairseq.core.{module}.newest_of", lambda rows: rows)
            chosen = {"memory": "recurrent", "position_encoding": "transformer-xl", "attention_backend": "blocked"}
            decoder = tiny_decoder(**chosen, **options, decoder_embed_dim=10, decoder_ffn_embed_dim=9).train()
            state, loss = None, 0.0
            for segment in random_tokens(2, 9).split(3, dim=1):
                features, state, _ = decoder.read_segment(segment, state)
                loss = loss + features.square().sum()
            found.append([loss, *torch.autograd.grad(loss, list(decoder.parameters()), allow_unused=True)])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
