"""The features of keys by a kernel, against PyTorch's operations."""

import pytest
import torch

from lamemo_fairseq.core.kernels import rows
from lamemo_fairseq.core.memory.associative import features

from ..gpus import DEVICE
from .helpers import tiny_decoder
from .resources import usages, used

SHAPES = [(2, 5, 16), (3, 1, 1), (1, 2), (7, 3), (2, 33, 96), (1, 40, 64), (5,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_features_by_a_kernel(shape, dtype, monkeypatch):
    """Keys are views, some of them with zeros, whose gradient is 0 from both halves."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    monkeypatch.setattr(rows, "fusable", lambda t: True)
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(*shape[:-1], shape[-1] + 3, generator=generator)
    wide[..., ::4] = 0
    grad = torch.randn(*shape[:-1], 6 * shape[-1], generator=generator)
    found = []
    for function, exact in ((features.dpfp, dtype), (features.plain, torch.float64)):
        keys = wide.to(DEVICE, dtype).to(exact).requires_grad_()
        made = function(keys[..., : shape[-1]])
        found.append([made, *torch.autograd.grad(made, keys, grad.to(made))])
    assert found[0][0].dtype == torch.float32 and found[0][1].dtype == dtype
    for one, exact, eps in zip(*found, (torch.finfo(torch.float32).eps, torch.finfo(dtype).eps), strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=8 * eps, atol=8 * eps)


def test_keys_that_are_not_numbers_stay_visible(monkeypatch):
    pytest.importorskip("triton", reason="the kernels need Triton")
    monkeypatch.setattr(rows, "fusable", lambda t: True)
    keys = torch.ones(2, 7, device=DEVICE)
    keys[1, 3] = float("nan")
    torch.testing.assert_close(features.dpfp(keys), features.plain(keys), equal_nan=True)


def test_no_keys_have_no_features(monkeypatch):
    monkeypatch.setattr(rows, "fusable", lambda t: True)
    assert features.dpfp(torch.empty(2, 0, 4)).shape == (2, 0, 24)


def test_a_decoder_with_the_kernel(monkeypatch):
    """Losses and gradients over segments of an update."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    options = {"segment_length": 6, "bptt_segments": 2, "mem_len": 3, "associative_dim": 5}
    found = []
    for kernels in (False, True):
        decoder = tiny_decoder(("associative", "transformer-xl", "right"), dtype=torch.float32, **options).to(DEVICE)
        with torch.no_grad():
            for p in decoder.parameters():
                p.mul_(0.4)
        if kernels:
            monkeypatch.setattr(features.rows, "fusable", lambda t: t.dtype == torch.float32)
        tokens = torch.arange(4, 16).view(2, 6).to(DEVICE)
        scores = decoder.train().read_segment(tokens, None).features
        parameters = [p for name, p in decoder.named_parameters() if not name.startswith("embed_tokens")]
        gradients = torch.autograd.grad(scores.logsumexp(-1).sum(), parameters, allow_unused=True)
        found.append([scores, *(g for g in gradients if g is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def compile_all(dtype: str) -> dict:
    """Compile both kernels for sm_90, with narrow keys and wide ones; run in a process without the interpreter."""
    from lamemo_fairseq.core.memory.associative import features_kernel as kernels

    found = {}
    for size in (16, 96):
        tile = kernels._tiles(torch.empty(2, size))[1]
        for kernel in (kernels.features_kernel, kernels.features_gradient_kernel):
            pointers = [name for name in kernel.arg_names if name.startswith("p_")]
            halves = {"p_keys"} | ({"p_out"} if kernel is kernels.features_gradient_kernel else set())
            kinds = {name: f"*{dtype}" if name in halves else "*fp32" for name in pointers}
            usage, _ = used(kernel, {**tile, "E": size}, kinds, pointers, {"num_warps": tile["num_warps"]})
            found[f"{kernel.fn.__name__}, {size}"] = usage
    return found


def test_no_spills():
    assert [len(found) for found in usages(__name__, ["bf16"], ["fp32"])] == [4, 4]
