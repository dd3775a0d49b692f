"""What each tokenizer makes of a text, and that it does not depend on where the text is cut."""

import re

import numpy as np
import pytest
from fairseq.data.encoders.moses_tokenizer import MosesTokenizer, MosesTokenizerConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from lamemo_fairseq.core import TextEncoding
from lamemo_fairseq.core import Tokenizer as CoreTokenizer
from lamemo_fairseq.generation.lines import encode_prompts
from preprocess.chunks import cut
from preprocess.files import Span
from preprocess.tokenization import (
    END,
    LONGEST,
    ROW,
    SPACE,
    Boundary,
    ByteTokenizer,
    EncodingError,
    LetterTokenizer,
    LineTokenizer,
    NormalizedLetterTokenizer,
)

from .helpers import dictionary_of


def tokens_of(tokenizer, text):
    symbols, ids, sizes = tokenizer.encode(text)
    assert sizes.sum() == len(ids)
    return [symbols[i] for i in ids]


def lines_of(tokenizer, text):
    symbols, ids, sizes = tokenizer.encode(text)
    return [" ".join(symbols[i] for i in line) for line in np.split(ids, np.cumsum(sizes)[:-1])]


def test_bytes_and_an_end_for_each_line_feed_only():
    assert lines_of(ByteTokenizer(), b"a b\n\n\r\xff\nc") == [f"a {SPACE} b {END}", END, f"č ÿ {END}", "c"]
    assert tokens_of(ByteTokenizer(), b"") == []


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_as_many_tokens_as_bytes(text):
    tokens = tokens_of(ByteTokenizer(), text)
    assert len(tokens) == len(text)
    assert tokens.count(END) == text.count(b"\n")


@pytest.mark.parametrize(
    ("tokenizer", "encoding"),
    [
        (LineTokenizer(), TextEncoding()),
        (LineTokenizer(tokenizer="words"), TextEncoding("words")),
        (ByteTokenizer(), TextEncoding("none", "bytes")),
        (NormalizedLetterTokenizer(), TextEncoding("none", "characters", normalized=True)),
    ],
    ids=lambda value: getattr(value, "pieces", ""),
)
@given(st.lists(st.sampled_from([*"aB7 \n\r\t.'_\x0b\x1c\x85\u2028\ufeff", "\r\n", "\xe9"]), max_size=30).map("".join))
@settings(max_examples=100, deadline=None)
def test_the_core_reads_a_text_as_the_data_were_read(tokenizer, encoding, text):
    """Also in pieces that end with lines: letters of text8 ran together there."""
    words = tokens_of(tokenizer, text.encode())
    core = CoreTokenizer(sorted({*words} - {END}), encoding)
    found = [core.symbols[i] for i in core.encode(text).tolist()]
    assert words in (found, [*found, END])  # a line without an end has one in the data
    if encoding.normalized:
        pieces = [core.encode(line) for line in text.splitlines(keepends=True)]
        assert "".join(map(core.decode, pieces)) == core.decode(core.encode(text))


def test_the_hub_reads_any_line_ends():
    dictionary = dictionary_of(17)
    ids = [encode_prompts([text], str, dictionary, by_word=False)[0].tolist() for text in ("w1\rw2", "w1\r\n\ufeffw2")]
    assert ids == [encode_prompts(["w1 </s> w2"], str, dictionary)[0].tolist()] * 2


def test_long_lines_of_bytes_are_stored_in_pieces():
    _, ids, sizes = ByteTokenizer().encode(b"ab\n" + b"x" * (2 * LONGEST + 5) + b"\nc\n")
    assert sizes.tolist() == [3, LONGEST, LONGEST, 6, 2]
    assert len(ids) == sum(sizes)


def test_letters_in_rows_without_ends():
    symbols, ids, sizes = LetterTokenizer().encode(b" az" + b"b" * (2 * ROW))
    assert [symbols[i] for i in ids[:3]] == [SPACE, "a", "z"]
    assert sizes.tolist() == [ROW, ROW, 3]
    assert END not in symbols and len(symbols) == 27


