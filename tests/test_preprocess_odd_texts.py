"""Texts and dictionaries of other editors and languages, packed files, full disks, records that were tampered with."""

import bz2
import gzip
import json
import lzma
import resource
import stat
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from fairseq.data import Dictionary
from fairseq_cli.preprocess import cli_main as fairseq_preprocess

from lamemo_fairseq.data.binarized import load_dictionary, load_lines
from lamemo_fairseq.tasks.segment_language_modeling import SegmentLanguageModelingConfig, SegmentLanguageModelingTask
from preprocess import binarize, byte_lines
from preprocess.datasets import DATASETS
from preprocess.files import Identity
from preprocess.prepare import RECORD, prepare
from preprocess.tokenization import END

from .helpers import run_command
from .preprocessing import TEXTS, contents, own, prose, refused, tokens_of, write

MARK = "\ufeff".encode()


def data_in(files):
    return {name: content for name, content in files.items() if name != RECORD}


# Dictionaries.

SYMBOLS = b"".join(b"%s 0 #fairseq:overwrite\n" % s for s in (b"<s>", b"<pad>", b"</s>", b"<unk>"))


def test_a_dictionary_in_which_words_stand_again(texts, tmp_path):
    """fairseq's own symbols, as in RoBERTa's dictionary, and words; what is written is opened, with the same ids."""
    plain = own(texts, tmp_path / "plain", "--threshold", "3")["dict.txt"]
    text = b"the <s> <pad> never-seen </s> <unk> of\n"
    for split in "train", "valid", "test":
        write(texts / f"{split}.txt", text)
    srcdict = write(tmp_path / "dict.txt", SYMBOLS + plain + b"the 1 #fairseq:overwrite\n")
    made = own(texts, tmp_path / "own", "--srcdict", str(srcdict))
    dictionary = load_dictionary(str(tmp_path / "own" / "dict.txt"))
    given = Dictionary.load(str(srcdict))
    assert dictionary.symbols == given.symbols and dictionary.indices == given.indices
    ids = load_lines(str(tmp_path / "own"), "train", dictionary, None, False)[0].tolist()
    assert ids == [len(dictionary) - 1, 4, 5, 3, 6, 7, dictionary.index("of"), 2]
    assert json.loads(made[RECORD])["splits"]["train"]["unknown"] == 2
    # The tokens are those of fairseq-preprocess, whose dict.txt nothing can read.
    run_command(
        fairseq_preprocess, "--only-source", "--destdir", tmp_path / "fairseq", "--srcdict", srcdict,
        "--trainpref", texts / "train.txt",
    )  # fmt: skip
    for name in "train.bin", "train.idx":
        assert made[name] == (tmp_path / "fairseq" / name).read_bytes()
    with pytest.raises(RuntimeError, match="Duplicate word"):
        Dictionary.load(str(tmp_path / "fairseq" / "dict.txt"))
    config = SegmentLanguageModelingConfig(data=str(tmp_path / "own"), tokens_per_sample=2, train_subset="train")
    assert len(SegmentLanguageModelingTask.setup_task(config).dictionary) == len(dictionary)


@pytest.mark.parametrize(
    "text", [SYMBOLS.decode() + "a 1\n", "a 1\n", "# 3\n#fairseq:overwrite 2\n<pad> 1 #fairseq:overwrite\n"]
)
def test_a_dictionary_written_and_read(tmp_path, text):
    given = Dictionary.load(str(write(tmp_path / "given", text.encode())))
    binarize.save_dictionary(given, tmp_path / "dict.txt")
    assert (tmp_path / "dict.txt").read_text() == text


@pytest.mark.parametrize(
    "change", [lambda d: MARK + d, lambda d: d.replace(b"\n", b"\r\n"), lambda d: d.replace(b"\n", b"\r")]
)
def test_a_dictionary_of_another_editor(texts, tmp_path, change):
    plain = own(texts, tmp_path / "plain")["dict.txt"]
    srcdict = tmp_path / "given.txt"
    for name, content in ("first", plain), ("second", change(plain)):
        write(srcdict, content)
        own(texts, tmp_path / name, "--srcdict", str(srcdict))
    assert data_in(contents(tmp_path / "first")) == data_in(contents(tmp_path / "second"))


# Texts.


