"""The continuous memory's kernels against the plain operations in float64, and what they need of a Hopper GPU.

Without a GPU they run in Triton's interpreter, in float32 and float16 (its bfloat16 is wrong).
"""

import numpy as np
import pytest
import torch

from lamemo_fairseq.core.kernels import rows
from lamemo_fairseq.core.memory.continuous import basis, sampling
from lamemo_fairseq.core.memory.continuous.sampling import BINS, Density

from ..gpus import DEVICE
from .helpers import random_tokens, tiny_decoder
from .resources import usages, used

pytest.importorskip("triton", reason="the kernels need Triton")
from lamemo_fairseq.core.kernels import shared_kernels
from lamemo_fairseq.core.memory.continuous import basis_kernel, sampling_kernel

pytestmark = pytest.mark.usefixtures("nan_buffers")

GPU = DEVICE == "cuda"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    if not GPU:
        monkeypatch.setattr(shared_kernels, "PROGRAMS_PER_MULTIPROCESSOR", 2)


def densities(*shape):
    """Some of them narrow, some far wider than [0, 1], none in float32 alone; the leaves in float32 and float64."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(shape, generator=generator)
    variance = 10 ** (6 * torch.rand(shape, generator=generator) - 5)
    low = [t.to(DEVICE).requires_grad_() for t in (mean, variance)]
    return low, [t.detach().double().requires_grad_() for t in low]


def close(found, wanted, tolerance):
    scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "count"), [((1,), 1), ((2, 3, 5), 10), ((2, 41), 76), ((33,), 256), ((0, 3), 4), ((7,), 600)]
)
def test_expectations_are_the_plain_ones(dtype, shape, count):
    """With every gradient; of mean and variance that lie apart in memory too."""
    functions = basis.RadialBasis(count, (0.1,) if count == 1 else (0.05, 0.1))
    low, exact = densities(*shape)
    apart = [torch.stack([t, t], dim=-1)[..., 0] for t in low]
    found = basis.by_kernel(*apart, *functions.grid(low[0]), dtype)
    wanted = basis.plain(*exact, *functions.grid(exact[0]), torch.float64)
    assert found.dtype == dtype and found.shape == (*shape, count)
    close(found, wanted, TOLERANCE[dtype])
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    gradients = torch.autograd.grad(found, low, grad), torch.autograd.grad(wanted, exact, grad.double())
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == torch.float32
        close(one, other, 2e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 41), (3, 2, 1), (2, 0, 3), (0, 2, 3)])
def test_histograms_are_the_plain_ones(shape):
    low, exact = (Density(*(t.detach() for t in ts)) for ts in densities(*shape))
    found, wanted = sampling.by_kernel(low), sampling.plain(exact)
    assert found.shape == (shape[0], BINS) and found.dtype == torch.float32
    close(found, wanted, 1e-6)
    assert torch.equal(found, sampling.by_kernel(low))


@pytest.mark.parametrize(("streams", "count"), [(1, 1), (3, 7), (2, 40), (0, 3)])
@pytest.mark.parametrize("empty", [0, 0.9, 1])
def test_quantiles_are_the_plain_ones(streams, count, empty):
    """Where bins are empty a quantile may move far by rounding, but not in the histogram's cumulated mass."""
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(streams, BINS, generator=generator) * (torch.rand(streams, BINS, generator=generator) >= empty)
    found = sampling.quantiles_by_kernel(mass.to(DEVICE), count)
    assert found.shape == (streams, count) and found.dtype == torch.float32
    assert torch.equal(found, sampling.quantiles_by_kernel(mass.to(DEVICE), count))
    shares = mass.double() / mass.double().sum(-1, keepdim=True).clamp(min=1e-30) + sampling.FLOOR
    below = torch.cat([torch.zeros(streams, 1), shares.cumsum(-1)], dim=-1).numpy()
    for points, cumulated in zip(found.cpu().double().numpy(), below, strict=True):
        levels = (np.arange(count) + 0.5) / count * cumulated[-1]
        np.testing.assert_allclose(np.interp(points * BINS, np.arange(BINS + 1), cumulated), levels, rtol=0, atol=1e-6)
    if empty == 0:
        close(found, sampling.quantiles(mass.double(), count), 1e-5)


