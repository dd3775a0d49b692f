"""Fused attention against eager attention in float64: output, normaliser and every gradient.

Without a GPU the kernels run in Triton's interpreter, in float32 and float16 (its bfloat16 is wrong).
"""

import math

import pytest
import torch

from lamemo_fairseq.core.attention import Attended, RelativeBias, bands, causal_attention
from lamemo_fairseq.core.memory.block_recurrent.attention import unmasked_attention
from lamemo_fairseq.core.memory.lookahead import LookaheadWindow, eager, memory_attention
from lamemo_fairseq.core.memory.memorizing.attention import store_attention
from lamemo_fairseq.core.memory.token.attention import blocks_attention
from lamemo_fairseq.core.memory.token.eager import Blocks

pytest.importorskip("triton", reason="the fused backend needs Triton")
from lamemo_fairseq.core.attention.fused import api, function, launch, tiles
from lamemo_fairseq.core.memory.lookahead import banded

from ..gpus import DEVICE
from .attention_cases import CASES, NAMES, Case, computed
from .buffers import fill_with_nan

GPU = DEVICE == "cuda"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Small enough that the sizes below need several; on a GPU the tiles are the real ones."""
    if not GPU:
        few = tiles.Tiles(*[tiles.Tile(16, 32, 4, 1)] * 5)
        for table in (tiles.SINGLE, tiles.HALF):
            for block in table:
                monkeypatch.setitem(table, block, few)


@pytest.fixture(autouse=True)
def nan_buffers(monkeypatch):
    fill_with_nan(monkeypatch)


def run(case, backend, dtype, wrap=lambda t: t, dropout=0.0):
    return computed(case, backend, dtype, DEVICE, wrap, dropout)


def error(found, reference):
    """Relative, but to a half an entry where entries are smaller (some gradients are zero)."""
    found, reference = found.detach().double(), reference.detach()
    return float((found - reference).norm() / reference.norm().clamp(min=0.5 * reference.numel() ** 0.5))


def assert_as_eager(found, plain, exact, dtype, floor=8.0):
    """No further from float64 than a small multiple of the plain path in the same dtype is."""
    for name in NAMES:
        if exact[name] is None:
            assert found[name] is None
            continue
        assert found[name].dtype == plain[name].dtype, name
        allowed = 2 * error(plain[name], exact[name]) + floor * torch.finfo(dtype).eps
        assert error(found[name], exact[name]) <= allowed, name


# Interpreted, the larger cases take seconds, and what they are for does not depend on the dtype.
AS_EAGER = [(case, dtype) for case in CASES for dtype in DTYPES if GPU or dtype == torch.float32 or case.queries <= 40]


@pytest.mark.parametrize(
    ("case", "dtype"), AS_EAGER, ids=lambda v: "-".join(map(str, v)) if isinstance(v, Case) else str(v)
)
def test_as_eager(case, dtype):
    exact = run(case, "eager", torch.float64)
    assert_as_eager(run(case, "fused", dtype), run(case, "eager", dtype), exact, dtype)


@pytest.mark.parametrize(
    "case", [Case(37, 37, 41), Case(40, 33, 8, "right"), Case(18, 35, 6, parts="content table score")], ids=str
)
def test_rows_of_a_larger_tensor(case):
    """Queries, keys, values and biases may be views with any strides; nothing beside them is read."""

    def within(t):
        if t.dim() < 4:
            return t.mT.contiguous().mT
        b, h, r, d = t.shape
        larger = torch.full((b, r + 2, h, d + 3), math.nan, dtype=t.dtype, device=t.device)
        larger[:, 1:-1, :, 1 : d + 1] = t.transpose(1, 2)
        return larger[:, 1:-1, :, 1 : d + 1].transpose(1, 2)

    exact, plain = run(case, "eager", torch.float64), run(case, "eager", torch.float32)
    assert_as_eager(run(case, "fused", torch.float32, within), plain, exact, torch.float32)


def test_plain_attention_is_pytorchs(monkeypatch):
    """Without positions, memory and normaliser, PyTorch's own kernel does it."""
    case = Case(19, 19, 8, parts="")
    q, k, v, *_ = (t.float() for t in case.tensors(DEVICE) if t is not None)
    expected = causal_attention("eager", q, k, v, RelativeBias())
    monkeypatch.setattr(api, "attend", None)
    found = causal_attention("fused", q, k, v, RelativeBias(), need_normalizer=False)
    assert error(found.output, expected.output.double()) < 1e-6


