"""From a text to binarized data: equal to fairseq-preprocess, repeatable, and safe to kill at any moment."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fairseq.data import Dictionary, data_utils
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig
from fairseq_cli.preprocess import cli_main as fairseq_preprocess

from lamemo_fairseq.data.binarized import load_lines
from lamemo_fairseq.data.streams import TokenSequence
from preprocess import datasets
from preprocess.__main__ import main
from preprocess.byte_lines import decode, encode
from preprocess.datasets import DATASETS, Sizes
from preprocess.files import Identity
from preprocess.prepare import RECORD, prepare

from .helpers import run_command

SPLITS = ("train", "valid", "test")


def prose(lines, seed):
    """Lines of words with a long tail, marks and empty lines among them."""
    generator = np.random.default_rng(seed)
    words = [
        *["the", "of", "and", "to"],
        *(f"w{i}é" if i % 7 == 0 else f"word{i}" for i in range(300)),
        "<unk>",
        "Mr.",
        ",",
    ]
    text = []
    for _ in range(lines):
        picked = (generator.zipf(1.3, generator.integers(0, 15)) - 1) % len(words)
        text.append(" ".join(words[i] for i in picked) + "\n")
    return "".join(text).encode()


TEXTS = {"train": prose(300, 1), "valid": prose(40, 2), "test": prose(50, 3)}


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for split, text in TEXTS.items():
        (folder / f"{split}.txt").write_bytes(text)
    return folder


def own(texts, destdir, *options, workers=1):
    chunk = ("--chunk-bytes", "2000")
    main(["own", "--source", str(texts), "--destdir", str(destdir), "--workers", str(workers), *chunk, *options])
    return contents(destdir)


def contents(folder):
    """The files of a folder, but for the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def tokens_of(folder, split):
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    sequence = TokenSequence(load_lines(str(folder), split, dictionary, None, False), len(dictionary), split)
    return [dictionary[i] for i in sequence.read(0, len(sequence))]


def counts_of(folder):
    record = json.loads((folder / RECORD).read_text())
    return {split: count["tokens"] for split, count in record["splits"].items()}


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


def write(path, text):
    path.write_bytes(text)
    return path


def test_long_text8_stays_in_short_lines(tmp_path):
    text = write(tmp_path / "text", b"ab " * 5000)
    own(text, tmp_path / "data", "--bpe", "text8", "--shares", "2", "1")
    lines = data_utils.load_indexed_dataset(str(tmp_path / "data" / "train"), None)
    assert max(lines.sizes) <= 1024
    assert sum(counts_of(tmp_path / "data").values()) == 15_000


# SentencePiece.


def test_a_sentencepiece_model_trained_and_reused(texts, tmp_path):
    pieces = ("--bpe", "sentencepiece")
    made = own(texts, tmp_path / "trained", *pieces, "--vocab-size", "100")
    model = tmp_path / "trained" / "sentencepiece.bpe.model"
    bpe = SentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(model)))
    expected = " </s> ".join(bpe.encode(line) for line in TEXTS["valid"].decode().split("\n")).split()
    assert tokens_of(tmp_path / "trained", "valid") == expected
    assert 60 < json.loads(made[RECORD])["types"] <= 101

    reused = own(texts, tmp_path / "reused", *pieces, "--sentencepiece-model", str(model))
    again = own(texts, tmp_path / "again", *pieces, "--vocab-size", "100", workers=2)
    for name in set(made) - {RECORD}:
        assert made[name] == reused[name] == again[name], name


# Again, interrupted, changed.


def test_a_second_time_nothing_is_done(texts, tmp_path, capsys):
    first = own(texts, tmp_path / "data")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir() if path.name != ".lock"}
    capsys.readouterr()
    assert own(texts, tmp_path / "data", workers=2) == first
    assert "complete already: nothing to do" in capsys.readouterr().err
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir() if path.name != ".lock"}
    assert after == before


def test_other_options_other_text_or_damage_make_it_anew(texts, tmp_path):
    first = own(texts, tmp_path / "data")
    other = own(texts, tmp_path / "data", "--threshold", "5")
    assert other["dict.txt"] != first["dict.txt"]
    assert own(texts, tmp_path / "data") == first
    write(tmp_path / "data" / "valid.bin", first["valid.bin"][:-2] + b"xx")
    assert own(texts, tmp_path / "data") == first
    (tmp_path / "data" / "dict.txt").unlink()
    assert own(texts, tmp_path / "data") == first
    write(texts / "test.txt", TEXTS["valid"])
    assert own(texts, tmp_path / "data")["test.bin"] == first["valid.bin"]


def test_data_of_another_origin_is_left_alone(texts, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "dict.txt", b"word 1\n")
    with pytest.raises(SystemExit, match="did not make"):
        own(texts, folder)
    assert (folder / "dict.txt").read_bytes() == b"word 1\n"


