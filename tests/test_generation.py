"""Prompts, beams and scores with a cached memory, against passes over whole texts."""

import threading

import pytest
import torch
from fairseq import search

from lamemo_fairseq.core.decoding.drawing import draw
from lamemo_fairseq.core.decoding.sampler import Sampler
from lamemo_fairseq.core.decoding.state import DecodingState
from lamemo_fairseq.generation import PromptDataset, PromptGenerator, StreamingScorer
from lamemo_fairseq.models.language_models import MemoryLanguageModel

from .core.helpers import first_of_each_memory, whole_segments
from .helpers import VARIANTS, dictionary_of, random_tokens, tiny_decoder

EOS = 2
LENGTHS = [0, 1, 17, 3, 8, 2, 16]


def model_of(*args, **options):
    return MemoryLanguageModel(tiny_decoder(*args, **options))


def prompts_of(lengths, seed=3):
    """Texts with end-of-sentence tokens inside."""
    texts = [random_tokens(1, n, seed=seed + n)[0] for n in lengths]
    for text in texts:
        text[1:-1:4] = EOS
    return texts


def batch_of(texts):
    data = PromptDataset(texts, dictionary_of(17))
    return data.collater([data[i] for i in range(len(texts))])


def generate(models, texts, **options):
    generator = PromptGenerator(models, dictionary_of(17), **{"beam_size": 3, "max_len_b": 9, **options})
    return generator.generate(models, batch_of(texts))


@torch.no_grad()
def log_probs(model, text, temperature=1.0):
    """Of every token of a text, by the pass over whole segments."""
    tokens = torch.cat([torch.tensor([EOS]), text[:-1]]).unsqueeze(0)
    features = whole_segments(model.decoder, tokens)
    scores = model.get_normalized_probs((model.decoder.output_layer(features), None), True)
    return (scores[0] / temperature).log_softmax(-1).gather(1, text.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
@torch.no_grad()
def test_rows_of_any_places_share_a_batch(variant):
    decoder = tiny_decoder(variant, mem_len=5)
    tokens = random_tokens(len(LENGTHS), 30)
    state = DecodingState(decoder, len(LENGTHS))
    read = list(LENGTHS)
    state.read(tokens[:, : max(read)], read)
    expected = whole_segments(decoder, tokens)
    for _ in range(12):
        new = torch.stack([tokens[row, n] for row, n in enumerate(read)]).unsqueeze(1)
        features = state.read(new)
        for row, n in enumerate(read):
            torch.testing.assert_close(features[row, 0], expected[row, n], rtol=0, atol=1e-9)
        read = [n + 1 for n in read]


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[6]], ids="-".join)
@torch.no_grad()
def test_rows_at_one_place_may_have_memories_of_other_lengths(variant):
    decoder = tiny_decoder(variant, mem_len=5)
    tokens, read = random_tokens(3, 12), [1, 4, 7]
    state = DecodingState(decoder, 3)
    state.read(tokens[:, :7], read)
    expected = whole_segments(decoder, tokens)
    for step in range(5):
        features = state.read(torch.stack([tokens[row, n + step] for row, n in enumerate(read)]).unsqueeze(1))
        for row, n in enumerate(read):
            torch.testing.assert_close(features[row, 0], expected[row, n + step], rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
@torch.no_grad()
def test_beams_may_be_reordered_at_every_step(variant):
    decoder = tiny_decoder(variant, tokens_per_sample=4, mem_len=6)
    generator = torch.Generator().manual_seed(0)
    tokens, incremental = random_tokens(5, 1), {}
    for rows in [5] * 9 + [3] * 6 + [1] * 4:  # the memory is full after eight
        scores, _ = decoder(tokens, incremental_state=incremental)
        torch.testing.assert_close(
            scores[:, -1], decoder.output_layer(whole_segments(decoder, tokens))[:, -1], rtol=0, atol=1e-9
        )
        order = torch.randint(len(tokens), (rows,), generator=generator)
        decoder.reorder_incremental_state_scripting(incremental, order)
        tokens = torch.cat([tokens[order], torch.randint(4, 17, (rows, 1), generator=generator)], dim=1)


@pytest.mark.parametrize(
    ("variant", "adaptive"),
    [*((variant, False) for variant in VARIANTS), *((variant, True) for variant in first_of_each_memory().values())],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "adaptive" if value else "full",
)
def test_scores_of_hypotheses_are_those_of_their_texts(variant, adaptive):
    options = {"adaptive_softmax_cutoff": "6,11"} if adaptive else {}
    model = model_of(variant, **options)
    texts = prompts_of(LENGTHS)
    for text, hypotheses in zip(texts, generate([model], texts), strict=True):
        assert len(hypotheses) == 3
        for hypothesis in hypotheses:
            found = hypothesis["tokens"]
            assert torch.equal(found[: len(text)], text) and found[-1] == EOS
            assert len(text) < len(found) <= len(text) + 10
            expected = log_probs(model, found)
            torch.testing.assert_close(hypothesis["positional_scores"].double(), expected, rtol=0, atol=1e-5)
            assert float(hypothesis["score"]) == pytest.approx(float(expected.mean()), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"adaptive_softmax_cutoff": "6,11"}], ids=["full", "adaptive"])