@pytest.mark.parametrize("kind", ["right", "full"])
@pytest.mark.parametrize(("slots", "current", "ragged"), [(20, 20, False), (35, 12, True), (5, 33, False)])
def test_memory_attention(slots, current, ragged, kind):
    """Slots and current tokens in one call, whose gradients share rows."""
    generator = torch.Generator().manual_seed(0)
    rows, keys = slots + current, min(slots, current)
    lengths = torch.tensor([current, max(current - 5, 1)], device=DEVICE) if ragged else None
    window = LookaheadWindow(slots - keys + 1, kind == "full", lengths)
    shapes = [(2, 2, rows, 6)] * 3 + [
        (2, 6),
        (2, 6),
        (2, rows, 6),
        (2, 6),
        (2, 6),
        (2, len(window.distances(slots)), 6),
    ]
    shapes += [(2, 2, rows, 6), (2, 2, slots, 6), (2, 2, slots)]
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE) for s in shapes]

    def attend(backend, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in drawn[:9]]
        biases = RelativeBias(*inputs[3:6]), RelativeBias(*inputs[6:9])
        stored = Attended(*(t.to(dtype) for t in drawn[10:]))
        attended = memory_attention(backend, *inputs[:3], biases, window, stored, 30)
        attended.output.backward(drawn[9].to(dtype))
        return [*attended, *(t.grad for t in inputs)]

    for found, exact in zip(attend("fused", torch.float32), attend("eager", torch.float64), strict=True):
        assert error(found, exact) < 5e-6


@pytest.mark.parametrize(
    ("blocks", "parts"),
    [
        (Blocks(20, 3, 17, False, False), "content position table"),
        (Blocks(7, 5, 12, True, False), "score"),
        (Blocks(7, 5, 12, True, False), ""),
        (Blocks(9, 40, 6, False, True), "content position table"),
    ],
    ids=str,
)
def test_attention_of_memory_tokens(blocks, parts):
    """Current rows and both blocks in one call. In the last case, blocks of keys are seen by the write block alone."""
    generator = torch.Generator().manual_seed(0)
    rows = blocks.end + blocks.tokens
    queries = rows - (blocks.begin if blocks.last else blocks.cached)
    shapes = {"q": (2, 2, queries, 6), "k": (2, 2, rows, 6), "v": (2, 2, rows, 6)}
    if parts:
        of_distances = {"content": (2, 6), "position": (2, 6), "table": (2, rows, 6), "score": (2, rows)}
        shapes |= {name: of_distances[name] for name in parts.split()}
        shapes |= {"ahead": (2, blocks.tokens, 6) if "table" in parts else (2, blocks.tokens)}
    drawn = {n: torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE) for n, s in shapes.items()}
    grad = torch.randn(shapes["q"], generator=generator, dtype=torch.float64).to(DEVICE)

    def attend(backend, dtype):
        inputs = {name: t.detach().to(dtype).requires_grad_() for name, t in drawn.items()}
        causal = RelativeBias(**{name: t for name, t in inputs.items() if name in RelativeBias._fields})
        ahead = causal
        if parts:
            ahead = causal._replace(**{"table" if "table" in parts else "score": inputs["ahead"]})
        attended = blocks_attention(backend, *(inputs[name] for name in "qkv"), causal, ahead, blocks).output
        return [attended, *torch.autograd.grad(attended, [*inputs.values()], grad.to(dtype))]

    for found, exact in zip(attend("fused", torch.float32), attend("eager", torch.float64), strict=True):
        assert error(found, exact) < 5e-6


