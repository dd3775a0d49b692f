"""The loss over documents, against loops over tokens."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamemo_fairseq.analysis import __main__, document_report
from lamemo_fairseq.analysis.document_report import About
from lamemo_fairseq.analysis.documents import AGAIN, ALL, FIRST, DocumentLosses, Rule, of_streams
from lamemo_fairseq.data.dictionary import TextDictionary
from lamemo_fairseq.data.documents import DocumentDataset, DocumentOptions, Documents
from lamemo_fairseq.data.segments import SegmentKey
from lamemo_fairseq.evaluation.units import Original

from .helpers import split_of


def losses_of(tokens, starts):
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(len(tokens), generator=generator, dtype=torch.float64)
    return DocumentLosses(torch.tensor(tokens), losses, torch.tensor(sorted({0, *starts})))


@settings(max_examples=50, deadline=None)
@given(data=st.data(), tokens=st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_classes_and_positions_are_those_of_a_loop(data, tokens):
    starts = data.draw(st.sets(st.integers(0, len(tokens) - 1), max_size=4))
    of = losses_of(tokens, starts)
    expected = {}
    document, position, before = -1, 0, set()
    for i, token in enumerate(tokens):
        if i in starts or i == 0:
            document, position, before = document + 1, 0, set()
        position += 1
        first = 2 ** (position.bit_length() - 1)
        for name in (ALL, AGAIN if token in before else FIRST):
            expected.setdefault((name, first, 2 * first - 1), []).append((document, float(of.losses[i])))
        before.add(token)
    found = {(name, low, high): mean for name, low, high, mean in of.by_position()}
    assert set(found) == set(expected)
    for key, pairs in expected.items():
        mean = found[key]
        assert (mean.tokens, mean.documents) == (len(pairs), len({d for d, _ in pairs}))
        assert mean.loss == pytest.approx(sum(loss for _, loss in pairs) / len(pairs), rel=1e-9)
    whole = of.by_class()
    assert whole[ALL].loss == pytest.approx(float(of.losses.mean()), rel=1e-9)
    assert sum(whole[name].tokens for name in (FIRST, AGAIN) if name in whole) == len(tokens)


def test_the_error_of_documents_of_one_length_is_that_of_their_means():
    of = losses_of(list(range(30)), range(0, 30, 5))
    means = of.losses.view(6, 5).mean(1)
    mean = of.by_class()[ALL]
    assert mean.error == pytest.approx(float(means.std() / math.sqrt(6)), rel=1e-9) and mean.documents == 6
    assert losses_of([1, 2], []).by_class()[ALL].error is None


def test_one_long_document_is_no_ground_for_an_error():
    """Tokens of one document depend on each other: as many as there are, its repetition adds no certainty."""
    tokens = [1] * 8
    short = DocumentLosses(torch.tensor(tokens), torch.tensor([1.0, 1, 1, 1, 3, 3, 3, 3]), torch.tensor([0, 4]))
    long = DocumentLosses(torch.tensor(tokens * 8), short.losses.repeat_interleave(8), torch.tensor([0, 32]))
    assert short.by_class()[ALL].error == long.by_class()[ALL].error == 1


DICTIONARY = TextDictionary()
for word in ("=", "a", "***", "b"):
    DICTIONARY.add_symbol(word)
TEXT = "a\n\n= a =\nb ***\n***\n\n\na = b\n= = a = =\n\n\n\n= a b\n= b =\nb\n"


def tokens_of(text):
    return torch.tensor([DICTIONARY.index(w) for line in text.splitlines() for w in [*line.split(), "</s>"]])


@pytest.mark.parametrize(
    ("rule", "documents"),
    [
        ("one", [TEXT]),
        ("blank-lines:1", ["a\n\n", "= a =\nb ***\n***\n\n\n", "a = b\n= = a = =\n\n\n\n", "= a b\n= b =\nb\n"]),
        ("blank-lines:2", ["a\n\n= a =\nb ***\n***\n\n\n", "a = b\n= = a = =\n\n\n\n", "= a b\n= b =\nb\n"]),
        ("blank-lines:4", [TEXT]),
        ("separator:***", ["a\n\n= a =\nb ***\n***\n", "\n\na = b\n= = a = =\n\n\n\n= a b\n= b =\nb\n"]),
        ("headings", ["a\n\n", "= a =\nb ***\n***\n\n\na = b\n= = a = =\n\n\n\n= a b\n", "= b =\nb\n"]),
    ],
)
def test_documents_are_told_by_a_rule(rule, documents):
    lengths = torch.tensor([len(tokens_of(document)) for document in documents])
    assert Rule.parse(rule).starts(tokens_of(TEXT), DICTIONARY).tolist() == [0, *lengths.cumsum(0)[:-1].tolist()]
    for length in range(1, len(tokens_of(TEXT))):  # wherever a stream ends
        starts = Rule.parse(rule).starts(tokens_of(TEXT)[:length], DICTIONARY)
        assert starts[0] == 0 and starts[-1] < length


def test_a_line_that_is_one_mark_is_no_heading():
    assert Rule.parse("headings").starts(tokens_of("a\n=\nb\n= a =\n=\n"), DICTIONARY).tolist() == [0, 6]


@pytest.mark.parametrize(
    "rule", ["two", "one:1", "blank-lines", "blank-lines:0", "separator:", "separator", "headings:2", "recorded:2"]
)
def test_an_unknown_rule_is_refused(rule):
    with pytest.raises(ValueError, match=f"--documents {rule}: pass one, recorded, headings"):
        Rule.parse(rule)


def test_a_separator_that_the_dictionary_lacks_is_refused():
    with pytest.raises(
        ValueError, match=r"--documents separator: 'none' is not in dict\.txt: pass another rule, such as one"
    ):
        Rule.parse("separator:none").check(DICTIONARY)
    with pytest.raises(
        ValueError, match=r"--documents headings: '=' is not in dict\.txt: pass another rule, such as one"
    ):
        Rule.parse("headings").check(TextDictionary())
    Rule.parse("blank-lines:1").check(TextDictionary())


def test_a_stream_begins_a_document():
    """Its memory is empty: what stands before it in the text was not read."""
    halves = [(tokens_of("a a\n"), torch.full((3,), -math.log(2))), (tokens_of("a\n\nb\n"), torch.zeros(5))]
    rule = Rule.parse("blank-lines:1")
    of = of_streams(halves, lambda stream, tokens: rule.starts(tokens, DICTIONARY))
    assert of.starts.tolist() == [0, 3, 6] and of.losses.tolist() == pytest.approx([1] * 3 + [0] * 5, abs=1e-7)
    assert of.seen.tolist() == [False, True, False, False, False, True, False, False]
    assert of.position.tolist() == [1, 2, 3, 1, 2, 3, 1, 2]


@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize("streams", [1, 3, 6])
def test_recorded_documents_begin_where_streams_read_them(streams, clear):
    """Whichever stream they were dealt to, and however far it has read."""
    sizes = [7, 1, 12, 4, 3]
    lines = [[9, *range(4, 4 + size - 1)] for size in sizes]  # 9 is the first token of each, and of nothing else
    ends = np.cumsum(sizes)
    options = DocumentOptions("recorded", clear=clear)
    tokens = split_of([[i if i != 9 or n == 0 else 3 for n, i in enumerate(line)] for line in lines], 4, 20).tokens
    dataset = DocumentDataset(Documents(ends - sizes, ends), options, tokens, "test", 4, eos=2)
    opened = SimpleNamespace(split=dataset, num_streams=streams, dictionary=DICTIONARY)
    starts_of = __main__.starts_of(opened, Rule.parse("recorded"))
    begun = 0
    for stream in range(streams):
        keys = [SegmentKey(1, streams, n, stream) for n in range(dataset.layout(streams).num_segments)]
        read = torch.from_numpy(np.concatenate([dataset[key].target for key in keys]))
        assert starts_of(stream, read).tolist() == (read == 9).nonzero().squeeze(1).tolist()
        assert starts_of(stream, read[:5]).tolist() == (read[:5] == 9).nonzero().squeeze(1).tolist()
        begun += int((read == 9).sum())
    memory = "an empty memory" if clear else "the memory of the one before"
    assert begun == 5 and f"5 documents, each {'from' if clear else 'with'} {memory}" == Original.of(dataset).read


@pytest.mark.parametrize("starts", [[], [10, 13]], ids=["one document", "several"])
def test_pictures_say_what_is_drawn(starts):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    own = losses_of([1, 2, 1, 3] * 5, starts)
    less = DocumentLosses(own.tokens, own.losses + 0.25, own.starts)
    models, about = {"LaMemo": SimpleNamespace(curves={8: own, 0: less})}, About("data/test", "the whole text")
    position, memory = document_report.by_position(models, about), document_report.by_memory(models, about)
    assert [line["difference"] for line in memory] == pytest.approx([0.25] * 3 + [0] * 3)
    assert [line["memory slots"] for line in memory] == [0] * 3 + [8] * 3
    for draw, lines in ((document_report.draw_by_position, position), (document_report.draw_by_memory, memory)):
        figure = draw(pyplot, lines)
        said = figure.get_supxlabel()
        assert said.startswith(f"{len(starts) + 1} documents: the whole text; ") and "; dotted: " in said
        assert ("; bars: a standard error over documents; " in said) == bool(starts)
        assert "bits a token" in figure.axes[0].get_ylabel() and figure.axes[0].get_legend()
        assert [axis.get_title() for axis in figure.axes] == list(document_report._CLASSES.values())
        dotted = [line for axis in figure.axes for line in axis.get_lines() if line.get_linestyle() == ":"]
        assert len(dotted) == 3
        pyplot.close(figure)
    assert document_report.by_memory({"LaMemo": SimpleNamespace(curves={8: own})}, about) == []