@pytest.mark.parametrize("mark, end", [(b"", b"\r\n"), (MARK, b"\n"), (MARK, b"\r")])
@pytest.mark.parametrize(
    "options", [(), ("--tokenizer", "words"), ("--tokenizer", "moses"), ("--paragraphs",), ("--bpe", "text8")]
)
def test_marks_and_line_ends_make_no_difference(texts, tmp_path, end, mark, options):
    plain = own(texts, tmp_path / "plain", *options)
    for split, text in TEXTS.items():
        write(texts / f"{split}.txt", mark + text.replace(b"\n", end))
    made = own(texts, tmp_path / "other", *options)
    compared = [
        name for name in data_in(plain) if not (name.endswith(".idx") and "text8" in options)
    ]  # rows, not lines
    assert {name: made[name] for name in compared} == {name: plain[name] for name in compared}


def test_marks_and_line_ends_with_sentencepiece(texts, tmp_path):
    options = ("--bpe", "sentencepiece", "--vocab-size", "100")
    plain = own(texts, tmp_path / "plain", *options)
    for split, text in TEXTS.items():
        write(texts / f"{split}.txt", MARK + text.replace(b"\n", b"\r"))
    assert data_in(own(texts, tmp_path / "other", *options)) == data_in(plain)


def test_bytes_are_kept_as_they_are(tmp_path):
    text = write(tmp_path / "text", MARK + b"a\r\nb\rc\0\xe9\n")
    own(text, tmp_path / "data", "--bpe", "bytes", "--shares", "1")
    assert len(tokens_of(tmp_path / "data", "train")) == text.stat().st_size


def test_joined_texts_with_a_mark_each(tmp_path):
    own(write(tmp_path / "text", MARK + b"a b\n" + MARK + b"a b\n"), tmp_path / "data", "--shares", "1")
    assert tokens_of(tmp_path / "data", "train") == ["a", "b", END] * 2


def test_one_text_with_old_line_ends_is_divided(tmp_path):
    text = b"".join(b"line %d\r" % (i % 10) for i in range(100))
    own(write(tmp_path / "book.txt", text), tmp_path / "data", "--shares", "80", "20")
    assert tokens_of(tmp_path / "data", "valid")[:6] == ["line", "0", END, "line", "1", END]
    assert len(tokens_of(tmp_path / "data", "valid")) == 60


@pytest.mark.parametrize("options", [(), ("--tokenizer", "moses"), ("--bpe", "text8"), ("--bpe", "sentencepiece")])
@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("the old house\n".encode("utf-16-le"), "at byte 1 stand NUL bytes"),
        (b"the\n" * 1000 + b"a\0b\n", "at byte 4,001 stand NUL bytes"),
        ("the\n".encode("utf-16"), "at byte 0 stand the bytes"),
        (b"caf\xe9\n", "at byte 3 stand the bytes"),
    ],
)
def test_what_is_not_utf8(tmp_path, text, where, options):
    if options == ("--bpe", "text8") and b"\0" not in text:
        return  # what is no letter is a space there
    message = refused(
        "own", "--destdir", tmp_path / "data", "--shares", "1", "--source", write(tmp_path / "t", text), *options
    )
    assert (where in message or "stand NUL bytes" in message) and "iconv" in message and "--bpe bytes" in message
    assert not (tmp_path / "data" / "dict.txt").exists()


@pytest.mark.parametrize("bpe", ["none", "bytes"])
@pytest.mark.parametrize(
    ("pack", "remedy"),
    [
        (gzip.compress, r"name it train.txt.gz"),
        (bz2.compress, r"name it train.txt.bz2"),
        (lzma.compress, r"name it train.txt.xz"),
        (lambda text: b"PK\x03\x04" + text, r"name it train.txt.zip"),
        (lambda text: b"\x28\xb5\x2f\xfd" + text, r"unpack it first"),
    ],
)
def test_a_packed_file_that_is_called_a_text(texts, tmp_path, bpe, pack, remedy):
    write(texts / "train.txt", pack(TEXTS["train"]))
    message = refused("own", "--destdir", tmp_path / "data", "--source", texts, "--bpe", bpe)
    assert "train.txt begins like a packed file, not like a text" in message and remedy in message


