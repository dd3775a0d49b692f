"""fairseq-eval-lm: the loss of all tokens, a token or a word, of one model or several, however a split is cut."""

import itertools
import logging
import math

import numpy as np
import pytest
import torch
from fairseq.data import data_utils
from hypothesis import given, settings
from hypothesis import strategies as st

from lamemo_fairseq.core.memory import DivergenceError
from lamemo_fairseq.data.dictionary import TextDictionary
from lamemo_fairseq.data.streams import StreamLayout
from lamemo_fairseq.evaluation.evaluate import evaluate
from lamemo_fairseq.evaluation.output import words_of
from lamemo_fairseq.evaluation.words import WordUnits
from lamemo_fairseq.models.language_models import LaMemoLanguageModel
from lamemo_fairseq.tasks.segment_language_modeling import SegmentLanguageModelingConfig, SegmentLanguageModelingTask

from .helpers import dictionary_of, split_of, tiny_decoder

# Beginnings, middles and ends of words, words alone, marks alone, and what looks like a mark inside.
PIECES = {
    "subword_nmt": ["ho@@", "u@@", "se", "a", "x@@y"],
    "sentencepiece": ["▁ho", "u", "se", "▁a", "▁", "▁of▁the", "ing▁", "n▁o"],
    "wordpiece": ["_ho", "u", "se", "_a", "_", "_of_the"],
    "letter": ["h", "o", "u", "|", "a|b"],
    "_EOW": ["ho", "use_EOW", "_EOW", "a_EOW"],
    "silence": ["house", "<SIL>", "a"],
}
ALIASES = {"@@ ": "subword_nmt", "@@": "subword_nmt"}
names = st.sampled_from([*PIECES, *ALIASES])


def dictionary_for(name):
    dictionary = TextDictionary()
    for piece in PIECES[ALIASES.get(name, name)]:
        dictionary.add_symbol(piece)
    return dictionary


def lines_of(draw, dictionary):
    words = st.integers(0, len(dictionary) - 1).filter(lambda i: i != dictionary.eos())
    return [[*draw(st.lists(words, max_size=8)), dictionary.eos()] for _ in range(draw(st.integers(1, 4)))]


def written_words(lines, dictionary, name):
    """What ``wc -w`` and ``wc -l`` count in the text that the pieces make."""
    texts = [" ".join(dictionary[i] for i in line[:-1]) for line in lines]
    return [data_utils.post_process(text, ALIASES.get(name, name)).split() for text in texts]


@settings(max_examples=200, deadline=None)
@given(name=names, data=st.data())
def test_words_are_those_of_the_text_that_the_pieces_make(name, data):
    dictionary = dictionary_for(name)
    lines = lines_of(data.draw, dictionary)
    tokens = torch.tensor([i for line in lines for i in line])
    units = WordUnits.of(name, dictionary)
    before = torch.cat([torch.tensor([dictionary.eos()]), tokens[:-1]])
    words = written_words(lines, dictionary, name)
    assert int(units.begun(tokens, before).sum()) == sum(map(len, words)) + len(lines)
    found = list(words_of(tokens, torch.ones(len(tokens)), units, dictionary))
    assert sum(word.log_prob for word in found) == len(tokens) == sum(word.pieces for word in found)
    text = " ".join(word.text for word in found).split()
    assert text == [word for line in words for word in [*line, "</s>"]]


def test_without_pieces_every_symbol_is_a_word():
    dictionary = dictionary_for("subword_nmt")
    tokens = torch.arange(len(dictionary))
    for name in (None, "none"):
        assert WordUnits.of(name, dictionary).begun(tokens, tokens.flip(0)).tolist() == [1] * len(dictionary)


def test_an_unknown_unit_is_refused():
    with pytest.raises(ValueError, match="--post-process 'bpe' is not known: pass one of 'subword_nmt'"):
        WordUnits.of("bpe", dictionary_for("letter"))


