"""preprocess refuses bad input, texts that cannot be cut and options without effect; one line names the option."""

import re
from importlib.metadata import PackageNotFoundError

import pytest

from preprocess import words
from preprocess.__main__ import main

from .preprocessing import TEXTS, contents, own, refused, write


def test_bad_input_names_the_option(texts, tmp_path):
    data = ("--destdir", tmp_path / "data")
    source = ("--source", texts)
    assert "--source" in refused("own", *data)
    assert "--source" in refused("own", *data, "--source", *[texts / "train.txt"] * 4)
    shares = refused("own", *data, "--source", texts / "train.txt", "--shares", 90, -5, 5)
    assert shares == "preprocess: --shares takes up to three numbers above 0, such as 90 5 5"
    assert "--shares takes" in refused("own", *data, "--source", texts / "train.txt", "--shares", "nan", "1")
    assert "--first-bytes takes a number" in refused("own", *data, *source, "--first-bytes", 9, 9)
    assert "--first-bytes takes a number" in refused("own", *data, *source, "--first-bytes", 9, 0, 9)
    message = refused("own", *data, *source, "--first-bytes", 9, 9, 10**6)
    assert "--first-bytes 1000000 for test: " in message and f"{len(TEXTS['test']):,} bytes only" in message
    assert "--tokenizer" in refused("own", *data, *source, "--bpe", "bytes", "--tokenizer", "moses")
    assert "--sentencepiece-model" in refused("own", *data, *source, "--sentencepiece-model", texts / "train.txt")
    assert "--pattern needs" in refused("own", *data, *source, "--pattern", "x")
    assert "--pattern (" in refused("own", *data, *source, "--tokenizer", "words", "--pattern", "(")
    for workers in (1, 2):
        pieces = ("--bpe", "sentencepiece", "--sentencepiece-model", texts / "train.txt", "--workers", workers)
        assert "is not a SentencePiece model" in refused("own", *data, *source, *pieces)
    assert "--srcdict nowhere" in refused("own", *data, *source, "--srcdict", "nowhere")
    for bad, what in (b"word 1\nword 2\n", "a dictionary"), (b"\xff 1\n", "text in UTF-8"), (b"word\n", "a dictionary"):
        srcdict = write(texts / "dict.txt", bad)
        assert f"--srcdict {srcdict} is not {what}" in refused("own", *data, *source, "--srcdict", srcdict)
    assert "--destdir" in refused("own", "--destdir", texts / "train.txt", *source)
    for option, value in ("--vocab-size", 0), ("--character-coverage", 7), ("--character-coverage", "nan"):
        assert f"{option} {value}" in refused("own", *data, *source, "--bpe", "sentencepiece", option, value)
    assert "--workers" in refused("own", *data, *source, "--workers", 0)
    assert "train.txt is a file, pass a folder" in refused("own", "--destdir", texts / "train.txt" / "data", *source)
    for size, reason in (
        (9999, r"is too large for this text: pass \d+ or less"),
        (
            9,
            r"is too small for the characters of this text: pass \d+ or more, or --character-coverage \.98",
        ),
    ):
        message = refused("own", *data, *source, "--bpe", "sentencepiece", "--vocab-size", size)
        assert re.fullmatch(f"preprocess: --vocab-size {size} {reason}", message)
    assert "wiki.train.tokens is not there" in refused("wikitext-2", *data, *source)
    write(texts / "valid.txt", b"fine\n" * 1000 + b"\xff\n")
    for workers in (1, 2):
        message = refused("own", *data, *source, "--chunk-bytes", 2000, "--workers", workers)
        assert "valid.txt: at byte 5,000" in message and "not UTF-8" in message
    write(texts / "train.txt", b"fine\n" * 20_000 + b"\xff\n")
    message = refused("own", *data, *source, "--bpe", "sentencepiece")
    assert "train.txt: at byte 100,000 stand the bytes b'\\xff', which are not UTF-8: save the text as UTF-8" in message
    assert "SentencePiece" not in message
    write(texts / "valid.txt", b"")
    assert "no text for valid" in refused("own", *data, *source)