@pytest.mark.parametrize("space", [b" ", b""])
def test_pieces_of_a_text_in_one_line(tmp_path, space):
    """SentencePiece itself leaves out sentences beyond a length."""
    generator = np.random.default_rng(0)
    text = space.join([b"the", b"old", b"\xc3\xa9t\xc3\xa9"][i] for i in generator.integers(0, 3, 40_000))
    for name, content in ("one", text), ("short", text[:20_000]):
        source = write(tmp_path / name, content)
        own(source, tmp_path / f"{name}-data", "--shares", "1", "--bpe", "sentencepiece", "--vocab-size", "11")
        tokens = tokens_of(tmp_path / f"{name}-data", "train")
        assert tokens.count(END) == 1 and "<unk>" not in tokens
        assert "".join(tokens[:-1]).replace("\u2581", " ").strip() == content.decode()


def test_words_of_a_text_in_one_line(tmp_path, monkeypatch):
    source = write(tmp_path / "text", b"the old house " * 2000)
    own(source, tmp_path / "whole", "--shares", "1")
    monkeypatch.setattr("preprocess.tokenization.LONG_LINE", 3000)
    own(source, tmp_path / "cut", "--shares", "1")
    assert tokens_of(tmp_path / "cut", "train") == tokens_of(tmp_path / "whole", "train")
    dictionary = load_dictionary(str(tmp_path / "cut" / "dict.txt"))
    assert len(load_lines(str(tmp_path / "cut"), "train", dictionary, None, False)) > 3
    own(source, tmp_path / "divided", "--shares", "80", "20")
    assert tokens_of(tmp_path / "divided", "valid")[-1] == END


@pytest.mark.parametrize(
    ("symbols", "text"), [("\ufeffa \u2581 b\r\n".encode(), "a b\n"), (b"a \xe9 b\n", "a?b\n")], ids=["mark", "no byte"]
)
def test_symbols_of_bytes_from_another_editor(tmp_path, symbols, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["byte_lines", "--decode"])
    with write(tmp_path / "symbols", symbols).open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        byte_lines.main()
    assert capsys.readouterr().out == text


# Hints.


def said(capsys, *arguments):
    own(*arguments)
    return capsys.readouterr().err


def test_the_same_text_twice_is_told(texts, tmp_path, capsys):
    assert "hint" not in said(capsys, texts, tmp_path / "data")
    write(texts / "test.txt", TEXTS["train"])
    assert "hint: test is the same text as train" in said(capsys, texts, tmp_path / "data")


def test_mostly_unknown_words_are_told(texts, tmp_path, capsys):
    own(texts, tmp_path / "first")
    write(texts / "valid.txt", b"an other text of mine\n")
    told = said(capsys, texts, tmp_path / "data", "--srcdict", str(tmp_path / "first" / "dict.txt"))
    assert "hint: valid: 80% of the words are unknown" in told and "--srcdict" in told
    assert "hint: train" not in told and "hint: test" not in told


WITHOUT_SPACES = {
    "Chinese": "\u5e8a\u524d\u660e\u6708\u5149\uff0c\u7591\u662f\u5730\u4e0a\u971c\u3002",
    "Japanese": "\u53e4\u6c60\u3084\u86d9\u98db\u3073\u3053\u3080\u6c34\u306e\u97f3",
    "Thai": "\u0e27\u0e31\u0e19\u0e19\u0e35\u0e49\u0e2d\u0e32\u0e01\u0e32\u0e28\u0e14\u0e35\u0e21\u0e32\u0e01",
    "a number": "0123456789" * 3,
}
WITH_SPACES = {
    "Chinese": "\u5e8a \u524d \u660e\u6708 \u5149 \uff0c \u7591\u662f \u5730\u4e0a \u971c \u3002",
    "Thai": "\u0e27\u0e31\u0e19\u0e19\u0e35\u0e49 \u0e2d\u0e32\u0e01\u0e32\u0e28 \u0e14\u0e35 \u0e21\u0e32\u0e01",
    "German": "Donaudampfschifffahrtsgesellschaft f\u00e4hrt nicht",
    "mixed": "the old house of \u5e8a\u524d\u660e\u6708\u5149 is here",
}


@pytest.mark.parametrize(
    ("language", "tokenizer"), [*((language, "space") for language in WITHOUT_SPACES), ("Chinese", "words")]
)
def test_a_text_without_spaces_is_told(tmp_path, capsys, language, tokenizer):
    source = write(tmp_path / "text", f"{WITHOUT_SPACES[language]}\n".encode() * 20)
    told = said(capsys, source, tmp_path / "data", "--tokenizer", tokenizer)
    assert "hint: the text seems to have no spaces" in told and "--bpe sentencepiece" in told and "--bpe bytes" in told


