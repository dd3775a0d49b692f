"""From a text to binarized data: every data set small, and equal to fairseq-preprocess."""

import gzip
import json
import zipfile
from dataclasses import replace

import pytest
from fairseq.data import Dictionary, data_utils
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig
from fairseq_cli.preprocess import cli_main as fairseq_preprocess
from sacremoses import MosesTokenizer

from lamemo_fairseq.data.binarized import load_lines
from lamemo_fairseq.data.documents import DocumentOptions
from lamemo_fairseq.data.streams import TokenSequence
from preprocess import datasets
from preprocess.__main__ import main
from preprocess.byte_lines import decode, encode
from preprocess.datasets import DATASETS, Sizes
from preprocess.files import Identity
from preprocess.prepare import RECORD, prepare

from .helpers import run_command
from .preprocessing import SPLITS, TEXTS, contents, counts_of, own, tokens_of, write


@pytest.mark.parametrize("unit", ["words", "bytes"])
@pytest.mark.parametrize("workers", [1, 3])
def test_bit_by_bit_what_fairseq_preprocess_writes(texts, tmp_path, workers, unit):
    options = ("--bpe", "bytes") if unit == "bytes" else ("--threshold", "3", "--nwords", "150")
    made = own(texts, tmp_path / "own", *options, workers=workers)
    if unit == "bytes":
        for path in texts.iterdir():
            path.write_text("".join(encode(path.read_bytes().splitlines(keepends=True))), encoding="utf-8")
    run_command(
        fairseq_preprocess,
        *("--only-source", "--destdir", tmp_path / "fairseq"),
        *(("--thresholdsrc", 3, "--nwordssrc", 150) if unit == "words" else ()),
        *(word for split in SPLITS for word in (f"--{split}pref", texts / f"{split}.txt")),
    )
    for path in (tmp_path / "fairseq").iterdir():
        if path.name != "preprocess.log":
            assert made[path.name] == path.read_bytes(), path.name
    unknown = json.loads(made[RECORD])["splits"]["valid"]["unknown"]
    assert unknown == tokens_of(tmp_path / "own", "valid").count("<unk>")
    assert (unknown > 0) == (unit == "words")


def test_the_same_dictionary_for_other_text(texts, tmp_path):
    own(texts, tmp_path / "first", "--threshold", "3")
    (texts / "train.txt").write_bytes(TEXTS["valid"])
    made = own(texts, tmp_path / "second", "--srcdict", str(tmp_path / "first" / "dict.txt"))
    assert made["dict.txt"] == (tmp_path / "first" / "dict.txt").read_bytes()
    assert made["train.bin"] == made["valid.bin"] == (tmp_path / "first" / "valid.bin").read_bytes()


def test_every_byte_there_and_back(texts, tmp_path):
    text = bytes(range(256)) * 3 + b"\r\n\n\xff"  # ends inside a line
    (texts / "train.txt").write_bytes(b"plain\n")
    (texts / "valid.txt").write_bytes(text)
    own(texts, tmp_path / "data", "--bpe", "bytes")
    assert counts_of(tmp_path / "data") == {"train": 6, "valid": len(text), "test": len(TEXTS["test"])}
    line = " ".join(tokens_of(tmp_path / "data", "valid"))
    assert b"".join(decode(line.split("</s>"))) == text + b"\n"
    # The same symbols as those of prompts.
    assert [symbol for prompt in encode([b"plain"]) for symbol in prompt.split()] + ["</s>"] == tokens_of(
        tmp_path / "data", "train"
    )


def test_one_text_in_shares(tmp_path):
    text = tmp_path / "book.txt"
    text.write_bytes(b"".join(b"line %03d\n" % (i % 10) for i in range(100)))
    own(text, tmp_path / "data")
    assert counts_of(tmp_path / "data") == {"train": 90 * 3, "valid": 5 * 3, "test": 5 * 3}
    tokens = [token for split in SPLITS for token in tokens_of(tmp_path / "data", split)]
    assert " ".join(tokens).replace(" </s> ", "\n").removesuffix(" </s>") + "\n" == text.read_text()
    own(text, tmp_path / "data", "--shares", "1", "1")
    assert counts_of(tmp_path / "data") == {"train": 150, "valid": 150}
    assert not (tmp_path / "data" / "test.bin").exists()


