"""Single kernels of a decoding step; without a GPU under Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lamemo_fairseq.core.decoding.drawing import truncated
from lamemo_fairseq.core.decoding.drawn import Drawn

from ..gpus import DEVICE

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
clock = pytest.importorskip("lamemo_fairseq.core.decoding.word_kernels").clock
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU, no interpreter"
)
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def random(*sizes, seed=0, dtype=torch.float32):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def norm_of(size, dtype, seed):
    norm = nn.LayerNorm(size)
    norm.weight.data, norm.bias.data = 1 + random(size, seed=seed) / 4, random(size, seed=seed + 1) / 4
    return norm.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size", "width"), [(1, 40, 24), (3, 13, 70), (4, 13, 70), (21, 300, 24)])
@torch.no_grad()
def test_a_map_with_all_that_stands_around_it(rows, size, width, dtype):
    from lamemo_fairseq.core.kernels.row_kernels import row_map

    x, weight, bias = (
        random(rows, size, dtype=dtype),
        random(width, size, seed=1, dtype=dtype) / 8,
        random(width, seed=2),
    )
    x, bias, before = 3 * x + 1, bias.to(dtype), 2 * random(rows, width, seed=3, dtype=dtype) - 1
    norm, before_norm = norm_of(size, dtype, 4), norm_of(width, dtype, 6)

    def normed(rows, norm):
        return F.layer_norm(rows.double(), rows.shape[1:], norm.weight.double(), norm.bias.double(), norm.eps)

    product = normed(x, norm) @ weight.double().T + bias.double()
    cases = [
        (row_map(x, weight), x.double() @ weight.double().T),
        (row_map(x, weight, bias, norm=norm, relu=True), product.relu()),
        (row_map(x, weight, residual=before), x.double() @ weight.double().T + before.double()),
        (
            row_map(x, weight, bias, norm=norm, residual=before, residual_norm=before_norm, dtype=torch.float32),
            product + normed(before, before_norm),
        ),
    ]
    eps = torch.finfo(dtype).eps
    for found, expected in cases:
        torch.testing.assert_close(found.double(), expected, rtol=4 * eps, atol=8 * eps * float(expected.abs().max()))
    assert cases[-1][0].dtype == torch.float32


def draw(scores, added=None, seed=0, at=0, **options):
    """Words, their log-probabilities, the log-probabilities of all, and what else the kernel keeps count of."""
    from lamemo_fairseq.core.decoding.word_kernels import draw_next

    rows, words = len(scores), torch.full((len(scores), 1), -1, device=DEVICE)
    tokens, space = torch.arange(rows, device=DEVICE), torch.full_like(scores, torch.nan)
    noted = torch.full((rows, 3), -1, device=DEVICE)
    drawn = Drawn(noted, noted.float(), torch.full_like(tokens, at))
    draw_next(scores, words, tokens, drawn, torch.tensor([seed], device=DEVICE), space, added=added, **options)
    assert tokens.equal(torch.arange(rows, device=DEVICE) + 1) and drawn.position.eq(at + 1).all()
    assert drawn.words[:, at].equal(words[:, 0]) and drawn.words.ne(-1).sum() == rows
    assert drawn.words[:, :at].eq(-1).all()
    return words[:, 0], drawn.log_probs[:, at]


@triton.jit
def clock_kernel(p_out, seed, first, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + i, clock(seed, first + i), mask=i < count)


def clocks(seed, first, count):
    """The kernel's random numbers ``first .. first + count - 1``."""
    out = torch.empty(count, device=DEVICE)
    clock_kernel[(triton.cdiv(count, 4096),)](out, seed, first, count, BLOCK=4096)
    return out


@pytest.mark.parametrize(
    "tops", [{}, {"top_k": 4}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.85}, {"top_p": 1e-9}, {"top_k": 1}], ids=str
)
def test_the_kernel_draws_from_what_plain_operations_draw_from(tops):
    """The word whose clock rings first; of words alike, those before in the dictionary are the first to be kept."""
    rows, size, at = 60, 21, 2
    scores, added = 2 * random(rows, size, seed=3), torch.zeros(size, device=DEVICE)
    scores[20:] /= 50  # the last words that are kept are as probable as any
    scores[:40:2, 5] = scores[:40:2, 11] = scores[:40:2].amax(1) + 1
    added[7], added[2] = -torch.inf, -1.5
    log_probs = (scores / 0.8).log_softmax(-1) + added
    words, noted = draw(scores, added, seed=11, temperature=0.8, at=at, **tops)
    torch.testing.assert_close(noted, log_probs.gather(1, words[:, None])[:, 0], rtol=0, atol=1e-5)
    # A word's share of a millionth less for each one before it keeps the order of words alike.
    kept, order = truncated(log_probs - 1e-6 * torch.arange(size, device=DEVICE), **tops)
    if order is not None:
        kept = torch.full_like(log_probs, -torch.inf).scatter(1, order, kept)
    rings = kept - clocks(11, at * rows * size, rows * size).view(rows, size).log()
    assert words.equal(rings.argmax(1))


def test_clocks_are_exponentially_distributed():
    drawn = clocks(5, 1000, 60_000).double()
    uniform = (-drawn).exp().sort().values
    distance = (uniform - torch.linspace(0, 1, len(drawn), dtype=torch.float64, device=DEVICE)).abs().max()
    assert distance < 1.63 / len(drawn) ** 0.5  # Kolmogorov and Smirnov's, at 1%
    assert drawn.min() > 0 and int(drawn.lt(1e-3).sum()) == pytest.approx(60, abs=25)


def test_other_seeds_and_positions_give_other_words():
    scores = random(40, 21)
    first = draw(scores)[0]
    assert first.equal(draw(scores)[0])
    assert first.ne(draw(scores, seed=1)[0]).any() and first.ne(draw(scores, at=1)[0]).any()


def test_words_that_are_not_numbers_are_noted():
    scores = random(2, 21)
    scores[1, 3] = torch.nan
    words, noted = draw(scores, top_p=0.9)
    assert noted.isfinite().tolist() == [True, False] and 0 <= int(words[1]) < 21
