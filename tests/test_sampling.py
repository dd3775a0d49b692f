"""Plain sampling by the fast sampler against fairseq's own generator."""

import copy
import math
import pickle
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from fairseq.search import DiverseBeamSearch, Sampling
from fairseq.sequence_generator import SequenceGenerator

from lamemo_fairseq.core.decoding.drawing import truncated
from lamemo_fairseq.core.decoding.sampler import Sampler
from lamemo_fairseq.core.decoding.state import DecodingState
from lamemo_fairseq.core.decoding.step import KernelStep, kernel_step
from lamemo_fairseq.core.memory import DivergenceError
from lamemo_fairseq.generation import PromptGenerator, sampling

from .helpers import VARIANTS, dictionary_of
from .test_generation import EOS, LENGTHS, batch_of, model_of, prompts_of

WORDS = dictionary_of(17)


class ReplayedOnTheHost(Sampler):
    """The sampler as it goes on a GPU, but for the graphs themselves."""

    def __init__(self, *args, **kwargs):
        with mock.patch("lamemo_fairseq.core.decoding.sampler.kernel_step", lambda state: None):
            super().__init__(*args, graphs=True, **kwargs)

    def _record(self, run, warm_up=0):
        return SimpleNamespace(replay=run)


def sampler_of(models, topk=-1, topp=-1.0, **options):
    options = {"beam_size": 3, "max_len_b": 9, **options}
    return PromptGenerator(models, WORDS, search_strategy=Sampling(WORDS, topk, topp), **options)


def by_fairseq(monkeypatch):
    monkeypatch.setattr("lamemo_fairseq.generation.generator.is_plain_sampling", lambda generator: False)


def dense(probs, words):
    return probs if words is None else torch.zeros(len(probs), len(WORDS)).to(probs).scatter(1, words, probs)


@pytest.mark.parametrize("tops", [{}, {"topk": 4}, {"topp": 0.6}, {"topk": 3, "topp": 0.85}, {"topp": 1e-3}], ids=str)
def test_a_word_is_drawn_from_what_fairseq_draws_it_from(tops, monkeypatch):
    """Also where penalties have taken some of the probability away."""
    generator = torch.Generator().manual_seed(0)
    log_probs = (2 * torch.randn(20, 17, generator=generator, dtype=torch.float64)).log_softmax(-1)
    log_probs[::2, EOS] = -math.inf
    given = []

    def first(probs, count, replacement):
        given.append(probs.clone())
        return torch.zeros(len(probs), count, dtype=torch.int64)

    monkeypatch.setattr(torch, "multinomial", first)
    for row in log_probs:
        Sampling(WORDS, **{f"sampling_{name}": value for name, value in tops.items()}).step(
            0, row[None, None].clone(), None
        )
        found, words = truncated(row[None], *tops_of(tops))
        ours, theirs = (probs[probs > 0].sort().values for probs in (found.exp(), given[-1]))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        if words is not None:
            assert row[words][found.isfinite()].equal(found[found.isfinite()])


def tops_of(tops):
    """As `truncated` takes them: fairseq looks at one of them only."""
    return (0, tops["topp"]) if "topp" in tops else (tops.get("topk", 0), 1.0)


