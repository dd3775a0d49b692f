"""Ways of searching: no n-gram twice, diverse beams and siblings, at any number of texts at a time."""

import math

import pytest
import torch
from fairseq import search

from lamemo_fairseq.core.memory import DivergenceError
from lamemo_fairseq.generation import PromptGenerator
from lamemo_fairseq.generation.repetition import aligned_right, repeating_words

from .helpers import VARIANTS, dictionary_of
from .test_generation import EOS, batch_of, generate, model_of, prompts_of

WORDS = dictionary_of(17)
SEARCHES = {
    "beam": lambda: None,
    "diverse": lambda: search.DiverseBeamSearch(WORDS, 2, 0.5),
    "siblings": lambda: search.DiverseSiblingsSearch(WORDS, 0.5),
    "sampling": lambda: search.Sampling(WORDS),
    "top-k": lambda: search.Sampling(WORDS, sampling_topk=3),
    "top-p": lambda: search.Sampling(WORDS, sampling_topp=0.7),
}


def ngrams(words, size):
    return list(zip(*(words[i:] for i in range(size)), strict=False))


def repeated(prompt, text, size):
    """How many n-grams end in the continuation and were there before, the end of the text left out."""
    words = text[:-1] if text[-1] == EOS else text
    found = ngrams(words, size)
    new = range(max(0, len(prompt) - size + 1), len(found))
    return sum(found[i] in found[:i] for i in new)


@pytest.mark.parametrize("way", SEARCHES)
@pytest.mark.parametrize("size", [2, 3])
def test_no_ngram_of_prompt_and_continuation_comes_twice(way, size, monkeypatch):
    """With prompts of different lengths in a batch, whose texts end at different times."""
    monkeypatch.setattr("fairseq.ngram_repeat_block.is_cuda_extension_usable", lambda: True)
    texts = prompts_of([0, 1, 17, 3, 8])
    model = model_of(VARIANTS[6])
    torch.manual_seed(0)
    options = {"beam_size": 4, "max_len_b": 30, "min_len": 10, "temperature": 0.5}
    free = generate([model], texts, search_strategy=SEARCHES[way](), **options)
    blocked = generate([model], texts, search_strategy=SEARCHES[way](), no_repeat_ngram_size=size, **options)
    repetitions = [
        sum(repeated(t.tolist(), h["tokens"].tolist(), size) for t, hs in zip(texts, found, strict=True) for h in hs)
        for found in (free, blocked)
    ]
    assert repetitions[0] > 0 and repetitions[1] == 0
    assert all(len(hs) == 4 for hs in blocked)
    assert all(h["positional_scores"].isfinite().all() for hs in blocked for h in hs)


def test_words_that_repeat_are_those_of_a_plain_search():
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 5, (30, 12), generator=generator)
    lengths = [i % 13 for i in range(30)]
    for size in (1, 2, 3, 4):
        found = repeating_words(aligned_right(texts, lengths), size, words=5)
        for row, length in enumerate(lengths):
            words = texts[row, :length].tolist()
            have = set(ngrams(words, size))
            last = tuple(words[length - size + 1 :]) if length >= size - 1 else None
            expected = [last is not None and (*last, word) in have for word in range(5)]
            assert found[row].tolist() == expected


def test_the_first_word_of_a_continuation_completes_no_pair_of_the_prompt():
    """Two words of the prompt alone decide: what the model would say otherwise is forbidden."""
    model, text = model_of(), torch.tensor([5, 9, 7, 5])
    free = generate([model], [text], beam_size=1, max_len_b=1, min_len=1)[0][0]["tokens"].tolist()
    again = torch.tensor([5, free[4], 7, 5])
    best = generate([model], [again], beam_size=1, max_len_b=1, min_len=1, no_repeat_ngram_size=2)[0][0]["tokens"]
    assert best[4] != free[4]


def test_other_models_keep_fairseqs_own_block():
    generator = PromptGenerator([model_of()], WORDS, no_repeat_ngram_size=2)
    assert generator.repeat_ngram_blocker is None and generator.no_repeat_ngram_size == 2


@pytest.mark.parametrize("way", ["beam", "sampling"])
def test_a_text_may_always_end(way):
    """Also if an end stands in the prompt, and once no other word is left, to others in the batch that go on."""
    torch.manual_seed(0)
    texts = [torch.tensor([5, EOS, 6, 7]), torch.tensor([], dtype=torch.int64)]
    options = {"beam_size": 4, "max_len_b": 40, "min_len": 1, "temperature": 3.0, "no_repeat_ngram_size": 1}
    found = generate([model_of()], texts, search_strategy=SEARCHES[way](), **options)
    for text, hypotheses in zip(texts, found, strict=True):
        for hypothesis in hypotheses:
            words = [w for w in hypothesis["tokens"].tolist() if w != EOS]
            assert len(set(words)) == len(words) and len(words) > len(text)
            assert hypothesis["tokens"][-1] == EOS


@pytest.mark.parametrize("way", ["beam", "sampling"])
def test_a_text_that_no_word_may_follow_is_an_error(way):
    with pytest.raises(ValueError, match="--no-repeat-ngram-size than 1"):
        generate(
            [model_of()], prompts_of([3]), search_strategy=SEARCHES[way](), no_repeat_ngram_size=1, min_len=20,
            max_len_b=30,
        )  # fmt: skip


def test_weights_that_have_diverged_are_an_error_in_a_beam_search_too():
    model = model_of()
    with torch.no_grad():
        model.decoder.layers[0].feed_forward.fc1.weight.fill_(torch.nan)
    with pytest.raises(DivergenceError, match="weights have diverged"):
        generate([model], prompts_of([3]))