@pytest.mark.parametrize("text", WITH_SPACES.values(), ids=WITH_SPACES)
def test_a_text_with_spaces_is_not(tmp_path, capsys, text):
    assert "hint" not in said(
        capsys, write(tmp_path / "text", f"{text}\n".encode() * 20), tmp_path / "data", "--shares", "1"
    )


# No room.


@contextmanager
def room(size):
    """Files may be no longer, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [300, 1000, 3000])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(texts, tmp_path, size, workers):
    with room(size):
        message = refused(
            "own", "--destdir", tmp_path / "data", "--source", texts, "--chunk-bytes", 2000, "--workers", workers
        )
    assert f"there is no room for {tmp_path / 'data'}. Make some, and give the same command" in message
    assert not (tmp_path / "data" / "dict.txt").exists()
    assert data_in(own(texts, tmp_path / "data")) == data_in(own(texts, tmp_path / "other"))


# Archives.


def test_a_link_in_a_zip_is_no_text(tmp_path):
    link = zipfile.ZipInfo("train.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "corpus.zip", "w") as archive:
        archive.writestr(link, "../../secret")
        for name in "valid.txt", "test.txt":
            archive.writestr(name, "a b\n")
    message = refused("own", "--destdir", tmp_path / "data", "--source", tmp_path / "corpus.zip")
    assert "corpus.zip: train.txt in it is not a file" in message


@pytest.mark.parametrize("prefix", ["../../", "/", "a/../../../"])
def test_a_name_in_an_archive_leads_nowhere(tmp_path, prefix):
    (tmp_path / "in" / "here").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "in" / "here" / "corpus.zip", "w") as archive:
        for name in "train.txt", "valid.txt", "test.txt":
            archive.writestr(prefix + name, "a b\n")
    own(tmp_path / "in" / "here" / "corpus.zip", tmp_path / "in" / "here" / "data")
    assert not list(tmp_path.rglob("*.txt")) or [p.name for p in tmp_path.rglob("*.txt")] == ["dict.txt"]


@pytest.mark.parametrize("end", ["zip", "gz"])
def test_no_more_is_unpacked_than_a_text_is_known_to_have(tmp_path, end, monkeypatch):
    known = Identity.of(write(tmp_path / "known", b"ab " * 1000))
    dataset = replace(DATASETS["text8"], contents={"text8": known._replace(name="text8")})
    bomb, path = bytes(50_000_000), tmp_path / f"text8.{end}"
    if end == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("text8", bomb)
    else:
        path.write_bytes(gzip.compress(bomb))
    with room(2_000_000), pytest.raises(ValueError, match=r"text8 in it has more than the 3,000 bytes of the original"):
        prepare(dataset, tmp_path / "data", [path])
    assert not list((tmp_path / "data").rglob("text8*"))


# A seed of texts that the cases above do not think of.


@pytest.mark.parametrize("seed", range(3))
def test_bytes_of_any_kind_are_data_or_refused(tmp_path, seed):
    generator = np.random.default_rng(seed)
    pieces = [
        b"word",
        b" ",
        b"\n",
        b"\r",
        MARK,
        b"\0",
        b"\xff",
        b"\xc3\xa9",
        b"\xe2\x80\xa8",
        b"\xc2\x85",
        b"\x0c",
        prose(3, seed),
    ]
    text = b"".join(pieces[i] for i in generator.integers(0, len(pieces), 200))
    source = write(tmp_path / "text", text)
    assert "iconv" in refused("own", "--destdir", tmp_path / "words", "--source", source, "--shares", "1")
    own(source, tmp_path / "bytes", "--bpe", "bytes", "--shares", "1")
    assert len(tokens_of(tmp_path / "bytes", "train")) == len(text)
    write(source, text.replace(b"\0", b"").replace(b"\xff", b""))
    own(source, tmp_path / "words", "--shares", "1")
    words = [word for word in tokens_of(tmp_path / "words", "train") if word != END]
    expected = source.read_text(encoding="utf-8").split()
    assert "".join(words).replace("\ufeff", "") == "".join(expected).replace("\ufeff", "")