@pytest.mark.parametrize("sampled", [False, True], ids=["beam", "sampling"])
def test_a_temperature_is_that_of_the_prompt_too(sampled, options):
    """As in fairseq. A hypothesis would else be ranked by probabilities of two distributions."""
    models, texts, warm = [model_of(seed=seed, **options) for seed in range(2)], prompts_of(LENGTHS), 2.5
    strategy = search.Sampling(dictionary_of(17)) if sampled else None
    for some in (models[:1], models):
        found = generate(some, texts, temperature=warm, unk_penalty=1.0, search_strategy=strategy)
        for text, hypotheses in zip(texts, found, strict=True):
            for hypothesis in hypotheses:
                tokens, scores = hypothesis["tokens"], hypothesis["positional_scores"].double()
                expected = torch.stack([log_probs(m, tokens, warm) for m in some]).exp().mean(0).log()
                expected[len(text) :] -= tokens[len(text) :].eq(3).double()  # an unknown word
                torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def test_a_prompt_gives_the_same_alone_and_in_a_batch():
    model, texts = model_of(), prompts_of(LENGTHS)
    together = generate([model], texts, max_len_a=1, max_len_b=3)
    for text, hypotheses in zip(texts, together, strict=True):
        alone = generate([model], [text], max_len_a=1, max_len_b=3)[0]
        for one, other in zip(alone, hypotheses, strict=True):
            assert torch.equal(one["tokens"], other["tokens"])
            assert len(one["tokens"]) <= 2 * len(text) + 4


def test_beam_search_finds_what_trying_all_continuations_finds():
    model, text = model_of(words=8, tokens_per_sample=2), random_tokens(1, 5, words=8)[0]
    generator = PromptGenerator([model], dictionary_of(8), beam_size=7, max_len_b=2, normalize_scores=False)
    data = PromptDataset([text], dictionary_of(8))
    best = generator.generate([model], data.collater([data[0]]))[0][0]
    words = [w for w in range(8) if w not in (1, EOS)]
    tails = [[a, EOS] for a in words] + [[a, b, EOS] for a in words for b in words]
    scores = [float(log_probs(model, torch.cat([text, torch.tensor(tail)])).sum()) for tail in tails]
    assert best["tokens"][len(text) :].tolist() == tails[max(range(len(tails)), key=scores.__getitem__)]