def pick_by_rank(monkeypatch):
    """Both ways take the r-th most probable of the words that they may draw, r going on from word to word."""
    calls = [0]

    def pick(probs, ranks):
        order = probs.sort(-1, descending=True).indices
        return order.gather(1, (ranks % probs.gt(0).sum(-1)).unsqueeze(-1))

    def multinomial(probs, count, replacement):
        start, calls[0] = calls[0], calls[0] + 1
        if start > 0:
            return pick(probs, torch.full((len(probs),), start))
        return torch.cat([pick(probs, torch.full((len(probs),), k)) for k in range(count)], dim=1)

    def draw(log_probs, **tops):
        start, calls[0] = calls[0], calls[0] + 1
        found, words = truncated(log_probs, **tops)
        ranks = torch.full((len(found),), start) if start else torch.arange(len(found)) % 3
        return pick(dense(found.exp(), words), ranks).squeeze(1)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    monkeypatch.setattr(sampling, "Draw", lambda **tops: partial(draw, **tops))
    return calls


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"topk": 4, "temperature": 0.7, "min_len": 5},
        {"topp": 0.8, "temperature": 1.6, "unk_penalty": 2.0, "len_penalty": 0.5},
        {"min_len": 0, "normalize_scores": False, "max_len_a": 0.5, "max_len_b": 3},
        {"topk": 5, "tokens_to_suppress": ("w0", "w3"), "max_len_b": 40},
        {"topp": 1.0, "unk_penalty": -3.0, "temperature": 2.0, "max_len_b": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("variant", "sampler"),
    [
        (VARIANTS[0], Sampler),
        (VARIANTS[0], ReplayedOnTheHost),
        (("lookahead", "disentangled", "seldom"), ReplayedOnTheHost),
        (VARIANTS[10], Sampler),
    ],
)
def test_the_same_words_have_the_same_scores(variant, sampler, options, monkeypatch):
    model, texts = model_of(variant), prompts_of(LENGTHS[::2])
    calls = pick_by_rank(monkeypatch)
    monkeypatch.setattr(sampling, "Sampler", sampler)
    found = []
    for plain in (True, False):
        if not plain:
            by_fairseq(monkeypatch)
        answers = []
        for text in texts:  # one prompt a call, so that the ranks begin anew
            calls[0] = 0
            answers.append(sampler_of([model], **options).generate([model], batch_of([text]))[0])
        found.append(answers)
    for ours, theirs in zip(*found, strict=True):
        assert [h["tokens"].tolist() for h in ours] == [h["tokens"].tolist() for h in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys()
            assert one["positional_scores"].dtype == other["positional_scores"].dtype
            torch.testing.assert_close(one["positional_scores"], other["positional_scores"], rtol=0, atol=1e-9)
            torch.testing.assert_close(one["score"], other["score"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", [Sampler, ReplayedOnTheHost])
def test_a_batch_gives_what_its_prompts_give_alone(sampler, monkeypatch):
    """However early the rows end, and in whatever order."""
    monkeypatch.setattr(sampling, "Sampler", sampler)
    model, texts = model_of(), prompts_of([5, 1, 9, 0, 14])

    def seventh(log_probs, **tops):
        forced = log_probs.isfinite().sum() == len(log_probs)
        return log_probs.topk(1 if forced else 7).indices[:, -1]

    monkeypatch.setattr(sampling, "Draw", lambda **tops: seventh)
    options = {"beam_size": 2, "max_len_b": 60, "min_len": 3}
    together = sampler_of([model], **options).generate([model], batch_of(texts))
    assert len({len(h[0]["tokens"]) - len(text) for h, text in zip(together, texts, strict=True)}) > 2
    for text, hypotheses in zip(texts, together, strict=True):
        alone = sampler_of([model], **options).generate([model], batch_of([text]))[0]
        for one, other in zip(alone, hypotheses, strict=True):
            assert one["tokens"].equal(other["tokens"])
            torch.testing.assert_close(one["positional_scores"], other["positional_scores"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{"topk": 1}, {"topp": 1e-9}, {"temperature": 1e-4}], ids=str)
def test_the_most_probable_words_are_those_of_greedy_search(options):
    model, texts = model_of(), prompts_of(LENGTHS)
    sampled = sampler_of([model], beam_size=1, max_len_b=30, **options).generate([model], batch_of(texts))
    greedy = PromptGenerator([model], WORDS, beam_size=1, max_len_b=30).generate([model], batch_of(texts))
    for (one,), (other,) in zip(sampled, greedy, strict=True):
        assert one["tokens"].equal(other["tokens"])
        if "temperature" not in options:
            torch.testing.assert_close(one["positional_scores"], other["positional_scores"], rtol=0, atol=1e-9)


def test_a_seed_gives_the_same_words_again():
    model, texts = model_of(), prompts_of([5, 9])
    again = sampler_of([model], temperature=10.0)

    def words(seed):
        torch.manual_seed(seed)
        return [[h["tokens"].tolist() for h in hs] for hs in again.generate([model], batch_of(texts))]

    assert words(1) == words(1) != words(2)
    assert len({tuple(tokens) for tokens in words(1)[0]}) > 1


def test_plain_sampling_alone_goes_past_fairseqs_loop(monkeypatch):
    models, texts, asked = [model_of(seed=0), model_of(seed=1)], prompts_of([4]), []
    original = SequenceGenerator._generate
    monkeypatch.setattr(SequenceGenerator, "_generate", lambda *a, **k: (asked.append(1), original(*a, **k))[1])

    def loops(generator, prefix=None):
        asked.clear()
        generator.generate(generator.model.models, batch_of(texts), prefix_tokens=prefix)
        return len(asked)

    assert loops(sampler_of(models[:1], topk=3)) == 0
    assert loops(sampler_of(models[:1]), prefix=texts[0][None, :2]) == 0
    assert loops(sampler_of(models)) == 1
    assert loops(sampler_of(models[:1], no_repeat_ngram_size=2)) == 1
    assert loops(PromptGenerator(models[:1], WORDS, beam_size=2)) == 1
    assert loops(PromptGenerator(models[:1], WORDS, beam_size=2, search_strategy=DiverseBeamSearch(WORDS, 2, 0.5))) == 1


@pytest.mark.parametrize(("sampler", "asked"), [(Sampler, [1]), (ReplayedOnTheHost, [32])])
def test_generation_stops_when_every_text_has_ended(sampler, asked, monkeypatch):
    model, texts, counts = model_of(), prompts_of([4, 7, 2]), []
    monkeypatch.setattr(sampling, "Sampler", sampler)
    original = Sampler.go_on
    monkeypatch.setattr(Sampler, "go_on", lambda self, *a: (counts.append(a[1]), original(self, *a))[1])
    only_end = ["<s>", *(f"w{i}" for i in range(13))]
    generator = sampler_of([model], beam_size=2, min_len=0, max_len_b=50, tokens_to_suppress=only_end, unk_penalty=1e4)
    for hypotheses in generator.generate([model], batch_of(texts)):
        assert all(h["tokens"][-1] == EOS for h in hypotheses)
    assert counts == asked


def test_the_next_call_of_the_same_sizes_replays_the_same_graphs(monkeypatch):
    recorded = []

    class Counting(ReplayedOnTheHost):
        def _record(self, run, warm_up=0):
            recorded.append(run)
            return super()._record(run)

    def generated(model, text, sampler, top_k=1, **options):
        monkeypatch.setattr(sampling, "Sampler", sampler)
        torch.manual_seed(1)
        (found,) = sampler_of([model], topk=top_k, beam_size=1, **options).generate([model], batch_of([text]))
        return found[0]["tokens"].tolist(), found[0]["positional_scores"]

    def alike(model, text, **options):
        """How many graphs were recorded for what a new sampler gives as well."""
        recorded.clear()
        words, scores = generated(model, text, Counting, **options)
        expected, exact = generated(copy.deepcopy(model), text, Sampler, **options)
        assert words == expected
        torch.testing.assert_close(scores, exact, rtol=0, atol=1e-9)
        return len(recorded)

    model, (text, other) = model_of(), prompts_of([5, 14])
    assert alike(model, text, min_len=5, unk_penalty=3.0) == 2  # a step and the refresh
    assert alike(model, other, max_len_b=20) == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5)
    assert alike(model, text) == 0
    assert alike(copy.deepcopy(model), text) == 2
    assert alike(pickle.loads(pickle.dumps(model)), text) == 2
    assert alike(model, text, top_k=3) == 2
    assert alike(model, text, top_k=3, temperature=3.0) == 2
    assert alike(model, text) == 2
    feed_forward, calls = model.decoder.layers[0].feed_forward, []
    feed_forward.fc1.weight = torch.nn.Parameter(torch.ones(12, 8, dtype=torch.float64))
    assert alike(model, text) == 2
    feed_forward.fc2 = torch.nn.Sequential(feed_forward.fc2, torch.nn.Tanh())
    assert alike(model, text) == 2
    hook = feed_forward.fc2.register_forward_hook(lambda *_: calls.append(1))
    assert alike(model, text) == 0
    assert len(calls) > 10
    hook.remove()
    assert alike(model, text) == 2


def test_a_model_that_gives_no_probabilities_is_an_error():
    model = model_of()
    with torch.no_grad():
        model.decoder.layers[0].feed_forward.fc1.weight.fill_(math.nan)
    with pytest.raises(DivergenceError, match="weights have diverged"):
        sampler_of([model]).generate([model], batch_of(prompts_of([3])))


def test_the_kernel_is_for_what_it_computes_exactly_enough():
    pytest.importorskip("triton")

    def step(dtype=torch.float32, **options):
        return kernel_step(DecodingState(model_of(dtype=dtype, **options).decoder, 1))

    assert isinstance(step(), KernelStep)
    assert isinstance(step(same_length=True), KernelStep)
    assert step(attention_backend="eager") is step(torch.float64) is None
    assert step(position_encoding="segatron", memory="recurrent", sentence_ends="w1") is None
    assert step(position_encoding="rotary") is step(position_encoding="absolute", memory="none") is None
