"""The features of keys by a kernel, reading and writing by kernels, against PyTorch's operations.

Shapes: B streams, R rows, m memory tokens, d model width, e width of a key, F = 6 e its features.
"""

import copy
import itertools

import pytest
import torch

from lamemo_fairseq.core.kernels import rows, shared
from lamemo_fairseq.core.kernels.padded import PaddedRows
from lamemo_fairseq.core.memory.associative import delta, features
from lamemo_fairseq.core.memory.associative.association import Association, Associations
from lamemo_fairseq.core.memory.associative.options import AssociativeOptions

from ..gpus import DEVICE
from .buffers import fill_with_nan
from .helpers import features_and_gradients, tiny_decoder
from .resources import usages, used


@pytest.fixture(autouse=True)
def nan_buffers(monkeypatch):
    fill_with_nan(monkeypatch)


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
        found.append(features_and_gradients(decoder, torch.arange(4, 16).view(2, 6)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def both_ways(monkeypatch, dtype, size, **options):
    """Yield an association of rows of *size* numbers: by kernels in *dtype*, then by operations in float64."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    torch.manual_seed(0)
    association = Association(size, AssociativeOptions(**options)).to(DEVICE, dtype)
    with torch.no_grad():
        for p in association.parameters():
            p.normal_(std=0.5)
    for fusable, exact in ((lambda t: True, dtype), (lambda t: False, torch.float64)):
        monkeypatch.setattr(rows, "fusable", fusable)
        monkeypatch.setattr(shared, "fusable", fusable)
        yield copy.deepcopy(association).to(exact), exact, torch.promote_types(exact, torch.float32)


def assert_as_exact(found, dtype):
    """Each tensor is as near to that in float64 as rounding lets it be, by units of its largest number."""
    units = (100 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps
    for one, exact in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=0, atol=units * float(exact.detach().abs().max()))


# With few memory tokens, each key overlaps most with z; with many keys that are alike, with one another.
WRITES = [
    (2, 3, 10, 5, 0.8, 0.05, 5.0),
    (3, 16, 70, 16, 1.0, 1.0, 0.2),
    (2, 17, 33, 24, 0.9, 0.5, 1.0),
    (1, 1, 8, 1, 1.0, 1.0, 0.5),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("b", "m", "d", "e", "decay", "unit", "z"), WRITES)
def test_writing_by_kernels(b, m, d, e, decay, unit, z, dtype, monkeypatch):
    """The memory after a write; gradients of rows, parameters, and the memory before it."""
    generator = torch.Generator().manual_seed(0)
    x, matrix = (torch.randn(b, n, d, generator=generator).to(DEVICE) for n in (m, 6 * e))
    normalizer = (z * torch.rand(b, 6 * e, generator=generator)).to(DEVICE)
    grads = [torch.randn(t.shape, generator=generator).to(DEVICE) for t in (matrix, normalizer)]
    found = []
    options = {"associative_dim": e, "associative_decay": decay, "associative_value_lr_scale": unit}
    for association, exact, state in both_ways(monkeypatch, dtype, d, **options):
        inputs = [x.to(dtype).to(exact), matrix.to(state), normalizer.to(state)]
        tensors = [t.requires_grad_() for t in inputs]
        written = association.write(tensors[0] * 0.5, Associations(*tensors[1:]))
        parameters = [association.key.weight, association.value, *association.gate.parameters()]
        gradients = torch.autograd.grad(written, tensors + parameters, [g.to(state) for g in grads])
        if exact == dtype:
            assert delta.takes(x, matrix) == (e >= 3)  # else by operations
        constant = association.write(tensors[0].detach() * 0.5, Associations(*(t.detach() for t in tensors[1:])))
        assert all(torch.equal(one, other) for one, other in zip(constant, written, strict=True))
        found.append([*written, *gradients])
    assert_as_exact(found, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("b", "r", "d", "e"), [(2, 3, 10, 5), (3, 17, 70, 16), (2, 5, 34, 24), (1, 1, 8, 4)])
def test_reading_by_kernels(b, r, d, e, dtype, monkeypatch):
    """The rows after reading, of a width that breaks alignment too; gradients of rows, map and memory.

    The product of the keys adds the gradient of the rows' residual to its own.
    """
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(b, r, d, generator=generator).to(DEVICE) for _ in range(2))
    matrix, normalizer = torch.randn(b, 6 * e, d, generator=generator), torch.rand(b, 6 * e, generator=generator)
    found = []
    for association, exact, state in both_ways(monkeypatch, dtype, d, associative_dim=e):
        tensors = [t.to(DEVICE, state).requires_grad_() for t in (matrix, normalizer)]
        tensors.insert(0, x.to(dtype).to(exact).requires_grad_())
        read = association.read(tensors[0] * 0.5, Associations(*tensors[1:]))
        padded = exact == torch.float16 and d % 8 > 0
        assert isinstance(read, PaddedRows) == padded and read.dtype == exact
        found.append([read, *torch.autograd.grad(read, [*tensors, association.query.weight], grad.to(exact))])
    assert_as_exact(found, dtype)


@pytest.mark.parametrize("rows", [1, 16, 17, 70])
@pytest.mark.parametrize(("inner", "columns"), [(5, 3), (64, 33), (66, 96)])
@pytest.mark.parametrize("turned", ["none", "left", "right"])
def test_products_in_single_precision(rows, inner, columns, turned):
    """Either factor may be a transposed view; the product may be added to what is there."""
    kernels = pytest.importorskip("lamemo_fairseq.core.memory.associative.product_kernel", reason="needs Triton")
    generator = torch.Generator().manual_seed(0)
    left, right, added = (
        torch.randn(2, *shape, generator=generator) for shape in ((rows, inner), (inner, columns), (rows, columns))
    )
    left, right, added = (t.to(DEVICE) for t in (left, right, added))
    a = left.transpose(1, 2).contiguous().transpose(1, 2) if turned == "left" else left
    b = right.transpose(1, 2).contiguous().transpose(1, 2) if turned == "right" else right
    expected = left.double() @ right.double()
    half = torch.empty(0, dtype=torch.float16)
    found = kernels.product(a, b, half)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        kernels.product(a, b, half, add_to=added.clone()).double(), expected + added, rtol=0, atol=2e-5
    )
    assert torch.equal(kernels.product(a, b, left), torch.bmm(a, b))
    rounded = kernels.product(a, b, half, precision=kernels.ROUNDED)
    torch.testing.assert_close(rounded.double(), expected, rtol=0, atol=2**-9 * float((left.abs() @ right.abs()).max()))


def test_an_empty_memory_leaves_rows_as_they_are(monkeypatch):
    x = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for association, exact, state in both_ways(monkeypatch, torch.float32, 10, associative_dim=4):
        zeros = (torch.zeros(shape, dtype=state, device=DEVICE) for shape in ((2, 24, 10), (2, 24)))
        assert torch.equal(association.read(x.to(exact), Associations(*zeros)), x.to(exact))


def _products() -> dict:
    """Compile the products of 166 rows and 16, forward and backward."""
    from lamemo_fairseq.core.memory.associative import product_kernel as kernels

    found, kernel, width, features = {}, kernels.product_kernel, 410, 384
    # The sizes N and K, and the strides of rows and columns of both factors.
    of = {
        "recalled": (width, features, (features, 1, width, 1)),
        "of features": (features, width, (width, 1, 1, width)),
        "of the matrix": (width, 166, (1, features, width, 1)),
    }
    for name, (columns, inner, strides) in of.items():
        for tile, precision in itertools.product(
            (kernels.TILE, kernels.NARROW_TILE), (kernels.SINGLE, kernels.ROUNDED)
        ):
            sizes = dict(zip(("s_am", "s_ak", "s_bk", "s_bn"), strides, strict=True)) | tile
            constants = {
                **sizes,
                "N": columns,
                "TAIL": inner % tile["BLOCK_K"] > 0,
                "ADD": True,
                "PRECISION": precision,
            }
            pointers = {n: "*fp32" for n in kernel.arg_names if n.startswith("p_")}
            options = {n: tile[n] for n in ("num_warps", "num_stages")}
            usage, _ = used(kernel, constants, pointers, [*pointers, "s_ab", "s_bb"], options)
            found[f"{name}, {tile['BLOCK_M']}, {precision}"] = usage
    return found


def compile_all(dtype: str) -> dict:
    """Compile all kernels for sm_90, with narrow keys and wide ones; run in a process without the interpreter."""
    import triton

    from lamemo_fairseq.core.memory.associative import delta_kernel, features_kernel, recall_kernel

    found, kernels = _products(), {}
    for owner in (features_kernel, delta_kernel, recall_kernel):
        kernels |= {n: k for n, k in vars(owner).items() if n.endswith("_kernel") and hasattr(k, "arg_names")}
    single = {"p_z", "p_dz", "p_new_z", "p_features", "p_alike", "p_numbers", "p_recalled", "p_overlap", "p_matrix"}
    single |= {"p_dalike", "p_doverlap", "p_drecalled"}
    own = {  # where the name alone does not tell
        "features_kernel": ["p_out"],
        "features_gradient_kernel": ["p_grad"],
        "change_kernel": ["p_out"],
        "outer_kernel": ["p_out", "p_rows"],
        "row_gradient_kernel": ["p_grad"],
        "alike_gradient_kernel": ["p_out"],
    }
    for name, kernel in kernels.items():
        for size, width in ((16, 64), (96, 416)):
            pointers = [n for n in kernel.arg_names if n.startswith("p_")]
            kinds = {n: "*fp32" if n in single or n in own.get(name, ()) else f"*{dtype}" for n in pointers}
            kinds |= dict.fromkeys(("decay", "eps", "unit", "factor"), "fp32")
            constants = {"E": size, "D": width, "F": 6 * size, "OVERLAP": True, "BLOCK_M": 16, "BLOCK": 64, "ROWS": 4}
            constants |= dict.fromkeys(("WIDTH", "WIDTH_R", "WIDTH_G"), width)
            if kernel in vars(recall_kernel).values() or name == "change_kernel":
                constants["BLOCK"] = triton.next_power_of_2(width)
            elif kernel in vars(features_kernel).values():
                constants |= features_kernel._tiles(torch.empty(2, size), size)[1]
            usage, _ = used(kernel, constants, kinds, pointers, {"num_warps": 4})
            found[f"{name}, {size}"] = usage
    return found


def test_no_spills():
    assert [len(found) for found in usages(__name__, ["bf16"], ["fp32"])] == [30, 30]
