"""Residual, dropout and layer norm in one kernel, and activation with dropout, against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lamemo_fairseq.modules import residual

pytest.importorskip("triton")
device = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.float16, *([torch.bfloat16] if device == "cuda" else [])]  # the interpreter has no bfloat16
DTYPES = [torch.float32, *HALF]
ERROR = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.fixture(autouse=True)
def kernels_serve(monkeypatch):
    """Without a GPU too, interpreted; and what they do not write is not a number."""
    monkeypatch.setattr(residual, "_serves", lambda x, *others: x.numel() > 0)
    empty = torch.Tensor.new_empty

    def spoilt(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", spoilt)


def inputs(shape, dtype, rows_before=2):
    """A summand, and a residual that is the end of longer rows; a norm that is none by chance."""
    torch.manual_seed(1)
    batch, queries, width = shape
    norm = nn.LayerNorm(width)
    nn.init.normal_(norm.weight, 1.0, 0.5)
    nn.init.normal_(norm.bias)
    x = torch.randn(shape).to(device, dtype).requires_grad_()
    longer = torch.randn(batch, rows_before + queries, width).to(device, dtype).requires_grad_()
    return x, longer, norm.to(device, dtype)


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-12))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 7, 41), (2, 5, 64), (1, 3, 410)], ids=str)
def test_residual_norm(shape, dropout, dtype):
    x, longer, norm = inputs(shape, dtype)
    rest = longer[:, 2:]
    found = residual.residual_norm(x, rest, norm, dropout)
    assert found.shape == x.shape and found.dtype == dtype
    grad = torch.randn(shape).to(device, dtype)
    gradients = torch.autograd.grad(found, [x, longer, norm.weight, norm.bias], grad)
    # The gradients of the summands differ by dropout alone.
    kept = torch.ones(shape, dtype=torch.float64, device=device)
    if dropout:
        kept = torch.where(gradients[0] != 0, 1 / (1 - dropout), 0.0).double()
    exact = [t.detach().double().requires_grad_() for t in (x, longer, norm.weight, norm.bias)]
    wanted = F.layer_norm(exact[1][:, 2:] + exact[0] * kept, shape[-1:], exact[2], exact[3], norm.eps)
    assert error(found, wanted) < ERROR[dtype]
    if shape[-1] > 1:  # of one number the norm is the bias, and the gradients are rounding
        for one, other in zip(gradients, torch.autograd.grad(wanted, exact, grad.double()), strict=True):
            assert error(one, other) < ERROR[dtype]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rows_stand_16_bytes_apart_with_zeros_behind(dtype):
    x, longer, norm = inputs((2, 3, 13), dtype)
    out = residual.residual_norm(x, longer[:, 2:], norm, 0.2)
    d_x, d_rest = torch.autograd.grad(out, [x, longer], torch.ones_like(out))
    assert d_rest.isfinite().all()
    assert out.stride(1) == 16
    assert not torch.as_strided(out, (2, 3, 3), (48, 16, 1), 13).any()
    assert d_x.isfinite().all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_stands_behind_rows_does_not_count(dtype):
    """It is read where rows stand 16 bytes apart, and is no number here; the last row may end with its storage."""
    x, longer, norm = inputs((2, 3, 13), dtype, rows_before=0)
    wide = torch.full((2, 3, 16), float("nan"), dtype=dtype, device=device)
    found, gradients = [], []
    for cut in (wide.clone(), wide.clone(), wide.flatten()[:-3].clone().as_strided((2, 3, 13), (48, 16, 1))):
        rows = [part[..., :13].copy_(t.detach()).requires_grad_() for part, t in ((cut, x), (wide.clone(), longer))]
        found.append(residual.residual_norm(*rows, norm, 0.0))
        grad = wide.clone()[..., :13].copy_(torch.linspace(-1, 1, 13, dtype=dtype, device=device))
        gradients.append(torch.autograd.grad(found[-1], rows, grad))
    wanted = residual.residual_norm(x, longer, norm, 0.0)
    assert all(torch.equal(one, wanted) for one in found)
    assert all(g.isfinite().all() for pair in gradients for g in pair)


def test_without_gradients_nothing_is_kept():
    x, longer, norm = inputs((2, 3, 8), torch.float32)
    with torch.no_grad():
        found = residual.residual_norm(x, longer[:, 2:], norm, 0.0)
    torch.testing.assert_close(found, norm(longer[:, 2:] + x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(1,), (3, 7, 41), (2, 5, 600)], ids=str)
def test_relu_and_dropout(shape, dropout, dtype):
    torch.manual_seed(1)
    x = torch.randn(shape).to(device, dtype).requires_grad_()
    found = residual.activation_dropout(x, F.relu, dropout)
    kept = found > 0
    assert not (kept & (x <= 0)).any()
    if dropout == 0:
        assert torch.equal(kept, x > 0)
    scale = 1 / (1 - dropout)
    torch.testing.assert_close(found.double(), torch.where(kept, x.detach().double() * scale, 0.0), rtol=1e-2, atol=0)
    grad = torch.randn(shape).to(device, dtype)
    (d_x,) = torch.autograd.grad(found, x, grad)
    torch.testing.assert_close(d_x.double(), torch.where(kept, grad.double() * scale, 0.0), rtol=1e-2, atol=0)


def test_what_is_no_number_stays_one():
    x = torch.tensor([float("nan"), 1.0, -1.0, float("inf")], device=device)
    found = residual.activation_dropout(x, F.relu, 0.0)
    assert found[0].isnan() and found[1:].tolist() == [1.0, 0.0, float("inf")]


def test_how_much_is_dropped():
    """Of 40,000 numbers at .25: within five standard deviations, in every column, and otherwise in the next call."""
    torch.manual_seed(1)
    x = torch.ones(10, 100, 40, device=device, requires_grad=True)
    masks = []
    for _ in range(2):
        out = residual.residual_norm(x, torch.zeros_like(x), nn.LayerNorm(40).to(device), 0.25)
        # The sum is 0 or 4/3, so that the norm puts them on either side of 0; a row of one kind is unlikely.
        masks.append(out > 0)
        share = masks[-1].double().mean()
        assert abs(share - 0.75) < 5 * (0.25 * 0.75 / 40_000) ** 0.5
        assert (masks[-1].double().mean((0, 1)) - 0.75).abs().max() < 5 * (0.25 * 0.75 / 1000) ** 0.5
    assert 0.3 < (masks[0] != masks[1]).double().mean() < 0.45
    dropped = residual.activation_dropout(torch.ones(40_000, device=device), F.relu, 0.25) == 0
    assert abs(dropped.double().mean() - 0.25) < 5 * (0.25 * 0.75 / 40_000) ** 0.5


def test_other_activations_are_pytorchs():
    x = torch.randn(50, device=device)
    assert torch.equal(residual.activation_dropout(x, F.gelu, 0.0), F.gelu(x))


def test_no_rows():
    x = torch.randn(2, 0, 8, device=device)
    assert residual.residual_norm(x, x, nn.LayerNorm(8).to(device), 0.1).shape == x.shape
