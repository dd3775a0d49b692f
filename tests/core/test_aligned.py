"""Products with padded widths against products without, without a GPU."""

import copy
import math
import pickle
import statistics

import pytest
import torch
import torch.nn.functional as F

from lamemo_fairseq.core.kernels import aligned, padded
from lamemo_fairseq.core.kernels import rows as rows_module
from lamemo_fairseq.core.layers import layer
from lamemo_fairseq.core.memory import MEMORIES

from ..gpus import DEVICE
from .helpers import VARIANTS, random_tokens, tiny_decoder

# Every memory with its own positions, and positions that rotate or add a score alone.
MODELS = [
    *(
        (name, MEMORIES[name].architecture.defaults.get("position_encoding", "disentangled"))
        for name in MEMORIES.names()
    ),
    ("lookahead", "rotary"),
]


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(aligned, "matters", lambda x: True)


def rows(shape, kind):
    """Rows of float16: without anything behind them, with NaN in rows 16 bytes apart, or with zeros and the type."""
    torch.manual_seed(1)
    values = torch.randn(shape).half()
    if kind == "narrow":
        return values.requires_grad_()
    storage = torch.full((*shape[:-1], -(-shape[-1] // 8) * 8), 0.0 if kind == "padded" else math.nan).half()
    storage[..., : shape[-1]] = values
    return (padded.cut(storage, shape[-1]) if kind == "padded" else storage[..., : shape[-1]]).requires_grad_()


@pytest.mark.parametrize("kind", ["narrow", "view", "padded"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 13), (5, 13), (1, 1, 3)], ids=str)
def test_products(shape, wide, kind, on_a_gpu):
    x, weight = rows(shape, kind), torch.randn(11, shape[-1]).half().requires_grad_()
    bias = torch.randn(11).half().requires_grad_()
    found = (aligned.wide_linear if wide else aligned.linear)(x, weight, bias)
    assert found.size(-1) == (16 if wide else 11) and not found[..., 11:].any()
    wanted = F.linear(x, weight, bias)
    grad = torch.randn_like(wanted)
    gradients = torch.autograd.grad(found[..., :11], (x, weight, bias), grad)
    expected = torch.autograd.grad(wanted, (x, weight, bias), grad)
    for one, other in zip((found[..., :11], *gradients), (wanted, *expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_padded_rows_are_not_copied():
    x = rows((2, 3, 13), "padded")
    assert padded.widened(x).data_ptr() == x.data_ptr() and padded.widened(x).shape == (2, 3, 16)
    for other in (rows((2, 3, 13), "narrow"), rows((2, 3, 13), "view"), x[:, 1:], x.detach(), x + 0):
        assert padded.widened(other).data_ptr() != other.data_ptr() and not padded.widened(other)[..., 13:].any()


def test_a_copy_of_padded_rows_is_a_plain_tensor():
    x = rows((2, 13), "padded").detach_()
    assert type(x) is padded.PaddedRows
    for copied in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), x.clone()):
        assert type(copied) is torch.Tensor and torch.equal(copied, x)


@pytest.mark.parametrize("size", [12, 14, 15])
def test_rows_that_do_not_fit_a_weight_are_refused(size, on_a_gpu):
    """Padding both to 16 columns would hide that."""
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        aligned.linear(torch.randn(2, size).half(), torch.randn(11, 13).half())


def test_heads_are_padded_by_their_weights(on_a_gpu):
    attention = tiny_decoder(decoder_embed_dim=10, decoder_attention_heads=2).layers[0].self_attn
    rows = torch.randn(2, 4, 10, dtype=torch.float64)
    for queries in (4, 3):
        wide, narrow = attention.project(rows, queries, keep_padding=True), attention.project(rows, queries)
        for one, other in zip(wide, narrow, strict=True):
            assert one.size(-1) == 8 and not one[..., 5:].any()
            torch.testing.assert_close(one[..., :5], other)
        torch.testing.assert_close(attention.merge_heads(wide[0])[..., :10], attention.merge_heads(narrow[0])[..., :10])


def sizes_of(positions, **options):
    """Widths that break alignment; rotation takes heads of an even size alone."""
    return {**options, "decoder_head_dim": 6} if positions == "rotary" else options


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_a_decoder_of_odd_widths(variant, monkeypatch):
    options = sizes_of(variant[1], decoder_embed_dim=10, decoder_attention_heads=2, decoder_ffn_embed_dim=9)
    found = []
    for matters in (False, True):
        monkeypatch.setattr(aligned, "matters", lambda x, matters=matters: matters)
        decoder = tiny_decoder(variant, **options).train()
        state, loss = None, 0.0
        for segment in random_tokens(2, 3 * decoder.segment_length).split(decoder.segment_length, dim=1):
            features, state, _ = decoder.read_segment(segment, state)
            loss = loss + features.square().sum()
        found.append([loss, *torch.autograd.grad(loss, list(decoder.parameters()), allow_unused=True)])
    assert len(found[0]) > 10 and decoder.layers[0].self_attn.config.head_dim % 8
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("memory", "positions"), MODELS)
def test_all_kernels_at_odd_widths_are_as_exact_as_plain_operations(memory, positions, monkeypatch):
    """Loss and gradients in float16 with rows and heads that break alignment; on a GPU as it is, else interpreted.

    The median of three models: in one of them a hidden unit near zero may be on the other side, by rounding.
    """
    pytest.importorskip("triton")
    widths = {"decoder_embed_dim": 26, "decoder_attention_heads": 2, "decoder_ffn_embed_dim": 36}
    options = sizes_of(positions, **widths)

    def gradients(seed, dtype, backend, kernels):
        with monkeypatch.context() as patched:
            if kernels and DEVICE == "cpu":
                patched.setattr(aligned, "matters", lambda x: True)
                for module in (rows_module, layer):
                    patched.setattr(module, "fusable", lambda t: t.dtype in rows_module.DTYPES)
            chosen = {"memory": memory, "position_encoding": positions, "attention_backend": backend}
            decoder = tiny_decoder(seed=seed, **chosen, **options)
            for parameter in decoder.parameters():
                parameter.data.mul_(0.5)  # softmaxes that are not one-hot
            decoder.to(DEVICE, dtype).train()
            state, loss = None, torch.zeros((), device=DEVICE, dtype=torch.float64)
            for segment in random_tokens(1, 3 * decoder.segment_length).split(decoder.segment_length, dim=1):
                features, state, _ = decoder.read_segment(segment.to(DEVICE), state)
                loss = loss + features.double().square().mean()
            found = torch.autograd.grad(loss, list(decoder.parameters()), allow_unused=True)
        return [loss, *(g.double() for g in found if g is not None)]

    def error(found, exact):
        pairs = zip(found, exact, strict=True)
        return max(float((one - other).detach().norm() / other.norm().clamp(min=1e-6)) for one, other in pairs)

    def times_as_far_off(seed):
        exact = gradients(seed, torch.float64, "eager", kernels=False)
        fused, eager = (gradients(seed, torch.float16, name, name == "fused") for name in ("fused", "eager"))
        return error(fused, exact) / error(eager, exact)

    assert statistics.median(map(times_as_far_off, range(3))) < 2