def test_units_of_another_text(caplog):
    """Words as they are hold none of the marks."""
    with pytest.raises(ValueError, match=r"--post-process sentencepiece divides words at '▁', .*: leave it out"):
        WordUnits.of("sentencepiece", dictionary_for("subword_nmt"))
    WordUnits.of("subword_nmt", dictionary_for("subword_nmt"))
    assert not caplog.records
    WordUnits.of("@@ ", dictionary_for("letter"))
    assert "--post-process '@@ ' has no effect: no piece of the dictionary ends with @@" in caplog.text


def models_of(count, words=10, **options):
    variant = ("recurrent", "transformer-xl", "right")
    return [LaMemoLanguageModel(tiny_decoder(variant, words=words, seed=n, **options)) for n in range(count)]


def batches_of(lines, words, segment_length, streams, **shard):
    task = SegmentLanguageModelingTask(SegmentLanguageModelingConfig(), TextDictionary())
    dataset = split_of(lines, segment_length, words=words, name="test")
    batches = task.get_batch_iterator(dataset, max_sentences=streams, as_streams=True, **shard)
    return batches.next_epoch_itr(shuffle=False)


def word_lines(caplog):
    return [r.getMessage() for r in caplog.records if r.name.endswith("eval_lm") and r.getMessage()[:1].isdigit()]


@pytest.mark.parametrize("name", ["subword_nmt", "sentencepiece"])
def test_a_words_loss_does_not_depend_on_where_segments_and_streams_end(name, caplog):
    """Its unit, that is: what a model makes of shorter segments may differ."""
    caplog.set_level(logging.INFO)
    dictionary = dictionary_for(name)
    generator = np.random.default_rng(0)
    lines = [[*generator.integers(4, len(dictionary), 7), 2] for _ in range(6)]
    words = sum(map(len, written_words(lines, dictionary, name))) + len(lines)
    texts = set()
    for length, streams in itertools.product((1, 3, 50), (1, 2, 5, 48)):
        [model] = models_of(1, len(dictionary))
        a_piece = evaluate([model], dictionary, batches_of(lines, len(dictionary), length, streams))["loss"]
        caplog.clear()
        batches = batches_of(lines, len(dictionary), length, streams)
        a_word = evaluate([model], dictionary, batches, post_process=name, output_word_probs=True)["loss"]
        assert a_word * words == pytest.approx(a_piece * 48, rel=1e-9)
        printed = word_lines(caplog)
        scores = [float(w.rsplit("[", 1)[1][:-1]) for line in printed for w in line.split("\t")]
        assert sum(scores) == pytest.approx(-a_word * words * math.log(2), rel=1e-5)
        texts.add(tuple(" ".join(w.rsplit(" [", 1)[0] for w in line.split("\t")) for line in printed))
    assert len(texts) == 1 and len(texts.pop()) == len(lines)


def test_word_statistics_count_every_word_and_the_one_after_it(caplog):
    caplog.set_level(logging.INFO)
    dictionary = dictionary_for("subword_nmt")
    lines = [[4, 5, 6, 7, 2], [7, 4, 6, 2]]
    options = {"post_process": "@@ ", "output_word_probs": True, "output_word_stats": True}
    evaluate(models_of(1), dictionary, batches_of(lines, 10, 2, 2), **options)
    scores = {}
    printed = [w.split(" ", 1)[1].split("\t") for w in word_lines(caplog)]
    words = [(w.split(" [")[0], float(w.split("[")[1][:-1])) for line in printed for w in line]
    for (word, score), after in zip(words, [*words[1:], None], strict=True):
        count, total, following, followed = scores.get(word, (0, 0.0, 0.0, 0))
        scores[word] = count + 1, total + score, following + (after[1] if after else 0), followed + (after is not None)
    stats = [r.getMessage().split("\t") for r in caplog.records if "\t" in r.getMessage()][2:]
    assert [w[0] for w in words] == ["house", "a", "</s>", "a", "hose", "</s>"]
    for word, count, total, in_pieces, following, followed in stats:
        assert (int(count), int(followed)) == (scores[word][0], scores[word][3])
        assert [float(total), float(following)] == pytest.approx(scores[word][1:3], rel=1e-5)
        assert in_pieces == str(word in ("house", "hose"))
    assert {s[0] for s in stats} == set(scores) and int(stats[0][1]) == 2