def test_attention_without_a_mask():
    """More queries than a vector has, and more keys than queries."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 2, rows, 6) for rows in (20, 45, 45, 20)]
    *drawn, grad = (torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE) for s in shapes)

    def attend(backend, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in drawn]
        output = unmasked_attention(backend, *inputs, 1.0).output
        return [output, *torch.autograd.grad(output, inputs, grad.to(dtype))]

    for found, exact in zip(attend("fused", torch.float32), attend("eager", torch.float64), strict=True):
        assert error(found, exact) < 5e-6


@pytest.mark.parametrize(
    ("stored", "size", "dtype"),
    [(45, 6, torch.float32), (64, 8, torch.float32), (33, 5, torch.float16), (0, 6, torch.float32)],
)
def test_attention_to_a_store(stored, size, dtype):
    """One softmax over stored rows, which get no gradient, and the segment's."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 2, 19, size)] * 4 + [(2, 2, stored, size)] * 2
    *drawn, grad, keys, values = (torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE) for s in shapes)

    def attend(backend, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in drawn]
        output = store_attention(backend, *inputs, keys.to(dtype), values.to(dtype), scale=2.0).output
        return [output, *torch.autograd.grad(output, inputs, grad.to(dtype))]

    for found, exact in zip(attend("fused", dtype), attend("eager", torch.float64), strict=True):
        assert error(found, exact) < 20 * torch.finfo(dtype).eps


def test_dropout_of_attention_to_a_store():
    """A weight is dropped in both passes or in none: by the directional derivative along the queries."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, keys, values, along = torch.randn(6, 1, 2, 17, 8, generator=generator, dtype=torch.float64).to(DEVICE)

    def read(q):
        torch.manual_seed(3)
        return store_attention("fused", q, k.float(), v.float(), keys.float(), values.float(), 0.4).output.double()

    inputs = q.float().requires_grad_()
    (gradient,) = torch.autograd.grad(read(inputs).square().sum(), inputs)
    ahead, behind = (read((q + sign * 1e-2 * along).float()).square().sum() for sign in (1, -1))
    assert float((gradient * along).sum()) == pytest.approx(float(ahead - behind) / 2e-2, rel=1e-3)


def test_attentions_that_share_biases_give_the_sum_of_their_gradients():
    """The last one has no table, and thus no gradient of the position bias."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 2, 9, 5, generator=generator).to(DEVICE) for _ in range(4))
    shared = [torch.randn(2, n, 5, generator=generator).squeeze(1).to(DEVICE) for n in (1, 1, 17)]
    queries = slice(0, 4), slice(4, 6), slice(6, 9)
    found = []
    for tensors in ([shared] * 3, [[t.clone() for t in shared] for _ in queries]):
        biases = [RelativeBias(*(t.requires_grad_() for t in three)) for three in tensors]
        biases[2] = biases[2]._replace(table=None)
        attentions = [
            bands.BandedAttention(own, slice(0, 9), bands.Band(-9, 9, 8 - own.start), bias)
            for own, bias in zip(queries, biases, strict=True)
        ]
        output = function.attend(q, k, v, attentions, 0.0).output
        inputs = [t for three in tensors for t in three] if tensors[0] is not shared else shared
        gradients = torch.autograd.grad(output, inputs, grad, allow_unused=True)
        found.append([sum(g for g in gradients[n::3] if g is not None) for n in range(3)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_dropout_of_two_attentions_at_once_is_not_the_same():
    """A value has a dimension of its own, so that the read-outs tell which weights were dropped."""
    rows = 16
    value = torch.eye(2 * rows, device=DEVICE).view(2, 1, 1, rows, 2 * rows)
    q = torch.zeros_like(value[0])
    read = store_attention("fused", q, q, value[0], q, value[1], 0.5).output
    segment, store = (read[0, 0] > 0).split(rows, 1)
    assert not torch.equal(segment.tril(), store.tril())
    halves = [slice(0, rows), slice(rows, 2 * rows)]
    both = [bands.BandedAttention(own, halves[0], bands.Band(-rows, rows, 0), RelativeBias()) for own in halves]
    read = function.attend(torch.cat((q, q), 2), q, value[0], both, 0.5).output
    first, second = (read[0, 0] > 0).split(rows)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("case", [Case(17, 24, 24), Case(24, 20, 24, "right")], ids=str)
def test_dropout(case):
    """The weights that are dropped in the forward pass are those of the backward pass."""
    q, k, v, *bias, grad, output, normalizer = case.tensors(DEVICE)
    single = [None if t is None else t.float() for t in (q, k, v, *bias)]
    stored = (torch.zeros_like(output).float(), torch.full_like(normalizer, -math.inf).float())

    def attend(backend, q, k, v, *bias, stored=stored, dropout=0.4):
        torch.manual_seed(3)
        return case.call(backend, q, k, v, RelativeBias(*bias), *stored, dropout)

    # Keys' weights one by one: identity values read them out.
    eye = torch.eye(case.keys, case.size, device=DEVICE).expand(2, 2, -1, -1).contiguous()
    weights = attend("eager", single[0], single[1], eye, *single[3:], dropout=0.0).output[..., : case.keys]
    dropped = attend("fused", single[0], single[1], eye, *single[3:]).output[..., : case.keys]
    seen = weights > 0
    kept = dropped != 0
    assert 0.5 < kept[seen].float().mean() < 0.7
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.6)
    assert not torch.equal(kept[0, 0], kept[0, 1]) and not torch.equal(kept[0, 0], kept[1, 0])

    inputs = [t.detach().double().requires_grad_() for t in (q, k, v, *bias) if t is not None]
    mask = (kept / 0.6).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager.F, "dropout", lambda weights, p: weights * mask)
        held = (output, normalizer)
        exact = attend("eager", *inputs, stored=held).output
        exact.backward(grad)
    halves = [t.detach().float().requires_grad_() for t in inputs]
    found = attend("fused", *halves, stored=(output.float(), normalizer.float())).output
    found.backward(grad.float())
    assert error(found, exact) < 1e-5
    for one, other in zip(halves, inputs, strict=True):
        assert error(one.grad, other.grad) < 1e-5