@pytest.mark.parametrize(
    "options, package",
    [("--bpe sentencepiece", "sentencepiece"), ("--tokenizer moses --source-lang en", "sacremoses")],
)
def test_a_package_that_is_missing_is_named(texts, tmp_path, options, package, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(words, "version", missing)
    message = refused("own", "--destdir", tmp_path / "data", "--source", texts, *options.split())
    assert message == f"preprocess: {options.split(' --source')[0]} needs a package: pip install {package}"


def test_a_file_in_place_of_a_folder_is_told(texts):
    file = texts / "train.txt"
    for destdir, named in ((file, file), (file / "data", f"{file / 'data'}: {file}")):
        with pytest.raises(SystemExit, match=f"--destdir {named} is a file, pass a folder"):
            own(texts, destdir)
    with pytest.raises(SystemExit, match=rf"no dictionary at {file}/dict\.txt: binarize"):
        main(["count", str(file), f"test={file}"])


@pytest.mark.parametrize(
    "options, what",
    [
        ("--vocab-size 8000", "--vocab-size needs --bpe sentencepiece"),
        ("--character-coverage 1", "--character-coverage needs --bpe sentencepiece"),
        ("--source-lang en --tokenizer words", "--source-lang needs --tokenizer moses"),
        ("--source-lang de --bpe bytes --vocab-size 9", "as it is: leave --source-lang, --vocab-size out"),
        (
            "--bpe sentencepiece --sentencepiece-model {file} --vocab-size 8000 --character-coverage 1",
            "--sentencepiece-model is made already: leave --vocab-size, --character-coverage out",
        ),
        (
            "--srcdict {file} --threshold -1 --nwords -1 --padding-factor 8",
            "--srcdict is made already: leave --threshold, --nwords, --padding-factor out",
        ),
        ("--srcdict nowhere --bpe bytes", "--srcdict nowhere: there is no such file"),
        (
            "--shares 90 5 5",
            "/texts is a folder or archive, which needs train.txt, valid.txt and test.txt: name the text",
        ),
        ("--shares 90 5 5 --source {file} {file}", "--shares divides one text"),
        ("--first-bytes 9 --source {file}", "--first-bytes needs a file for each split"),
    ],
)
def test_options_without_effect_are_refused(texts, tmp_path, options, what):
    """Also with what would be used without them."""
    options = options.format(file=texts / "train.txt").split()
    assert what in refused("own", "--destdir", tmp_path / "data", "--source", texts, *options)


def test_what_cannot_be_documents(texts, tmp_path):
    with pytest.raises(SystemExit, match="--documents takes every file as a document, and --source names one text"):
        own(texts / "train.txt", tmp_path / "data", "--documents")
    (texts / "train").mkdir()
    for text, message in ((None, "the folder train has no file"), (b"x", "the folder valid with the documents of")):
        if text is not None:
            write(texts / "train" / "x.txt", text)
        with pytest.raises(SystemExit, match=message):
            own(texts, tmp_path / "data", "--documents")


@pytest.mark.parametrize(
    "options, text, split, where",
    [
        ((), b"a b c\n", "valid", "ends of lines"),
        (("--bpe", "bytes"), b"a b c\n" * 3, "valid", "ends of lines"),
        (("--shares", "90", "5", "5"), b"a b c\n" * 10, "test", "ends of lines"),
        (("--bpe", "text8"), b"abc def", "valid", "spaces"),
        (("--paragraphs",), b"a\nb\n" * 100, "valid", "empty lines"),
    ],
)
def test_one_text_that_cannot_be_cut_so_often(tmp_path, options, text, split, where):
    message = f"no text for {split} in .*book.txt: .* cut at {where} only, .* --shares 90 5 5: .*a file for each split"
    with pytest.raises(SystemExit, match=message):
        own(write(tmp_path / "book.txt", text), tmp_path / "data", *options)
    with pytest.raises(
        SystemExit, match=r"no text for train in .*book.txt: it has 0 bytes, name another text with --source$"
    ):
        own(write(tmp_path / "book.txt", b""), tmp_path / "data", *options)


@pytest.mark.parametrize(
    "options",
    [("--paragraphs",), ("--bpe", "text8"), ("--bpe", "sentencepiece", "--vocab-size", "60", "--paragraphs")],
)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_split_of_blank_lines_is_none(texts, tmp_path, split, options):
    made = own(texts, tmp_path / "data", *options)
    write(texts / f"{split}.txt", b"\n \n\n")
    with pytest.raises(
        SystemExit, match=rf"there is no text for {split} in .*{split}\.txt: it has 4 bytes without a word"
    ):
        own(texts, tmp_path / "data", *options)
    assert contents(tmp_path / "data") == made


def test_a_dictionary_cannot_begin_with_a_byte_order_mark(tmp_path):
    """It would not read back as it was written. As another word than the first, the mark is one like any other."""
    source = write(tmp_path / "text.txt", "x \ufeff \ufeff\n".encode())
    options = ("own", "--destdir", tmp_path / "data", "--source", source, "--shares", 1, "--tokenizer", "words")
    assert "the commonest word of the text begins with U+FEFF" in refused(*options)
    write(source, "x x \ufeff\n".encode())
    main(list(map(str, options)))


def test_a_split_of_a_single_unknown_letter_is_made(tmp_path, capsys):
    """It has no end of a line, and so no word by the count of lines."""
    for split, text in (("train", b"aab"), ("valid", b"b")):
        write(tmp_path / f"{split}.txt", text)
    sources = [str(tmp_path / f"{split}.txt") for split in ("train", "valid")]
    main(["own", "--destdir", str(tmp_path / "d"), "--source", *sources, "--bpe", "text8", "--nwords", "5"])
    assert "hint: valid: 100% of the words are unknown to the dictionary" in capsys.readouterr().err