def test_a_text_in_parts_is_its_parts(texts, tmp_path, capsys):
    """In a folder that has it whole the result is the same; another part makes everything anew."""
    whole = own(texts, tmp_path / "whole", "--tokenizer", "words")
    (texts / "train.txt").unlink()
    write(texts / "train-00.txt", TEXTS["train"][:5_001])
    write(texts / "train-01.txt", TEXTS["train"][5_001:])
    parts = own(texts, tmp_path / "parts", "--tokenizer", "words")
    assert all(parts[name] == whole[name] for name in set(whole) - {RECORD})
    types = json.loads(whole[RECORD])["types"]
    assert f"{types:,} types in all splits, " in capsys.readouterr().err  # dict.txt may have fewer: those of train
    own(texts, tmp_path / "parts", "--tokenizer", "words")
    assert "nothing to do" in capsys.readouterr().err
    write(texts / "train-01.txt", b"another\n")
    assert own(texts, tmp_path / "parts", "--tokenizer", "words")["train.bin"] != whole["train.bin"]


def documents_of(folder, split):
    """The words of every recorded document."""
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    tokens = TokenSequence(load_lines(str(folder), split, dictionary, None, False), len(dictionary), split)
    found = DocumentOptions("recorded").find([str(folder / split)], tokens, dictionary)
    return [[dictionary[i] for i in tokens.read(start, stop)] for start, stop in zip(*found, strict=True)]


@pytest.mark.parametrize("options", [["--tokenizer", "words"], ["--bpe", "bytes"]], ids=["words", "bytes"])
def test_every_file_is_a_document(tmp_path, options):
    """An empty one among them, one in several chunks, one packed, and one whose last line has no end."""
    source = tmp_path / "source"
    texts = {
        "a.txt": TEXTS["train"][:7_001] + b"end",
        "b.txt": b"",
        "c.txt": b"one\n" + TEXTS["valid"],
        "d.txt.gz": TEXTS["test"],
    }
    for split in SPLITS:
        (source / split).mkdir(parents=True)
        for name, text in texts.items():
            write(source / split / name, gzip.compress(text) if name.endswith("gz") else text)
    own(source, tmp_path / "data", "--documents", *options, workers=2)
    assert (tmp_path / "data" / "train.documents").read_text().split()[1] == "0"
    counted = json.loads((tmp_path / "data" / RECORD).read_text())["originals"]["train"]
    assert counted["words"] == sum(len(text.split()) for text in texts.values())
    found = documents_of(tmp_path / "data", "train")
    assert found == documents_of(tmp_path / "data", "test") and len(found) == 3
    for number, name in enumerate(("a.txt", "c.txt", "d.txt.gz")):
        alone = tmp_path / f"alone{number}"
        own(write(tmp_path / f"{number}.txt", texts[name]), alone, "--shares", "1", *options)
        assert found[number] == tokens_of(alone, "train")


def test_the_first_bytes_of_each_text(texts, tmp_path):
    """They go on to the end of the line, or of the paragraph."""
    sizes = {"train": 2_500, "valid": 1, "test": len(TEXTS["test"])}
    first = ("--first-bytes", *map(str, sizes.values()))
    own(texts, tmp_path / "bytes", "--bpe", "bytes", *first)
    stops = {split: TEXTS[split].index(b"\n", size - 1) + 1 for split, size in sizes.items()}
    assert counts_of(tmp_path / "bytes") == stops and stops["train"] > 2_500
    for split, stop in stops.items():
        write(texts / f"{split}.txt", TEXTS[split][:stop])
    shorter = own(texts, tmp_path / "shorter", "--bpe", "bytes")
    assert all(text == shorter[name] for name, text in contents(tmp_path / "bytes").items() if name != RECORD)

    for split in SPLITS:
        write(texts / f"{split}.txt", b"one two\nthree\n\nfour five\n\nsix\n")
    own(texts, tmp_path / "paragraphs", "--paragraphs", "--first-bytes", "3", "16", "20")
    assert counts_of(tmp_path / "paragraphs") == {"train": 4, "valid": 7, "test": 7}