def test_stored_read_outs_far_ahead_or_behind():
    """The released eps is part of the result and of its gradients, also where it decides."""
    case = Case(33, 33, 8, "right")
    q, k, v, *bias, grad, output, normalizer = case.tensors(DEVICE)
    output.zero_()
    shifted = normalizer + torch.linspace(-40, 40, normalizer.size(-1), dtype=torch.float64, device=DEVICE)
    results = []
    for backend, dtype in (("fused", torch.float32), ("eager", torch.float64)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v, *bias) if t is not None]
        stored = output.to(dtype), shifted.to(dtype)
        attended = case.call(backend, *inputs[:3], RelativeBias(*inputs[3:]), *stored)
        attended.output.backward(grad.to(dtype))
        results.append([*attended, *(t.grad for t in inputs)])
    for found, exact in zip(*results, strict=True):
        assert error(found, exact) < 1e-5
    # The last slots see next to nothing new: with nothing stored, their read-outs and gradients are nearly eps alone.
    (output, _, d_q, *_), (exact_output, _, exact_d_q, *_) = ([t[:, :, 27:] for t in r[:3]] for r in results)
    for found, exact in ((output, exact_output), (d_q, exact_d_q)):
        assert 0 < exact.abs().max() < 1e-5
        assert float((found - exact).norm() / exact.norm()) < 1e-3


def test_the_mixing_weight_has_the_gradient_of_its_maximum(monkeypatch):
    """With an eps so large that float32 shows what it does to the gradients, whichever normaliser is the greater."""
    case = Case(33, 33, 8, "right")
    monkeypatch.setattr(eager, "INTERPOLATION_EPS", 0.1)
    found, exact = run(case, "fused", torch.float32), run(case, "eager", torch.float64)
    for name in NAMES:
        assert (found[name] is None) == (exact[name] is None)
        assert found[name] is None or error(found[name], exact[name]) < 5e-6, name


def test_no_double_backward_in_silence():
    case = Case(3, 3, 4)
    q, k, v, *_ = (t.float().requires_grad_() for t in case.tensors(DEVICE) if t is not None)
    output = causal_attention("fused", q, k, v, RelativeBias()).output
    (grad,) = torch.autograd.grad((output**2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_long_memories_take_memory_in_proportion():
    """No tensor of position scores grows with slots times distances."""
    for slots in (512, 2048, 8192):
        case = Case(slots, 512, 64, "right")
        part = banded._ahead(slots, slice(0, 512), RelativeBias(), case.window(DEVICE), Attended(None, None))
        rows = torch.empty(1, 1, slots, 64, device="meta"), torch.empty(1, 1, 512, 64, device="meta")
        inputs = function._inputs(part, rows[0], rows[1], rows[1], part.bias, 1.0, 0.0, None)._replace(stored=None)
        layout = launch.Layout.of(inputs)
        assert layout.chunk * layout.chunks >= slots
        assert layout.width <= 1024
