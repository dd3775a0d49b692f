"""The analysis: what is recorded of attention is what eager attention computes, and sums are what they say."""

import math

import pytest
import torch

from lamemo_fairseq.analysis import Attention, Losses, Mixing, record, recording
from lamemo_fairseq.core.attention import causal_attention, eager

from .helpers import VARIANTS, random_tokens, read_streams, segments_of, tiny_decoder
from .processes import _FORKS


class Heard:
    """A listener that keeps everything."""

    def __init__(self):
        self.weights, self.mixing = [], []

    def causal(self, layer, weights):
        self.weights.append((layer, weights))

    def lookahead(self, layer, weights, alpha, window):
        self.mixing.append((layer, weights, alpha, window))


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_recording_changes_nothing_and_weights_are_a_softmax(variant):
    decoder = tiny_decoder(variant)
    tokens = random_tokens(2, 14)
    expected = read_streams(decoder, tokens)
    configs = [layer.self_attn.config for layer in decoder.layers]
    heard = Heard()
    with torch.no_grad(), record(decoder, heard):
        found = read_streams(decoder, tokens)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert [layer.self_attn.config for layer in decoder.layers] == configs
    assert not any(layer.self_attn._forward_pre_hooks for layer in decoder.layers)
    assert [layer for layer, _ in heard.weights] == [*range(len(decoder.layers))] * 5
    for _, weights in heard.weights:
        queries, keys = weights.shape[2:]
        assert torch.allclose(weights.sum(-1), torch.ones(()).double(), rtol=0, atol=1e-12)
        assert weights.min() >= 0 and (weights.triu(keys - queries + 1) == 0).all()
    looking = [*decoder.memory.refreshed] if variant[0] == "lookahead" else []
    # Not before the first slot.
    assert [layer for layer, *_ in heard.mixing] == looking * (2 if variant[2] == "seldom" else 4)
    for _, weights, alpha, window in heard.mixing:
        seen = weights.sum(-1)
        assert torch.allclose(seen, torch.ones(()).double(), rtol=0, atol=1e-5)  # eps of the interpolation
        assert (alpha > 0).all() and (alpha < 1).all()
        if not window.both_sides:
            position = window.first + torch.arange(weights.size(3))
            assert (weights[:, :, position <= torch.arange(weights.size(2)).unsqueeze(1)] == 0).all()


def test_weights_read_out_what_attention_reads_out():
    """Weights times values are the output, with values that are not one-hot."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for n in (5, 9, 9))
    bias = eager.RelativeBias(table=torch.randn(3, 9, 4, generator=generator, dtype=torch.float64))
    backend, heard = recording._RECORDING, Heard()
    backend.listener, backend.layer = heard, 7
    try:
        for span, nearest in ((None, 0), (3, 0), (3, 1)):
            output = causal_attention("recording", q, k, v, bias, span, nearest=nearest).output
            layer, weights = heard.weights[-1]
            assert layer == 7 and torch.allclose(weights @ v, output, rtol=0, atol=1e-12)
    finally:
        backend.listener = None


@pytest.mark.parametrize("mem_len", [4, 7])
def test_alpha_is_the_share_that_the_stored_normalisers_give(mem_len):
    """The normaliser after a refresh is logaddexp of the stored one and the window's: alpha from the two alone."""
    decoder = tiny_decoder(mem_len=mem_len, decoder_layers=3)
    heard, state = Heard(), None
    with torch.no_grad(), record(decoder, heard):
        for _, segment in segments_of(decoder, random_tokens(2, 15)):
            before = state
            _, state, _ = decoder.read_segment(segment, state)
            if before is None:
                continue
            for layer, held in enumerate(before.normalizers):
                found_layer, _, alpha, _ = heard.mixing[layer - len(before.normalizers)]
                slots = state.normalizers[layer].size(2) - segment.size(
                    1
                )  # of these slots the refreshed values are kept
                merged = state.normalizers[layer][:, :, :slots]
                kept = held[:, :, held.size(2) - slots :]
                share = (kept - merged).exp()
                assert found_layer == layer
                assert torch.allclose(alpha[:, :, held.size(2) - slots :], share, rtol=2e-6, atol=0)
    assert slots > 0


def test_means_by_distance_slot_and_age():
    """Against loops over queries and keys."""
    weights = torch.rand(2, 3, 4, 10).tril(6)
    attention = Attention()
    attention.add(0, torch.rand(2, 3, 4, 7))  # before the memory was full
    attention.add(0, weights)
    attention.add(0, torch.rand(2, 3, 2, 8))  # a short segment
    by_distance, by_slot = attention.by_distance(0), attention.by_slot(0)
    for distance in range(10):
        pairs = [weights[:, :, i, 6 + i - distance].mean() for i in range(4) if 6 + i - distance >= 0]
        assert float(by_distance[distance]) == pytest.approx(float(sum(pairs) / len(pairs)), rel=1e-6)
    assert by_slot.tolist() == pytest.approx(weights[..., :6].mean((0, 1, 2)).tolist(), rel=1e-6)

    mixing = Mixing()
    alpha = torch.rand(2, 3, 7)
    mixing.add(1, alpha)
    expected = [alpha[..., 4:], alpha[..., 1:4], alpha[..., :1]]  # slots written 1, 2, 3 segments of 3 ago
    assert mixing.by_age(1, 3).tolist() == pytest.approx([float(a.mean()) for a in expected], rel=1e-6)


@pytest.mark.parametrize("slots", [0, 3])
def test_by_distance_attention_adds_up_to_more_than_one(slots):
    """Far keys are those of a few queries: what its page says of the sums. By slot it is the share of the memory."""
    weights = torch.rand(1, 2, 4, slots + 4).tril(slots)
    near = weights.triu()  # no query attends farther than the memory is long
    for given, more in ((weights, True), (near, False)):
        given = given / given.sum(-1, keepdim=True)
        attention = Attention()
        attention.add(0, given)
        assert (float(attention.by_distance(0).sum()) > 1 + 1e-3) == more
        assert float(attention.by_distance(0).sum()) > 1 - 1e-6
        share = given[..., :slots].sum(-1).mean()
        assert float(attention.by_slot(0).sum()) == pytest.approx(float(share), rel=1e-6)


def test_padding_does_not_count():
    losses = Losses(3)
    target = torch.tensor([[5, 1, 7], [5, 5, 5]])
    log_probs = torch.full((2, 3, 9), -math.log(2))
    log_probs[1] *= 3
    losses.add(log_probs, target, torch.tensor([3, 1]))
    losses.add(log_probs[:1, :2], target[:1, :2], torch.tensor([2]))
    assert losses.by_position().tolist() == pytest.approx([5 / 3, 1, 1]) and losses.counts.tolist() == [3, 2, 1]
    assert losses.mean() == pytest.approx(8 / 6)


def test_training_never_imports_the_analysis():
    """In a process that has imported what fairseq-train imports, with this package."""
    code = "import sys; m = sys.modules; sys.exit('lamemo_fairseq' not in m or 'lamemo_fairseq.analysis' in m)"
    worker = _FORKS.Process(target=exec, args=(code,))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