def test_chunks_of_blank_lines_only(tmp_path):
    """The last chunks of the training text, which are of 2,000 bytes, have no paragraph."""
    text = b"word and word\n\n" * 140
    for name, end in ("plain", b""), ("blank", b"\n" * 5000):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.txt", text + end)
        write(tmp_path / name / "valid.txt", b"one\n")
        write(tmp_path / name / "test.txt", b"\n \ntwo\n")
        own(tmp_path / name, tmp_path / name / "data", "--paragraphs")
    plain, blank = contents(tmp_path / "plain" / "data"), contents(tmp_path / "blank" / "data")
    assert {**blank, RECORD: b""} == {**plain, RECORD: b""}
    assert json.loads(blank[RECORD])["splits"] == json.loads(plain[RECORD])["splits"]


# The data sets, small.


def small_wikitext(**changes):
    counts = {split: len(text.split()) + text.count(b"\n") for split, text in TEXTS.items()}
    types = len(set(b"".join(TEXTS.values()).split())) + 1
    return replace(DATASETS["wikitext-103"], **{"tokens": counts, "types": types, **changes})


def wikitext_archive(folder):
    path = folder / "wikitext-103-v1.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, text in TEXTS.items():
            archive.writestr(f"wikitext-103/wiki.{split}.tokens", text)
    return path


def test_wikitext_counts_one_end_a_line(tmp_path):
    record = prepare(small_wikitext(), tmp_path / "data", [wikitext_archive(tmp_path)])
    assert {split: count["lines"] for split, count in record["splits"].items()} == {
        "train": 300,
        "valid": 40,
        "test": 50,
    }
    known = {"</s>", *TEXTS["train"].decode().split()}
    words = TEXTS["test"].decode().replace("\n", " </s> ").split()
    assert tokens_of(tmp_path / "data", "test") == [word if word in known else "<unk>" for word in words]


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"tokens": {"valid": 217_646}}, r"valid has [\d,]+ tokens, not 217,646"),
        ({"tokens": {"train": 1, "valid": 217_646}}, r"train has [\d,]+ tokens, not 1; valid has"),
        ({"types": 267_735}, r"there are \d+ types, not 267,735"),
    ],
)
def test_another_text_is_not_taken_for_the_data_set(tmp_path, changes, what):
    with pytest.raises(ValueError, match=what):
        prepare(small_wikitext(**changes), tmp_path / "data", [wikitext_archive(tmp_path)])
    assert {path.name for path in (tmp_path / "data").iterdir()} == {".lock"}


def test_a_downloaded_archive_is_needed_once(tmp_path):
    archive = wikitext_archive(tmp_path)
    identity = Identity.of(archive)
    dataset = small_wikitext(addresses=(archive.as_uri(),), sha256=identity.sha256, size=identity.size)
    first = prepare(dataset, tmp_path / "data")
    archive.unlink()
    (tmp_path / "data" / archive.name).unlink()
    assert prepare(dataset, tmp_path / "data") == first


