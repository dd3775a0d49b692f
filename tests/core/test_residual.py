"""The kernels between a layer's parts against float64: residual and norm, activation; outputs and every gradient.

Without a GPU they run in Triton's interpreter, in float32 and float16 (its bfloat16 is wrong).
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lamemo_fairseq.core.kernels import activation, padded, residual, rows
from lamemo_fairseq.core.layers import DecoderLayer, LayerConfig, layer

pytest.importorskip("triton", reason="the kernels need Triton")
from lamemo_fairseq.core.kernels import shared_kernels

from ..gpus import DEVICE

pytestmark = pytest.mark.usefixtures("nan_buffers")

GPU = DEVICE == "cuda"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NAMES = ("x", "rows", "gamma", "beta", "bias")
KEEP = nn.Identity()  # no dropout


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Each has several tiles to go through; on a GPU there are as many as ever."""
    if not GPU:
        monkeypatch.setattr(shared_kernels, "PROGRAMS_PER_MULTIPROCESSOR", 2)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm_of(gamma, beta):
    norm = nn.LayerNorm(len(gamma))
    norm.weight, norm.bias = nn.Parameter(gamma), nn.Parameter(beta)
    return norm


def run(function, tensors, skipped, dropout, grads):
    """Sum and norm, and the gradients of *tensors*; x and rows may be strided."""
    x, every, gamma, beta, bias = tensors
    norm = norm_of(gamma.detach(), beta.detach())
    total, normed = function(x, every[:, skipped:], norm, dropout, bias)
    loss = sum((out * grad.to(out)).sum() for out, grad in zip((total, normed), grads, strict=True) if grad is not None)
    return total, normed, torch.autograd.grad(loss, [x, every, norm.weight, norm.bias, bias])


def given(dtype, streams, count, skipped, d, at_least=0):
    x = normal(streams, count, d, seed=1)
    rough = [
        x + at_least * x.sign(),
        normal(streams, skipped + count, d, seed=2) + 1,
        1 + 0.5 * normal(d, seed=3),
        normal(d, seed=4),
        normal(d, seed=5),
    ]
    low = [t.to(DEVICE, dtype) for t in rough]
    return [t.clone().requires_grad_() for t in low], [t.double().requires_grad_() for t in low]


def close(found, wanted, dtype, name, amplified=1.0):
    scale = amplified * max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    torch.testing.assert_close(
        found.double(), wanted, rtol=0, atol=TOLERANCE[dtype] * scale, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("streams", "count", "skipped", "d"),
    [(1, 3, 0, 1), (2, 19, 3, 41), (2, 7, 2, 410), (3, 5, 0, 512), (1, 3, 1, 2100), (2, 0, 2, 24)],
)
@pytest.mark.parametrize("both", [False, True])
def test_residual_norm_is_the_plain_one(dtype, streams, count, skipped, d, both):
    low, exact = given(dtype, streams, count, skipped, d)
    grads = [normal(streams, count, d, seed=6).to(DEVICE, dtype) if both else None, normal(streams, count, d, seed=7)]
    grads[1] = grads[1].to(DEVICE, dtype)
    found, wanted = run(residual.by_kernel, low, skipped, 0.0, grads), run(residual.plain, exact, skipped, KEEP, grads)
    for name, one, other in zip(("sum", "norm"), found[:2], wanted[:2], strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        close(one, other, dtype, name)
    # The norm of one number is its bias: what is left of its gradient is rounding, divided by the root of eps.
    amplified = 1e-5**-0.5 if d == 1 else 1.0
    for name, one, other in zip(NAMES, found[2], wanted[2], strict=True):
        assert one.shape == other.shape
        close(one, other, dtype, name, amplified)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [41, 64])
