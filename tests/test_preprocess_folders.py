"""The folder that `python -m preprocess` writes: what it records there, and what it neither replaces nor removes."""

import json

import pytest

from lamemo_fairseq.data.text_encoding import read_text_encoding
from preprocess.files import Identity
from preprocess.prepare import RECORD, UNFINISHED

from .preprocessing import contents, own, refused, write, write_texts


@pytest.mark.parametrize(
    "options",
    [
        ("--tokenizer", "moses"),
        ("--bpe", "bytes"),
        ("--bpe", "text8"),
        ("--bpe", "sentencepiece", "--vocab-size", "90"),
    ],
)
def test_the_record_says_how_the_text_became_tokens(texts, tmp_path, options):
    own(texts, tmp_path / "data", *options)
    encoding = read_text_encoding(str(tmp_path / "data"))
    assert encoding.pieces == {"moses": "none", "text8": "characters"}.get(options[1], options[1])
    assert encoding.tokenizer == {"--bpe": "space" if "sentencepiece" in options else "none"}.get(options[0], "moses")
    if encoding.model is not None:
        assert Identity.of(tmp_path / "data" / "sentencepiece.bpe.model").sha256 == encoding.model_sha256
    assert encoding.source_lang == ("en" if "moses" in options else "")


def test_another_corpus_is_not_replaced(texts, tmp_path):
    own(texts, tmp_path / "data")
    before = contents(tmp_path / "data")
    message = refused("text8", "--destdir", tmp_path / "data", "--source", texts / "train.txt")
    assert "data made by `python -m preprocess own`: remove it, or choose another --destdir for text8" in message
    assert contents(tmp_path / "data") == before
    (tmp_path / "data" / RECORD).unlink()
    (tmp_path / "data" / "dict.txt").unlink()
    message = refused("own", "--destdir", tmp_path / "data", "--source", texts)
    assert "data holds test.bin, which this command did not make: choose another --destdir, such as" in message


def test_data_is_not_mixed_with_other_files(texts, tmp_path):
    """But it may lie beside its own text, and beside hidden files. Nothing is written into a folder that is refused."""
    docs = tmp_path / "docs"
    (docs / UNFINISHED).mkdir(parents=True)
    write(docs / UNFINISHED / "page.md", b"precious")
    write(docs / ".hidden", b"")
    write_texts(docs / "texts")
    for source in (texts, docs / "texts" / "train.txt"):
        write(docs / "page.md", b"")
        message = refused("own", "--destdir", docs, "--source", source)
        assert message.endswith(
            f"docs holds page.md, which this command did not make: choose another --destdir, such as {docs}/data-bin"
        )
    assert sorted(path.name for path in docs.iterdir()) == [".hidden", "page.md", "texts", UNFINISHED]
    (docs / "page.md").unlink()
    assert "docs holds texts, which" in refused("own", "--destdir", docs, "--source", texts)
    own(docs / "texts", docs)
    assert (docs / UNFINISHED / "page.md").read_bytes() == b"precious"
    write(docs / "page.md", b"")
    own(docs / "texts", docs, "--bpe", "bytes")


@pytest.mark.parametrize("name", ["../precious", "/precious", "a/../../precious", "..", ""])
def test_a_record_cannot_lead_out_of_its_folder(texts, tmp_path, name):
    own(texts, tmp_path / "data")
    precious = write(tmp_path / "precious", b"precious")
    path = tmp_path / "data" / RECORD
    record = json.loads(path.read_text())
    name = name.replace("/precious", str(precious)) if name.startswith("/") else name
    record["files"][name] = {"name": "x", "size": 1, "sha256": "0"}
    path.write_text(json.dumps(record))
    message = refused("own", "--destdir", tmp_path / "data", "--source", texts)
    assert f"{path} is damaged" in message and "no file of the folder" in message and precious.exists()


@pytest.mark.parametrize(
    "record",
    ["[]", "{}", '{"files": {}, "made_from": 1}', '{"files": {"a": {}}, "made_from": {"settings": {"name": "own"}}}'],
)
def test_a_record_that_is_none(texts, tmp_path, record):
    own(texts, tmp_path / "data")
    (tmp_path / "data" / RECORD).write_text(record)
    assert "is damaged" in refused("own", "--destdir", tmp_path / "data", "--source", texts)


def test_unfinished_work_may_be_a_link_to_another_disk(texts, tmp_path):
    scratch = tmp_path / "scratch"
    (scratch / "0123456789abcdef").mkdir(parents=True)  # left by another run
    (scratch / "precious").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / UNFINISHED).symlink_to(scratch)
    own(texts, tmp_path / "data")
    assert (scratch / "precious").exists() and not (scratch / "0123456789abcdef").exists()


def test_a_lock_that_is_a_link_changes_nothing(texts, tmp_path):
    precious = write(tmp_path / "precious", b"precious")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".lock").symlink_to(precious)
    own(texts, tmp_path / "data")
    assert precious.read_bytes() == b"precious"