def test_several_models_are_averaged():
    models, texts = [model_of(seed=0), model_of(VARIANTS[7], seed=1)], prompts_of([5, 9])
    for hypotheses in generate(models, texts):
        for hypothesis in hypotheses:
            logs = torch.stack([log_probs(m, hypothesis["tokens"]) for m in models])
            expected = logs.exp().mean(0).log()
            torch.testing.assert_close(hypothesis["positional_scores"].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_scores_stream_through_memory(variant, monkeypatch):
    monkeypatch.setattr("lamemo_fairseq.generation.scorer.TOKENS_AT_ONCE", 4)
    model, texts = model_of(variant, tokens_per_sample=3), prompts_of([40, 1, 7, 0])
    scored = StreamingScorer(dictionary_of(17)).generate([model], batch_of(texts))
    for text, (hypothesis,) in zip(texts, scored, strict=True):
        assert torch.equal(hypothesis["tokens"], text)
        expected = log_probs(model, text) if len(text) else torch.zeros(0, dtype=torch.float64)
        torch.testing.assert_close(hypothesis["positional_scores"], expected, rtol=0, atol=1e-9)


def test_the_cache_does_not_grow_and_the_memory_is_refreshed_once_a_segment(monkeypatch):
    decoder = tiny_decoder(tokens_per_sample=4, mem_len=6)
    state, sizes, opened = DecodingState(decoder, 2), [], []
    original = type(state.cache).refresh
    monkeypatch.setattr(type(state.cache), "refresh", lambda *a, **k: (opened.append(len(sizes)), original(*a, **k))[1])
    for column in random_tokens(2, 40).T:
        state.read(column.unsqueeze(1))
        sizes.append(state.cache.size())
    assert len(set(sizes)) == 1
    assert opened == list(range(4, 40, 4))


def test_calls_at_the_same_time_share_no_memory():
    model, texts = model_of(), prompts_of([30, 11])
    alone = [[h["tokens"].tolist() for h in generate([model], [text])[0]] for text in texts]
    found = [[], []]

    def work(i):
        for _ in range(5):
            found[i].append([h["tokens"].tolist() for h in generate([model], [texts[i]])[0]])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[alone[0]] * 5, [alone[1]] * 5]


def test_options_without_meaning_here_say_so():
    model = model_of()
    with pytest.raises(ValueError, match="--max-len-b"):
        generate([model], prompts_of([3]), max_len_b=0, min_len=2)
    with pytest.raises(ValueError, match="--lm-path"):
        PromptGenerator([model], dictionary_of(17), lm_model=model)


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
@torch.no_grad()
def test_the_sampler_reads_on_as_the_pass_over_segments_does(variant):
    model = model_of(variant)
    prompts, lengths = random_tokens(3, 10), [10, 1, 6]
    state = DecodingState(model.decoder, 3)
    state.read(prompts[:, :-1], [n - 1 for n in lengths])
    last = torch.stack([prompts[row, n - 1] for row, n in enumerate(lengths)])
    found = Sampler(state, choose=lambda log_p: draw(log_p, temperature=0))(last, 15)
    for row, n in enumerate(lengths):
        text = torch.cat([prompts[row, :n], found[row]]).unsqueeze(0)
        scores = model.decoder.output_layer(whole_segments(model.decoder, text))[0, n - 1 : -1]
        assert torch.equal(scores.argmax(-1), found[row])


def test_drawn_words_follow_the_probabilities_asked_for():
    torch.manual_seed(0)
    probs = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])

    def frequencies(**options):
        return draw(probs.log().expand(40_000, -1), **options).bincount(minlength=5) / 40_000

    def expected(weights):
        return torch.tensor(weights) / sum(weights)

    close = {"rtol": 0, "atol": 0.015}
    torch.testing.assert_close(frequencies(), probs, **close)
    torch.testing.assert_close(frequencies(temperature=2.0), expected([p**0.5 for p in probs.tolist()]), **close)
    torch.testing.assert_close(frequencies(top_k=2), expected([0.5, 0.25, 0.0, 0.0, 0.0]), **close)
    torch.testing.assert_close(frequencies(top_p=0.8), expected([0.5, 0.25, 0.15, 0.0, 0.0]), **close)
    assert frequencies(temperature=0)[0] == 1
