"""Reading and writing associations by kernels, against PyTorch's operations.

Shapes: B streams, k segments, N tokens of a segment, H heads, D size of a head, D' its padded size.
"""

import pytest
import torch

from lamemo_fairseq.core.kernels import rows
from lamemo_fairseq.core.layers import AttentionConfig
from lamemo_fairseq.core.memory.infini.attention import Associations, InfiniSelfAttention
from lamemo_fairseq.core.memory.infini.options import InfiniOptions

from ..gpus import DEVICE
from .buffers import fill_with_nan
from .helpers import features_and_gradients, tiny_decoder
from .resources import usages, used


@pytest.fixture(autouse=True)
def nan_buffers(monkeypatch):
    fill_with_nan(monkeypatch)


B, SEGMENTS, N, H = 2, 3, 7, 2
WIDTHS = [(5, 8), (8, 8), (41, 48), (3, 3)]  # D and D'


def attention_of(size: int) -> InfiniSelfAttention:
    torch.manual_seed(0)
    config = AttentionConfig(H * size, H, size, options=InfiniOptions(memory_gate_lr_scale=2.0))
    attention = InfiniSelfAttention(config).double()
    with torch.no_grad():
        attention.memory_gate.copy_(torch.tensor([0.4, -0.7]))
    return attention.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("size", "width"), WIDTHS)
def test_reading_and_writing_by_kernels(size, width, dtype, monkeypatch):
    """Segments of an update read and write in turn: read-outs, associations and all gradients.

    One stream has no earlier segment. Heads are views of a projection, with zeros behind them.
    """
    pytest.importorskip("triton", reason="the kernels need Triton")
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(B * SEGMENTS, N, 4, H, size, generator=generator).to(dtype)
    projected = torch.nn.functional.pad(projected, (0, width - size)).to(DEVICE)
    past = [torch.randn(B, H, size, size, generator=generator), torch.rand(B, H, size, generator=generator)]
    grad = torch.randn(B * SEGMENTS, H, N, width, generator=generator).to(DEVICE)
    grad[..., size:] = 0
    written, attention, found = torch.tensor([[True], [False]], device=DEVICE), attention_of(size), []
    for fusable, exact in ((lambda t: True, dtype), (lambda t: False, torch.float64)):
        monkeypatch.setattr(rows, "fusable", fusable)
        heads = projected.to(exact).requires_grad_()
        q, k, v, local = heads.transpose(2, 3).permute(3, 0, 2, 1, 4)
        state = torch.promote_types(exact, torch.float32)
        matrix, normalizer = (t.to(DEVICE, state).requires_grad_() for t in past)
        before, after = attention._histories(Associations(matrix, normalizer, written), k, v)
        out = attention.combine(q, local, before)
        assert out.dtype == exact and not out[..., size:].any()
        inputs = [heads, matrix, normalizer, attention.memory_gate]
        outputs = [out, after.matrix, after.normalizer]
        gradients = torch.autograd.grad(outputs, inputs, [grad.to(exact), *(torch.ones_like(t) for t in outputs[1:])])
        found.append([*before[:2], *outputs, *gradients])
    units = (100 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    for one, exact in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=0, atol=units * float(exact.detach().abs().max()))
    assert torch.equal(found[0][2][SEGMENTS], projected[SEGMENTS, :, 3].transpose(0, 1))  # nothing to read


def test_a_decoder_with_the_kernels(monkeypatch):
    """Losses and gradients over segments of an update."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    found = []
    for kernels in (False, True):
        decoder = tiny_decoder(
            ("infini", "transformer-xl", "linear"), dtype=torch.float32, bptt_segments=3, segment_length=6
        )
        decoder.to(DEVICE)
        if kernels:
            monkeypatch.setattr(rows, "fusable", lambda t: t.dtype == torch.float32)
        found.append(features_and_gradients(decoder, torch.arange(4, 16).view(2, 6)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def compile_all(dtype: str) -> dict:
    """Compile all kernels for sm_90; run in a process without the interpreter."""
    from lamemo_fairseq.core.memory.infini import kernel as kernels

    found = {}
    names = ("features_kernel", "features_gradient_kernel", "mix_kernel", "mix_gradient_kernel")
    for kernel in (getattr(kernels, name) for name in names):
        for size in (41, 128):
            f, w = kernels.stored(size)
            pointers = [name for name in kernel.arg_names if name.startswith("p_")]
            halves = {"p_x", "p_v", "p_dx", "p_dv", "p_local", "p_out", "p_grad", "p_dlocal"}
            kinds = {name: f"*{dtype}" if name in halves else "*fp32" for name in pointers} | {"eps": "fp32"}
            tile = kernels._tiles(torch.empty(1, 1, 1, size), w)[1]
            constants = {**tile, "D": size, "WIDTH": size + -size % 8, "F": f, "W": w, "VALUES": True}
            divisible = [name for name in kernel.arg_names if name.startswith(("p_", "s_"))]
            found[f"{kernel.fn.__name__}, {size}"], _ = used(kernel, constants, kinds, divisible, {"num_warps": 4})
    return found


def test_no_spills():
    assert [len(found) for found in usages(__name__, ["bf16"], ["fp32"])] == [8, 8]