def test_two_at_once_are_refused(texts, tmp_path):
    command = [sys.executable, "-c", "import sys, fcntl; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
               "print('locked', flush=True); sys.stdin.read()"]  # fmt: skip
    (tmp_path / "data").mkdir()
    with subprocess.Popen(
        [*command, str(tmp_path / "data" / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(SystemExit, match="another run is at work"):
            own(texts, tmp_path / "data")
        other.communicate()
    own(texts, tmp_path / "data")


STEPS = ("replace", "unlink", "rmdir", "mkdir")  # of os: what changes which files there are


def dies_at_step(step, run, before):
    """Run in a process that is killed right before or after its n-th step. Returns whether it came that far."""
    child = os.fork()
    if child == 0:
        taken = 0

        def counted(function):
            def call(*arguments, **options):
                nonlocal taken
                taken += 1
                mine = taken == step
                if mine and before:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    return function(*arguments, **options)
                finally:
                    if mine:
                        os.kill(os.getpid(), signal.SIGKILL)

            return call

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)
        try:
            run()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_killed_at_every_step(texts, tmp_path, before):
    """Over data made with other options, so that those have to go."""
    options = ("--bpe", "bytes")
    expected = own(texts, tmp_path / "expected", *options)
    folder = tmp_path / "data"
    former = own(texts, folder, "--paragraphs")
    step = 1
    while dies_at_step(step, lambda: own(texts, folder, *options), before):
        found = contents(folder)
        if "dict.txt" in found and RECORD in found:
            assert found in (former, expected)
        if step % 5 == 0:  # otherwise the next one goes on from what this one left
            assert own(texts, folder, *options) == expected
            assert own(texts, folder, "--paragraphs") == former
        step += 1
    assert step > 15
    assert contents(folder) == expected
    assert {path.name for path in folder.iterdir()} == {".lock", *expected}


def test_killed_with_its_workers_running(texts, tmp_path):
    write(texts / "train.txt", TEXTS["train"] * 20)
    options = ("--tokenizer", "moses")
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        own(texts, tmp_path / "data", *options, workers=2)
        os._exit(0)
    deadline = time.monotonic() + 60
    while len(encoded := list(tmp_path.glob("data/unfinished/*/chunks/*.npz"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    workers = Path(f"/proc/{child}/task/{child}/children").read_text().split()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while outliving := [worker for worker in workers if is_alive(worker)]:
        if time.monotonic() > deadline:
            for worker in outliving:
                os.kill(int(worker), signal.SIGKILL)
            pytest.fail("workers outlive their parent")
        time.sleep(0.005)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {".lock", "unfinished"}
    before = {path: path.stat().st_mtime_ns for path in encoded}
    with pytest.MonkeyPatch.context() as patch:  # keep the chunks, to see that they were not made again
        patch.setattr("preprocess.prepare.shutil.rmtree", lambda folder, **options: None)
        resumed = own(texts, tmp_path / "data", *options, workers=2)
    assert before == {path: path.stat().st_mtime_ns for path in encoded}
    assert resumed == own(texts, tmp_path / "whole", *options)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_that_dies_is_told_of(texts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("preprocess.chunks._encode", lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(SystemExit, match=r"a worker died.*--workers"):
            own(texts, tmp_path / "data", workers=2)
    own(texts, tmp_path / "data", workers=2)


# Bad input.


def refused(*arguments):
    with pytest.raises(SystemExit) as error:
        main(list(map(str, arguments)))
    return str(error.value)


def test_bad_input_names_the_option(texts, tmp_path):
    data = ("--destdir", tmp_path / "data")
    source = ("--source", texts)
    assert "--source" in refused("own", *data)
    assert "--source" in refused("own", *data, "--source", *[texts / "train.txt"] * 4)
    assert "--shares" in refused("own", *data, "--source", texts / "train.txt", "--shares", "1", "0")
    assert "--tokenizer" in refused("own", *data, *source, "--bpe", "bytes", "--tokenizer", "moses")
    assert "--sentencepiece-model" in refused("own", *data, *source, "--sentencepiece-model", texts / "train.txt")
    assert "--pattern needs" in refused("own", *data, *source, "--pattern", "x")
    assert "--pattern (" in refused("own", *data, *source, "--tokenizer", "words", "--pattern", "(")
    for workers in (1, 2):
        pieces = ("--bpe", "sentencepiece", "--sentencepiece-model", texts / "train.txt", "--workers", workers)
        assert "is not a SentencePiece model" in refused("own", *data, *source, *pieces)
    assert "--srcdict nowhere" in refused("own", *data, *source, "--srcdict", "nowhere")
    assert "--workers" in refused("own", *data, *source, "--workers", 0)
    assert "Not a directory" in refused("own", "--destdir", texts / "train.txt" / "data", *source)
    assert "--vocab-size 9999" in refused("own", *data, *source, "--bpe", "sentencepiece", "--vocab-size", 9999)
    assert "wiki.train.tokens is not there" in refused("wikitext-2", *data, *source)
    write(texts / "valid.txt", b"fine\n" * 1000 + b"\xff\n")
    for workers in (1, 2):
        message = refused("own", *data, *source, "--chunk-bytes", 2000, "--workers", workers)
        assert "valid.txt: at byte 5,000" in message and "not UTF-8" in message
    write(texts / "valid.txt", b"")
    assert "no text for valid" in refused("own", *data, *source)


def test_every_data_set_has_a_command(tmp_path, monkeypatch):
    prepared = []
    monkeypatch.setattr("preprocess.__main__.prepare", lambda dataset, *arguments: prepared.append(dataset))
    for name in datasets.DATASETS:
        main([name, "--destdir", str(tmp_path)])
    assert [dataset.name for dataset in prepared] == ["wikitext-103", "wikitext-2", "enwik8", "text8"]
    for dataset in prepared:
        assert len(dataset.sha256) == 64
        assert (
            dataset.archive
            == f"{dataset.name}{'-v1' if 'wiki' in dataset.name and dataset.name != 'enwik8' else ''}.zip"
        )
        if isinstance(dataset.divide, Sizes):
            assert tuple(dataset.tokens.values()) == dataset.divide.bytes
