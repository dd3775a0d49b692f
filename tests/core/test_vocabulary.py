"""Full and adaptive softmax, and losses over them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamemo_fairseq.core.layers import chunked_loss
from lamemo_fairseq.core.layers.vocabulary import Bands, WordEmbedding

from ..gpus import DEVICE
from .helpers import random_tokens, tiny_decoder

WORDS = 17
SOFTMAXES = {
    "full": {},
    "full, narrow": {"decoder_input_dim": 4},
    "full, untied": {"untie_output": True, "decoder_output_dim": 6},
    "adaptive": {"adaptive_softmax_cutoff": "6,11"},
    "adaptive, narrow": {"adaptive_softmax_cutoff": "6,11", "decoder_input_dim": 4},
    "adaptive, divided": {"adaptive_softmax_cutoff": "6,11", "adaptive_softmax_factor": 2.0, "adaptive_input": True},
    "adaptive, untied": {"adaptive_softmax_cutoff": "6,11", "adaptive_softmax_factor": 2.0, "untie_output": True},
}
softmaxes = pytest.mark.parametrize("options", SOFTMAXES.values(), ids=SOFTMAXES.keys())
adaptive_ones = pytest.mark.parametrize(
    "options",
    [o for o in SOFTMAXES.values() if "adaptive_softmax_cutoff" in o],
    ids=[n for n in SOFTMAXES if "adapt" in n],
)


def every_word_once():
    """Targets holding every word."""
    return torch.arange(WORDS).view(1, WORDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("words", [50, 64])
@pytest.mark.parametrize("width", [12, 16])
@pytest.mark.parametrize("chunk", [5, 64])
def test_loss_in_chunks_against_float64(dtype, words, width, chunk, monkeypatch):
    """Of widths that break alignment too; on a GPU by its own products."""
    monkeypatch.setattr(chunked_loss, "tokens_at_once", lambda *_: chunk)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in ((23, width), (words, width), (words,))]
    target = torch.randint(words, (23,), generator=generator)
    exact = [t.double().requires_grad_() for t in tensors]
    expected = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*exact), target, reduction="sum")
    given = [t.to(DEVICE).requires_grad_() for t in tensors]
    found = chunked_loss.linear_cross_entropy(*given, target.to(DEVICE))
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(found.cpu().double(), expected.detach(), rtol=tolerance, atol=0)
    (found / 3).backward()
    (expected / 3).backward()
    for one, other in zip(given, exact, strict=True):
        assert one.grad.dtype == dtype
        assert (one.grad.cpu().double() - other.grad).norm() < tolerance * other.grad.norm()


@pytest.mark.parametrize("words", [7, 5000])
def test_softmax_kernel(words):
    softmax_kernel = pytest.importorskip("lamemo_fairseq.core.kernels.softmax_kernel")
    scores = torch.randn(6, words, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    target = torch.tensor([0, 1, words - 1, 3, 1, 5], device=DEVICE)
    exact = scores.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, target, reduction="none")
    losses.sum().backward()
    in_place = torch.full((6, words + 3), float("nan"), device=DEVICE)[:, :words].copy_(scores)
    found = softmax_kernel.softmax_gradient_(in_place, target, True)
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(in_place.double(), exact.grad, rtol=1e-4, atol=1e-7)


@softmaxes
def test_probabilities_add_up_to_one(options):
    decoder = tiny_decoder(words=WORDS, **options)
    log_probs = decoder.log_probs(decoder.read_text(random_tokens(2, 5)))
    assert log_probs.shape == (2, 5, WORDS)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 5, dtype=torch.float64))


@adaptive_ones
def test_targets_alone_have_the_same_probabilities(options):
    decoder, target = tiny_decoder(words=WORDS, **options), every_word_once()
    features = decoder.read_text(random_tokens(*target.shape))
    everything = decoder.log_probs(features).gather(2, target.unsqueeze(-1)).squeeze(-1)
    wanted = decoder.adaptive_softmax.target_log_probs(features, target)
    torch.testing.assert_close(wanted, everything, rtol=1e-12, atol=1e-12)


@softmaxes
def test_no_target_has_no_probability(options):
    decoder = tiny_decoder(words=WORDS, **options)
    features, nothing = decoder.read_text(random_tokens(2, 3)), torch.empty(2, 0, dtype=torch.int64)
    assert decoder.target_log_probs(features[:, :0], nothing).shape == (2, 0)


@softmaxes
@pytest.mark.parametrize("chunk", [1, 3, 10**9])
def test_the_loss_is_that_of_all_log_probabilities(options, chunk, monkeypatch):
    """However many tokens are scored at once, and with bands that no target is in."""
    monkeypatch.setattr(chunked_loss, "tokens_at_once", lambda *_: chunk)
    decoder = tiny_decoder(words=WORDS, **options)
    for target in (every_word_once(), torch.tensor([[4, 1], [5, 3]])):
        features = decoder.read_text(random_tokens(*target.shape))
        loss = decoder.loss(features, target)
        expected = -decoder.log_probs(features).gather(2, target.unsqueeze(-1)).sum()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        parameters = list(decoder.parameters())
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for one, other in zip(gradients, torch.autograd.grad(expected, parameters, allow_unused=True), strict=True):
            if one is None or other is None:  # of bands without a target
                assert (one is None or not one.any()) and (other is None or not other.any())
            else:
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@given(cuts=st.lists(st.integers(1, 29), max_size=4, unique=True).map(sorted), factor=st.sampled_from([1.0, 2.0]))
@settings(max_examples=50, deadline=None)
def test_embedding_by_bands(cuts, factor):
    bands = Bands(30, 32, cuts, factor)
    embedding = WordEmbedding(bands, 8).double()
    embedding.reset_parameters()
    tokens = torch.arange(30)
    found = embedding(tokens)
    for band in range(len(bands)):
        table, rows = bands.table_of(band)
        expected = embedding.tables[table].weight[rows] @ embedding.projections[table].T * 8**0.5
        torch.testing.assert_close(found[bands.starts[band] : bands.ends[band]], expected)


@softmaxes
def test_tied_weights_are_one_parameter(options):
    decoder = tiny_decoder(words=WORDS, **options)
    output = decoder.output or decoder.adaptive_softmax
    same = output.weights[0] is decoder.embed_tokens.tables[0].weight
    assert same == (not options.get("untie_output", False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_add_up_in_float32(dtype):
    decoder = tiny_decoder(words=WORDS, dtype=dtype, **SOFTMAXES["adaptive, divided"])
    logits, _ = decoder.adaptive_softmax(decoder.read_text(random_tokens(1, 6)), random_tokens(1, 6).view(-1))
    assert {t.dtype for t in logits} == {torch.float32}


@pytest.mark.parametrize("words", [[], [4], [16, 4, 11, 10, 6, 4]], ids=str)
def test_targets_are_counted_on_the_host(words):
    """A device without values stands for one that must not be waited for."""
    decoder, on_host = tiny_decoder(**SOFTMAXES["adaptive"]), torch.tensor([words], dtype=torch.long)
    expected = [len(tokens) for _, tokens in decoder.loss_layer.plan(on_host).tokens()]
    decoder.to("meta")
    assert [len(tokens) for _, tokens in decoder.loss_layer.plan(on_host.to("meta"), on_host).tokens()] == expected
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        list(decoder.loss_layer.plan(on_host.to("meta")).tokens())