def test_one_dropout_in_both_passes(dtype, d):
    """The mask, read from the sum, explains the outputs and every gradient."""
    p = 0.3
    low, exact = given(dtype, 2, 33, 1, d, at_least=8)
    grads = [normal(2, 33, d, seed=6).to(DEVICE, dtype), normal(2, 33, d, seed=7).to(DEVICE, dtype)]
    torch.manual_seed(1)
    total, normed, found = run(residual.by_kernel, low, 1, p, grads)
    with torch.no_grad():
        kept = ((total - low[1][:, 1:]).double().abs() > 2).double()
    assert abs(kept.mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
    # Neither rows nor columns share a mask.
    assert len({tuple(row) for row in kept.flatten(0, 1).tolist()}) == 66
    assert len({tuple(column) for column in kept.flatten(0, 1).T.tolist()}) == d

    def with_mask(x, rows_, norm, dropout, bias):
        s = rows_ + (x + bias) * kept / (1 - dropout)
        return s, norm(s)

    wanted = run(with_mask, exact, 1, p, grads)
    for name, one, other in zip(
        ("sum", "norm", *NAMES), (total, normed, *found), (*wanted[:2], *wanted[2]), strict=True
    ):
        close(one, other, dtype, name)


def test_another_seed_is_another_mask_and_checkpointing_draws_the_same():
    low, _ = given(torch.float32, 1, 9, 0, 40)
    norm = norm_of(low[2].detach(), low[3].detach())

    def call(x, every):
        return residual.by_kernel(x, every, norm, 0.5)[1]

    torch.manual_seed(1)
    first, second = call(*low[:2]), call(*low[:2])
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    kept = checkpoint(call, *low[:2], use_reentrant=False)
    assert torch.equal(first, kept)
    for one, other in zip(
        torch.autograd.grad(first.square().sum(), low[:2]),
        torch.autograd.grad(kept.square().sum(), low[:2]),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [t for t in DTYPES if t.itemsize == 2])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_half_precision_rows_are_padded_by_zeros_in_storage(dtype, dropout):
    """Output, gradients and what they are taken of: x as wide as its storage, rows whose storage goes on, with NaN."""
    d, wide = 42, 48
    low, _ = given(dtype, 2, 5, 0, d)
    stored = torch.full((2, 5, wide), math.nan, dtype=dtype, device=DEVICE)
    every = stored[..., :d].copy_(low[1].detach()).detach().requires_grad_()
    x = F.pad(low[0].detach(), (0, wide - d)).requires_grad_()
    norm = norm_of(low[2].detach(), low[3].detach())
    torch.manual_seed(1)
    found = residual.by_kernel(x, every, norm, dropout)
    torch.manual_seed(1)
    narrow = residual.by_kernel(low[0], low[1], norm, dropout)
    grads = torch.autograd.grad(found[1].sum() + found[0].square().sum(), [x, every])
    same = torch.autograd.grad(narrow[1].sum() + narrow[0].square().sum(), low[:2])
    for one, other in zip((*found, *grads), (*narrow, *same), strict=True):
        assert torch.equal(one[..., :d], other)
        assert one.stride() == (5 * wide, wide, 1)
        behind = one.as_strided((2, 5, wide), (5 * wide, wide, 1))[..., d:]
        assert torch.equal(behind, torch.zeros_like(behind))
    found[1].detach().add_(1)  # no view that autograd would guard


def test_without_gradients_no_sum_is_kept():
    low, exact = given(torch.float32, 2, 3, 1, 24)
    norm = norm_of(low[2].detach(), low[3].detach())
    with torch.no_grad():
        total, normed = residual.by_kernel(low[0], low[1][:, 1:], norm, 0.0, low[4], keep=False)
        wanted = residual.plain(exact[0], exact[1][:, 1:], norm.double(), KEEP, exact[4])[1]
    assert total is None
    close(normed, wanted, torch.float32, "norm")


def test_what_the_kernel_leaves_to_pytorch(monkeypatch):
    monkeypatch.setattr(rows, "fusable", lambda t: t.dtype in rows.DTYPES)
    norm, dropout, x = nn.LayerNorm(8), nn.Dropout(0.1), torch.zeros(1, 2, 8)
    assert residual.takes(x, x, norm, dropout)
    assert not residual.takes(x, x, norm, nn.Dropout(1.0))
    assert residual.takes(x, x, norm, nn.Dropout(1.0).eval())
    assert not residual.takes(x, x.double(), norm, dropout)
    assert not residual.takes(x.half(), x, norm, dropout)
    assert not residual.takes(x, x, nn.LayerNorm(8, elementwise_affine=False), dropout)
    assert not residual.takes(x, x, type("Other", (nn.LayerNorm,), {})(8), dropout)
    assert not residual.takes(x, x, norm, type("Other", (nn.Dropout,), {})(0.1))
    for part in (norm, dropout):
        handle = part.register_forward_hook(lambda *_: None)
        assert not residual.takes(x, x, norm, dropout)
        handle.remove()
    assert residual.takes(x, x, norm, dropout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width", "padding"), [(3, 1, 0), (37, 41, 0), (37, 300, 4), (0, 24, 0), (9, 512, 0)])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_activation_is_the_plain_one(dtype, count, width, padding, dropout):
    """Dropout's mask is read from the output, where the input is positive."""
    x = F.pad(normal(2, count, width, seed=1), (0, padding)).to(DEVICE, dtype)
    bias, grad = (normal(n, seed=2).to(DEVICE, dtype) for n in (width, 2 * count * (width + padding)))
    grad = grad.view_as(x)
    low = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
    exact = [x.double().requires_grad_(), bias.double().requires_grad_()]
    found = activation.by_kernel(low[0], dropout, low[1])
    before = exact[0] + F.pad(exact[1], (0, padding))
    kept = torch.where(before > 0, (found != 0).double(), 1.0).detach()
    wanted = before.relu() * kept / (1 - dropout)
    drawn = kept[(before > 0)]
    if dropout and count > 30:
        assert abs(drawn.mean().item() - (1 - dropout)) < 5 * math.sqrt(dropout * (1 - dropout) / len(drawn))
    elif not dropout:
        assert bool((drawn == 1).all())
    close(found, wanted, dtype, "output")
    grads = torch.autograd.grad(found, low, grad), torch.autograd.grad(wanted, exact, grad.double())
    for name, one, other in zip(("x", "bias"), *grads, strict=True):
        assert one.shape == other.shape and one.dtype == dtype
        close(one, other, dtype, name)


def test_activation_without_bias_keeps_nan():
    x = torch.tensor([[math.nan, -1.0, 2.0, math.inf]], device=DEVICE, requires_grad=True)
    out = activation.by_kernel(x, 0.0)
    assert out.isnan().tolist() == [[True, False, False, False]]
    assert out[0, 1:].tolist() == [0.0, 2.0, math.inf]
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert grad[0, 1:].tolist() == [0.0, 1.0, 1.0]


class Halving(nn.Module):
    """An attention that leaves out the first rows."""

    def __init__(self, d):
        super().__init__()
        self.out = nn.Linear(d, d, bias=False)

    def forward(self, given, queries):
        return self.out(given[:, -queries:]), None


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_layer_by_kernels_is_the_plain_one(monkeypatch, before, checkpointing, dtype):
    config = LayerConfig(42, 30, normalize_before=before, checkpoint_activations=checkpointing)
    torch.manual_seed(1)
    plain = DecoderLayer(config, Halving(42)).to(DEVICE, dtype)
    for p in plain.parameters():  # norms and biases too
        nn.init.normal_(p, std=0.3)
    with torch.no_grad():  # no ReLU so near its kink that rounding decides
        plain.feed_forward.fc1.weight.mul_(0.2)
        plain.feed_forward.fc1.bias.copy_(3 * plain.feed_forward.fc1.bias.sign())
    exact = copy.deepcopy(plain).double()
    given = normal(2, 9, 42).to(DEVICE, dtype)
    low, high = given.clone().requires_grad_(), given.double().requires_grad_()
    calls = []
    for owner in (residual, activation):
        by_kernel = owner.by_kernel
        monkeypatch.setattr(owner, "by_kernel", lambda *a, _f=by_kernel, **k: calls.append(_f) or _f(*a, **k))
    for owner in (rows, layer):
        monkeypatch.setattr(owner, "fusable", lambda t: t.dtype in rows.DTYPES)
    wanted = exact(high, 6)[0]
    assert not calls
    # Other leaves over the parameters' memory, as a recording has them.
    leaves = {name: p.detach().requires_grad_() for name, p in plain.named_parameters()}
    found = torch.func.functional_call(plain, leaves, (low, 6))[0]
    assert len(calls) == (2 if before else 3)
    close(found, wanted, dtype, "output")
    grad = normal(2, 6, 42, seed=2).to(DEVICE, dtype)
    gradients = torch.autograd.grad(found, [low, *leaves.values()], grad)
    for name, one, other in zip(
        ("rows", *leaves),
        gradients,
        torch.autograd.grad(wanted, [high, *exact.parameters()], grad.double()),
        strict=True,
    ):
        close(one, other, dtype, name)
    with torch.no_grad():
        close(plain.eval()(low, 6)[0], wanted, dtype, "inference")


def test_a_hook_on_the_feed_forward_is_called_where_kernels_serve(monkeypatch):
    """It sees the output with the bias, and the layer's output stays the same."""
    monkeypatch.setattr(layer, "fusable", lambda t: t.dtype in rows.DTYPES)
    torch.manual_seed(1)
    one = DecoderLayer(LayerConfig(42, 30), Halving(42)).to(DEVICE)
    nn.init.normal_(one.feed_forward.fc2.bias)
    given, seen = normal(2, 9, 42).to(DEVICE, torch.float32), []
    with torch.no_grad():
        expected = one(given, 6)[0]
        handle = one.feed_forward.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
        found = one(given, 6)[0]
        handle.remove()
        ((x, output),) = seen
        hidden = F.relu(one.feed_forward.fc1(x))
        torch.testing.assert_close(output, one.feed_forward.fc2(hidden))
        one(given, 6)
    assert len(seen) == 1
    close(found, expected.double(), torch.float32, "output")


def test_padding_is_read_only_inside_its_storage_and_never_counts():
    stored = torch.full((2, 5, 48), math.nan, dtype=torch.float16, device=DEVICE)
    short = stored.view(-1)[: 2 * 5 * 48 - 6].clone().as_strided((2, 5, 42), (240, 48, 1))
    assert [padded.readable(t) for t in (stored[..., :42], short, stored[..., 6:])] == [48, 42, 42]
    low, _ = given(torch.float16, 2, 5, 0, 42)
    out = residual.by_kernel(low[0], low[1], norm_of(low[2].detach(), low[3].detach()), 0.0)[1]
    grad = normal(2, 5, 42).to(DEVICE, torch.float16)
    found = torch.autograd.grad(out, low[:2], stored[..., :42].copy_(grad), retain_graph=True)
    for one, other in zip(found, torch.autograd.grad(out, low[:2], grad), strict=True):
        assert torch.equal(one, other)


def test_sums_over_many_programs():
    partial = normal(2, 600, 20).to(DEVICE, torch.float32)
    torch.testing.assert_close(shared_kernels.sums(partial, 17, torch.float32), partial[..., :17].sum(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 8, 10])
def test_joined_rows(dtype, width):
    """Zeros stand behind them where a kernel would take them; the slots have a gradient if a memory maps them."""
    past, new = (normal(2, n, width, seed=n).to(DEVICE, dtype) for n in (3, 4))
    for join in (padded.join, padded._Join.apply):
        given, mapped = new.clone().requires_grad_(), past.clone().requires_grad_()
        grad = normal(2, 7, width, seed=9).to(given)
        assert torch.equal(torch.autograd.grad(join(mapped, given), mapped, grad)[0], grad[:, :3])
        joined = join(past, given)
        assert torch.equal(joined, torch.cat([past, new], dim=1))
        joined.backward(grad)
        assert torch.equal(given.grad, grad[:, 3:])
    stored = padded.stored_width(new, width)
    assert padded.readable(joined) == stored
    assert isinstance(joined, padded.PaddedRows) == (stored > width)
    assert not joined.as_strided((2, 7, stored), joined.stride())[..., width:].any()