@pytest.mark.parametrize("byte", [b"A", b"\n", b"_", b"0", b"\xe9"])
def test_letters_refuse_anything_else(byte):
    with pytest.raises(EncodingError) as error:
        LetterTokenizer().encode(b"ab cd" + byte + b"e")
    assert error.value.offset == 5 and repr(byte) in error.value.what


def test_any_text_like_text8():
    text = "\n  It's 1984, été!\n\nEND  ".encode()
    tokens = "".join(tokens_of(NormalizedLetterTokenizer(), text)).replace(SPACE, " ")
    assert tokens == "it s one nine eight four t end "


words_and_blanks = st.lists(
    st.sampled_from([b"one", b"2", b" ", b"\n", b"\n\n", b" \r\n", b"\r", b"\xef\xbb\xbf", b"\xc3\xa9t."]), max_size=30
)


@pytest.mark.parametrize(
    "tokenizer",
    [
        ByteTokenizer(),
        NormalizedLetterTokenizer(),
        LineTokenizer(),
        LineTokenizer(tokenizer="words"),
        LineTokenizer(tokenizer="moses"),
        LineTokenizer(paragraphs=True),
    ],
)
def test_the_cut_makes_no_difference(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "text"

    @given(words_and_blanks.map(b"".join), st.integers(1, 20))
    @settings(max_examples=60, deadline=None)
    def check(text, size):
        path.write_bytes(text)
        parts = cut(Span(path, 0, len(text)), tokenizer.boundary, size)
        assert b"".join(part.read() for part in parts) == text
        assert [token for part in parts for token in tokens_of(tokenizer, part.read())] == tokens_of(tokenizer, text)

    check()


@pytest.mark.parametrize("tokenizer", [LineTokenizer(), LineTokenizer(tokenizer="words")])
def test_the_cut_of_long_lines_makes_no_difference(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("preprocess.tokenization.LONG_LINE", 6)
    path = tmp_path / "text"
    inside = False

    parts_of_lines = st.sampled_from([b"one", b"2", b" ", b" ", b"\n", b"\xc3\xa9t.", b" \xef\xbb\xbf"])

    @given(st.lists(parts_of_lines, max_size=30).map(b"".join))
    @settings(max_examples=100, deadline=None)
    def check(text):
        nonlocal inside
        path.write_bytes(text)
        parts = [part.read() for part in cut(Span(path, 0, len(text)), tokenizer.boundary, 4)]
        assert b"".join(parts) == text
        tokens = []
        for i, part in enumerate(parts):
            more = i < len(parts) - 1
            inside |= more and not part.endswith(b"\n")
            symbols, ids, sizes = tokenizer.encode(part, more)
            assert sizes.sum() == len(ids)
            tokens += [symbols[i] for i in ids]
        assert tokens == tokens_of(tokenizer, text)

    check()
    assert inside


@pytest.mark.parametrize(
    "tokenizer",
    [
        LineTokenizer(tokenizer="moses"),
        LineTokenizer(tokenizer="words", pattern="[a-z ]+"),
        LineTokenizer(bpe="sentencepiece"),
        LineTokenizer(paragraphs=True),
    ],
)
def test_lines_of_which_words_depend_on_each_other_are_whole(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("preprocess.tokenization.LONG_LINE", 6)
    path = tmp_path / "text"
    path.write_bytes(b"one two " * 10)
    assert len(cut(Span(path, 0, 80), tokenizer.boundary, 4)) == 1


def test_where_a_text_may_be_cut(tmp_path):
    path = tmp_path / "text"
    text = b"aaaa\nbb\nccccccccccccc\n\n  \ndd"
    path.write_bytes(text)

    def parts(boundary, size):
        return [part.read() for part in cut(Span(path, 0, len(text)), boundary, size)]

    assert parts(Boundary(rb"\n"), 2) == [b"aaaa\n", b"bb\n", b"ccccccccccccc\n", b"\n  \n", b"dd"]
    assert parts(Boundary(rb"\n"), 7) == [b"aaaa\nbb\n", b"ccccccccccccc\n", b"\n  \ndd"]
    assert parts(Boundary(rb"\n", 3), 2) == [
        b"aaaa\n",
        b"bb\n",
        *[b"cc"] * 5,
        b"ccc\n",
        b"\n  \n",
        b"dd",
    ]
    assert parts(Boundary(rb"", 0), 20) == [text[:20], text[20:]]
    assert parts(LineTokenizer(paragraphs=True).boundary, 2) == [text[:23], text[23:]]


def test_a_boundary_across_the_blocks_that_are_read(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"x" * 16_382 + b"\n" + b" " * 40_000 + b"\ny")
    _, second = cut(Span(path, 0, path.stat().st_size), LineTokenizer(paragraphs=True).boundary, 1)
    assert second.read() == b"y"


@pytest.mark.parametrize("paragraphs", [False, True])
@pytest.mark.parametrize("end", [b"\r\n", b"\r", b"\n"])
def test_a_line_end_across_the_blocks_that_are_read(tmp_path, end, paragraphs):
    path = tmp_path / "text"
    text = b"x" * 16_383 + end * (1 + paragraphs) + b"y" + end
    path.write_bytes(text)
    parts = [part.read() for part in cut(Span(path, 0, len(text)), LineTokenizer(paragraphs=paragraphs).boundary, 1)]
    assert parts == [text[: -1 - len(end)], b"y" + end]


def test_lines_count_like_fairseq():
    assert lines_of(LineTokenizer(), b" = a =  b \n\nc\x0bd") == [f"= a = b {END}", END, f"c d {END}"]
    assert lines_of(LineTokenizer(), b"a\r\nb\rc\n") == [f"a {END}", f"b {END}", f"c {END}"]


def test_paragraphs():
    text = b"\n\na b\nc\n \nd\n\n\n"
    assert lines_of(LineTokenizer(paragraphs=True), text) == [f"a b c {END}", f"d {END}"]


def test_words():
    text = "\u201cDon\u2019t,\u201d 12a_b! o'clock\n".encode()
    words = LineTokenizer(tokenizer="words")
    assert lines_of(words, text) == [f"\u201c Don\u2019t , \u201d 12 a b ! o'clock {END}"]
    assert lines_of(LineTokenizer(tokenizer="words", pattern="[a-z]+"), text) == [f"on t a b o clock {END}"]


def test_text_that_is_no_text_is_pointed_at():
    with pytest.raises(EncodingError) as error:
        LineTokenizer().encode(b"fine\nbr\xffken\n")
    assert error.value.offset == 7 and "not UTF-8" in error.value.what


MARKS = [
    *("Mr.", "Mr. Smith", "U.S.", "e.g. a", "No. 5", "No. x", "end.", "...", "a....", "'", "' '", "it's", "dogs'", '"'),
    *(
        "a,b",
        "5,000",
        ", ,",
        "well-known",
        "--",
        "<b>",
        "a|b",
        "[x]",
        "&amp;",
        "£5",
        "été",
        "x.' ",
        ".",
        "a.b.",
        "3.14",
    ),
]
some_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4).filter(
    lambda text: not re.search(r"\s", text)
)
reference = MosesTokenizer(MosesTokenizerConfig())


@given(st.lists(st.sampled_from(MARKS) | some_text, max_size=12))
@settings(max_examples=100, deadline=None)
def test_moses_is_fairseqs(parts):
    line = " ".join(parts)
    assert tokens_of(moses, line.encode() + b"\n") == [*reference.encode(line).split(), END]


moses = LineTokenizer(tokenizer="moses", source_lang="en")
