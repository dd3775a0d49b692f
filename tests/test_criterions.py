"""Fairseq's criterions over full and adaptive softmaxes."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.criterions.cross_entropy import CrossEntropyCriterion

from lamemo_fairseq.core.layers import chunked_loss
from lamemo_fairseq.criterions.chunked_cross_entropy import ChunkedCrossEntropyCriterion
from lamemo_fairseq.models.language_models import LaMemoLanguageModel

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


def loss_of(criterion_class, decoder, target):
    task = SimpleNamespace(target_dictionary=decoder.dictionary)
    criterion = criterion_class(task, sentence_avg=False)
    inputs = {"src_tokens": random_tokens(*target.shape), "position": None}
    sample = {"net_input": inputs, "target": target, "ntokens": target.numel()}
    decoder.zero_grad()
    loss, _, _ = criterion(LaMemoLanguageModel(decoder), sample)
    loss.sum().backward()
    return loss.sum().detach(), {name: p.grad for name, p in decoder.named_parameters()}


@adaptive_ones
def test_both_criterions_give_the_same_loss_and_gradients(options):
    decoder = tiny_decoder(words=WORDS, **options)
    target = every_word_once()
    adaptive, adaptive_gradients = loss_of(AdaptiveLoss, decoder, target)
    plain, gradients = loss_of(CrossEntropyCriterion, decoder, target)
    torch.testing.assert_close(adaptive, plain, rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(adaptive_gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@softmaxes
@pytest.mark.parametrize("chunk", [1, 3, 10**9])
def test_chunked_criterion_gives_the_same_loss_and_gradients(options, chunk, monkeypatch):
    """However many tokens are scored at once, and with bands that no target is in."""
    monkeypatch.setattr(chunked_loss, "tokens_at_once", lambda *_: chunk)
    decoder = tiny_decoder(words=WORDS, **options)
    for target in (every_word_once(), torch.tensor([[4, 1], [5, 3]])):
        chunked, chunked_gradients = loss_of(ChunkedCrossEntropyCriterion, decoder, target)
        plain, gradients = loss_of(CrossEntropyCriterion, decoder, target)
        torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(chunked_gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_chunked_criterion_has_no_losses_of_single_tokens():
    criterion = ChunkedCrossEntropyCriterion(SimpleNamespace(target_dictionary=tiny_decoder().dictionary), False)
    with pytest.raises(NotImplementedError, match="--criterion cross_entropy"):
        criterion(None, {}, reduce=False)


@softmaxes
def test_probabilities_add_up_to_one(options):
    decoder = tiny_decoder(words=WORDS, **options)
    output = decoder(random_tokens(2, 5))
    probabilities = decoder.get_normalized_probs(output, log_probs=False)
    assert probabilities.shape == (2, 5, WORDS)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(probabilities.log(), decoder.get_normalized_probs(output, log_probs=True))


@softmaxes
def test_a_sample_needs_its_targets_alone(options):
    decoder = tiny_decoder(words=WORDS, **options)
    target = every_word_once()
    output = decoder(random_tokens(*target.shape))
    everything = decoder.get_normalized_probs(output, log_probs=True).gather(2, target.unsqueeze(-1))
    wanted = decoder.get_normalized_probs(output, log_probs=True, sample={"target": target}).gather(
        2, target.unsqueeze(-1)
    )
    torch.testing.assert_close(wanted, everything, rtol=1e-12, atol=1e-12)