@pytest.mark.parametrize("options", [{}, {"adaptive_softmax_cutoff": "4,7"}], ids=["full", "adaptive"])
@pytest.mark.parametrize("at_once", [0, 1, 4, 100])
def test_several_models_are_averaged_and_scores_are_made_in_parts(options, at_once):
    """Against the mean probability, from the scores of each model."""
    lines = [[1, 0, 3, 5, 2], [9, 8, 1, 1, 2], [4]]
    models = models_of(3, **options)
    found = evaluate(models, dictionary_of(10), batches_of_ten(lines), softmax_batch=at_once)["loss"]
    expected, count = 0.0, 0
    for batch in batches_of_ten(lines):
        inputs = batch["net_input"]
        probs = sum(m.get_normalized_probs(m(**inputs), log_probs=False) for m in models) / len(models)
        for row, length in enumerate(inputs["src_lengths"].tolist()):
            for place in range(length):
                expected -= float(probs[row, place, batch["target"][row, place]].log2())
                count += 1
    assert count == 11 and found == pytest.approx(expected / count, rel=1e-9)


def test_models_of_other_segment_lengths_are_refused():
    """The first one's segments would be read by all, and the loss would depend on the order of the models."""
    [one], [other] = models_of(1, tokens_per_sample=3), models_of(1, tokens_per_sample=6)
    for models in ([one, other], [other, one]):
        with pytest.raises(ValueError, match=r"trained with --tokens-per-sample 3 and 6: pass --tokens-per-sample"):
            evaluate(models, dictionary_of(10), batches_of_ten([[4, 5, 2]]))


@pytest.mark.parametrize("options", [{}, {"adaptive_softmax_cutoff": "4,7"}], ids=["full", "adaptive"])
def test_a_rank_scores_nothing_once_its_streams_have_ended(options):
    """Of seven tokens in segments of three, the second of two ranks has no token of the second segment."""
    models, lines = models_of(1, **options), [[4, 5, 9, 2], [8, 6, 2]]
    whole = evaluate(models, dictionary_of(10), batches_of(lines, 10, 3, 2))
    by_rank = [
        evaluate(models, dictionary_of(10), batches_of(lines, 10, 3, 1, num_shards=2, shard_id=n)) for n in range(2)
    ]
    assert [found["tokens"] for found in by_rank] == [4, 3]
    assert sum(found["nll_nats"] for found in by_rank) == pytest.approx(whole["nll_nats"], rel=1e-9)


def batches_of_ten(lines):
    return batches_of(lines, 10, 3, 2)


def evaluated(**options):
    dictionary = dictionary_for("subword_nmt")
    return evaluate(models_of(1), dictionary, batches_of([[4, 5, 2]], 10, 3, 1), **options)


def test_a_negative_number_of_tokens_at_once_is_refused():
    with pytest.raises(ValueError, match="--softmax-batch is -1: pass a number of tokens"):
        evaluated(softmax_batch=-1)


def test_a_token_without_probability_is_an_error(monkeypatch):
    """fairseq's own leaves it out of the mean."""
    monkeypatch.setattr("lamemo_fairseq.evaluation.evaluate.target_log_probs", lambda *_: torch.tensor(-math.inf))
    with pytest.raises(DivergenceError, match="infinity in the loss of segment 0 of stream 0 of 'test'"):
        evaluated()


@pytest.mark.parametrize(
    ("streams", "said"),
    [
        (1, None),
        (7, None),
        (20, "short for 20 streams: each begins with an empty memory and ends after 6 segments, so"),
        (200, "short for 200 streams: each begins with an empty memory and ends after one segment, so"),
    ],
)
def test_streams_too_short_for_the_memory_are_told_with_the_number_that_is_not(streams, said, caplog):
    layout = StreamLayout(num_tokens=1150, num_streams=streams, segment_length=10)
    layout.warn_of_empty_memories("test", 16, 1)
    if said is None:
        assert layout.num_segments >= 16 and not caplog.records
    else:
        assert said in caplog.text and "; pass --batch-size 7 for fewer, longer streams" in caplog.text
        assert layout.num_segments < 16
        assert StreamLayout(num_tokens=1150, num_streams=7, segment_length=10).num_segments >= 16