@pytest.mark.parametrize("name", ["enwik8", "text8"])
def test_the_splits_of_one_file(tmp_path, name):
    text = (
        b" the history of anarchism and\xc3\xa9 <more>\n\n of the same" if name == "enwik8" else b" the history of it"
    )
    sizes = (len(text) - 8, 5, 3)  # inside lines
    dataset = replace(
        DATASETS[name],
        divide=Sizes(sizes),
        contents={name: Identity.of(write(tmp_path / name, text))},
        tokens=dict(zip(SPLITS, sizes, strict=True)),
        types=len(set(text)),
    )
    prepare(dataset, tmp_path / "data", [tmp_path / name], chunk_bytes=10)
    tokens = [token for split in SPLITS for token in tokens_of(tmp_path / "data", split)]
    back = "".join(tokens).replace("\u2581", " ") if name == "text8" else None
    assert back is None or back.encode() == text
    assert len(tokens) == len(text) and tokens.count("</s>") == text.count(b"\n")
    assert "<unk>" not in tokens

    write(tmp_path / name, text[:-1] + b"x")
    with pytest.raises(ValueError, match=rf"does not hold the original {name}: .*{dataset.contents[name].sha256}"):
        prepare(dataset, tmp_path / "data", [tmp_path / name])
    with pytest.raises(ValueError, match=r"bytes, not .*: it is not the whole file"):
        prepare(replace(dataset, contents={}, divide=Sizes((90, 5, 5))), tmp_path / "other", [tmp_path / name])


def test_long_text8_stays_in_short_lines(tmp_path):
    text = write(tmp_path / "text", b"ab " * 5000)
    own(text, tmp_path / "data", "--bpe", "text8", "--shares", "2", "1")
    lines = data_utils.load_indexed_dataset(str(tmp_path / "data" / "train"), None)
    assert max(lines.sizes) <= 1024
    assert sum(counts_of(tmp_path / "data").values()) == 15_000


def test_every_data_set_has_a_command(tmp_path, monkeypatch):
    prepared = []
    monkeypatch.setattr("preprocess.__main__.prepare", lambda dataset, *arguments: prepared.append(dataset))
    for name in datasets.DATASETS:
        main([name, "--destdir", str(tmp_path)])
    assert [dataset.name for dataset in prepared] == ["wikitext-103", "wikitext-2", "enwik8", "text8", "pg-19"]
    for dataset in prepared:
        assert len(dataset.sha256) == 64
        end = "-v1.zip" if dataset.name.startswith("wikitext") else ".zip"
        assert dataset.archive == ("metadata.csv" if dataset.books else dataset.name + end)
        if isinstance(dataset.divide, Sizes):
            assert tuple(dataset.tokens.values()) == dataset.divide.bytes


# SentencePiece and Moses.


def test_a_sentencepiece_model_trained_and_reused(texts, tmp_path):
    pieces = ("--bpe", "sentencepiece")
    made = own(texts, tmp_path / "trained", *pieces, "--vocab-size", "100")
    model = tmp_path / "trained" / "sentencepiece.bpe.model"
    bpe = SentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(model)))
    expected = " </s> ".join(bpe.encode(line) for line in TEXTS["valid"].decode().split("\n")).split()
    assert tokens_of(tmp_path / "trained", "valid") == expected
    record = json.loads(made[RECORD])
    assert 60 < record["types"] <= 101
    assert set(record["made_from"]["settings"]["training"]) == {"vocab_size", "character_coverage", "sample_bytes"}

    reused = own(texts, tmp_path / "reused", *pieces, "--sentencepiece-model", str(model))
    again = own(texts, tmp_path / "again", *pieces, "--vocab-size", "100", workers=2)
    for name in set(made) - {RECORD}:
        assert made[name] == reused[name] == again[name], name


def test_a_language_that_sacremoses_does_not_know_is_told(texts, tmp_path, capsys):
    moses = ("--tokenizer", "moses", "--source-lang")
    own(texts, tmp_path / "known", *moses, "de")
    assert "--source-lang" not in capsys.readouterr().err
    own(texts, tmp_path / "unknown", *moses, "xx")
    said = capsys.readouterr().err
    assert "--source-lang xx" in said and " de, " in said and "takes the English ones" in said
    assert MosesTokenizer("xx").NONBREAKING_PREFIXES == MosesTokenizer("en").NONBREAKING_PREFIXES