def test_a_function_that_allows_no_word_is_an_error():
    strategy = search.PrefixConstrainedBeamSearch(WORDS, lambda row, tokens: [])
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn leaves"):
        generate([model_of()], prompts_of([3]), search_strategy=strategy)


def test_a_function_of_allowed_words_is_told_which_text_it_is():
    """By the number that the text has in the split, whatever the batch."""
    asked, batch = set(), batch_of(prompts_of([3, 5]))
    batch["id"] = torch.tensor([31, 12])
    strategy = search.PrefixConstrainedBeamSearch(WORDS, lambda row, tokens: asked.add(row) or [EOS, 5 + row % 2])
    found = PromptGenerator([model_of()], WORDS, beam_size=2, max_len_b=4, search_strategy=strategy).generate([], batch)
    assert asked == {31, 12}
    assert set(found[0][0]["tokens"][3:].tolist()) <= {EOS, 6} and set(found[1][0]["tokens"][5:].tolist()) <= {EOS, 5}


@pytest.mark.parametrize("way", ["beam", "sampling"])
@pytest.mark.parametrize("power", [19.9, -19.9, 300.0, -300.0])
def test_a_length_penalty_that_makes_all_scores_alike_is_refused(way, power):
    """fairseq ends in an OverflowError, or all scores are 0 or infinite and the first hypothesis is the best."""
    torch.manual_seed(0)
    texts, options = prompts_of([1, 23]), {"max_len_b": 9, "min_len": 9, "search_strategy": SEARCHES[way]()}
    with pytest.raises(
        ValueError, match=r"--lenpen -?\d.* of up to 33 tokens 0 or inf.* between -19.7 and 19.7, or --"
    ):
        generate([model_of()], texts, len_penalty=power, **options)
    assert len(generate([model_of()], texts, len_penalty=power, normalize_scores=False, **options)) == 2
    for largest in (19.7, -19.7):
        for hypotheses in generate([model_of()], texts, len_penalty=largest, **options):
            assert all(0 < -float(h["score"]) < math.inf for h in hypotheses)


@pytest.mark.parametrize("way", ["beam", "diverse", "siblings"])
def test_a_text_has_the_same_hypotheses_in_batches_of_any_size(way):
    model, texts = model_of(), prompts_of([5, 0, 9, 3, 12, 5, 5])
    options = {"beam_size": 4, "max_len_b": 6}

    def found(size):
        hypotheses = []
        for start in range(0, len(texts), size):
            batch = batch_of(texts[start : start + size])
            batch["id"] += 40 + start  # as in a split with more lines than a batch
            generator = PromptGenerator([model], WORDS, search_strategy=SEARCHES[way](), **options)
            hypotheses += generator.generate([model], batch)
        return [[h["tokens"].tolist() for h in hs] for hs in hypotheses]

    together = found(len(texts))
    assert all(len(hs) == 4 for hs in together)
    assert together == found(2) == found(1)
    assert together[5] == together[6]  # one text twice


@pytest.mark.parametrize("way", [*SEARCHES, "allowed"])
def test_no_text_goes_on_after_its_end(way):
    texts = prompts_of([0, 1, 17, 3, 8])
    allowed = search.PrefixConstrainedBeamSearch(WORDS, lambda row, tokens: [EOS, 5, 6, 7, 8])
    strategy = allowed if way == "allowed" else SEARCHES[way]()
    torch.manual_seed(0)
    warm = 5.0 if isinstance(strategy, search.Sampling) else 0.5
    options = {"beam_size": 4, "max_len_b": 30, "min_len": 3, "temperature": warm, "no_repeat_ngram_size": 3}
    found = generate([model_of(VARIANTS[6])], texts, search_strategy=strategy, **options)
    lengths = set()
    for text, hypotheses in zip(texts, found, strict=True):
        assert len(hypotheses) == 4
        for hypothesis in hypotheses:
            new = hypothesis["tokens"][len(text) :].tolist()
            assert new.index(EOS) == len(new) - 1
            lengths.add(len(new))
    assert len(lengths) > 2  # they end at different times


def test_diverse_beams_differ_more_than_plain_ones():
    model, texts = model_of(), prompts_of([5, 9, 3])
    firsts = [
        [len({int(h["tokens"][len(t)]) for h in hs}) for t, hs in zip(texts, found, strict=True)]
        for found in (
            generate([model], texts, beam_size=4, search_strategy=strategy)
            for strategy in (None, search.DiverseBeamSearch(WORDS, 4, 50.0))
        )
    ]
    assert firsts[1] == [4, 4, 4] and sum(firsts[0]) < 12


@pytest.mark.parametrize("blocked", [0, 9], ids=["plain", "fairseqs-loop"])
def test_there_may_be_more_samples_and_top_words_than_words(blocked):
    strategy = search.Sampling(WORDS, sampling_topk=50)
    (found,) = generate(
        [model_of()], prompts_of([3]), beam_size=40, search_strategy=strategy, no_repeat_ngram_size=blocked
    )
    assert len(found) == 40


def test_more_beams_than_words_are_refused():
    """fairseq takes fewer without a word."""
    assert len(generate([model_of()], prompts_of([3]), beam_size=16)[0]) == 16
    with pytest.raises(ValueError, match="--beam 17 is more than the 16 words"):
        generate([model_of()], prompts_of([3]), beam_size=17)
    with pytest.raises(ValueError, match="--diversity-rate ranks the best 2 x --beam 9 words, of which there are 17"):
        generate([model_of()], prompts_of([3]), beam_size=9, search_strategy=SEARCHES["siblings"]())