def test_quantiles_of_what_is_no_number_stay_visible():
    mass = torch.rand(2, BINS)
    mass[0, 5] = torch.nan
    found = sampling.quantiles_by_kernel(mass.to(DEVICE), 4)
    assert found[0].isnan().all() and not found[1].isnan().any()


def test_what_the_kernels_leave_to_pytorch(monkeypatch):
    monkeypatch.setattr(rows, "fusable", lambda t: t.dtype in rows.DTYPES)
    assert basis.takes(torch.zeros(1)) and not basis.takes(torch.zeros(1, dtype=torch.float64))
    assert not basis.takes(torch.zeros(1, dtype=torch.float16))


@pytest.mark.parametrize("options", [{}, {"num_basis_functions": 10, "mem_len": 0}], ids=str)
def test_a_model_computes_the_same_with_and_without(options, monkeypatch):
    """Scores, losses and gradients over segments, the kernels being called."""
    variant, called = ("continuous", "transformer-xl", "right"), []
    decoder = tiny_decoder(variant, dtype=torch.float32, basis_widths="0.1,0.3", kl_weight=0.3, **options).train()
    decoder.to(DEVICE)
    for owner in (basis, sampling):
        by_kernel = owner.by_kernel
        monkeypatch.setattr(owner, "by_kernel", lambda *a, _f=by_kernel: called.append(_f) or _f(*a))
    found = []
    for kernels in (False, True):
        monkeypatch.setattr(rows, "fusable", lambda t, kernels=kernels: kernels and t.dtype == torch.float32)
        decoder.zero_grad()
        state, total = None, 0.0
        for segment in random_tokens(2, 12).to(DEVICE).split(3, dim=1):
            features, state, losses = decoder.read_segment(segment, state)
            total = total + decoder.output_layer(features).logsumexp(-1).mean() + losses["kl"]
        total.backward()
        parts = dict(decoder.named_parameters())
        found.append([total.detach(), *state.coefficients, *(p.grad for p in parts.values() if p.grad is not None)])
        assert {f.__module__.rsplit(".")[-1] for f in called} == ({"basis", "sampling"} if kernels else set())
    for one, other in zip(*found, strict=True):
        close(one, other.double(), 1e-5)


def compile_all(dtype: str) -> dict:
    """Compile every kernel for sm_90, with few basis functions and many; run in a process without the interpreter."""
    launches = [
        (sampling_kernel.histogram_kernel, {}, {"BINS": BINS, "ROWS": 16, "num_warps": 4}),
        (
            sampling_kernel.quantile_kernel,
            {"floor": "fp32", "tiny": "fp32"},
            {"BINS": BINS, "BLOCK": sampling_kernel.SAMPLES, "num_warps": 4},
        ),
    ]
    for count in (76, 512):
        tile = basis_kernel._tile(count)
        launches.append((basis_kernel.expectation_kernel, {"p_out": f"*{dtype}"}, tile))
        launches.append((basis_kernel.expectation_gradient_kernel, {"p_grad": f"*{dtype}"}, tile))
    found = {}
    for kernel, kinds, tile in launches:
        pointers = [name for name in kernel.arg_names if name.startswith("p_")]
        kinds = {**dict.fromkeys(pointers, "*fp32"), **kinds}
        usage, _ = used(kernel, tile, kinds, pointers, {"num_warps": tile["num_warps"]})
        found[f"{kernel.fn.__name__}, {tile}"] = usage
    return found


def test_no_spills():
    assert [len(found) for found in usages(__name__, ["bf16"], ["fp32"])] == [6, 6]
